"""Optimizers of members: one step for K models whose parameters have a leading member axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupgpt.model.gpt import GPT
from mupgpt.optim.groups import beside, keep_members, of_member, param_groups
from mupgpt.optim.solo import MakeOptimizer, one_model
from mupgpt.parametrization.table import ParamTable

__all__ = ["MemberAdamW", "PerMember"]


class PerMember(torch.optim.Optimizer):
    """One optimizer a member, over views of its parameters: any that one model may have.

    Values of a group are tuples with one value a member, as `MemberAdamW`'s; members may differ
    in their optimizer too.
    """

    def __init__(
        self, groups: list[dict[str, Any]], optimizers: Mapping[str, MakeOptimizer]
    ) -> None:
        super().__init__(groups, defaults={})
        self._optimizers = optimizers
        self.solos = [self._solo(k) for k in range(len(groups[0]["lr"]))]

    def _solo(self, k: int) -> torch.optim.Optimizer:
        groups = [
            {**of_member(group, k), "params": [p.detach()[k] for p in group["params"]], "number": i}
            for i, group in enumerate(self.param_groups)
        ]
        return one_model(groups, self._optimizers)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every member by its own optimizer."""
        assert closure is None, "no closures: losses are members' own"
        for k, solo in enumerate(self.solos):
            for group in solo.param_groups:
                whole = self.param_groups[group["number"]]
                group["lr"] = whole["lr"][k]
                for view, p in zip(group["params"], whole["params"], strict=True):
                    view.data, view.grad = p.detach()[k], p.grad[k]
            solo.step()
            solo.zero_grad()

    def keep(self, members: Sequence[int]) -> None:
        """Forget the optimizers of all other members (their parameters are cut already)."""
        keep_members(self.param_groups, members)
        self.solos = [self.solos[k] for k in members]

    def renew(self, members: Sequence[int], model: GPT, tables: Sequence[ParamTable]) -> None:
        """Begin these members anew, by the tables of all (their parameters are filled already)."""
        self.param_groups = param_groups(model, tables, merge=False)
        for k in members:
            self.solos[k] = self._solo(k)


class MemberAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` for parameters with a leading member axis.

    ``lr``, ``weight_decay``, ``eps`` and ``betas`` of a group are tuples with one value a member.
    On a CPU a step is one fused call per member and group, over views; on a GPU (``vectors``) it
    is arithmetic on whole parameters with vectors of the members' values, and nothing but the
    factors of their learning rates comes from the host.
    """

    def __init__(self, groups: list[dict[str, Any]], vectors: bool | None = None) -> None:
        super().__init__(groups, defaults={})
        first = groups[0]["params"][0]
        vectors = first.is_cuda if vectors is None else vectors
        self.steps = torch.zeros(len(first), device=first.device)  # taken by each member
        self._factors = torch.ones(len(first), dtype=first.dtype, device=first.device)
        self._values = self._whole_values() if vectors else None

    @property
    def vectors(self) -> bool:
        """Whether values come as vectors over the members."""
        return self._values is not None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every member by its own values."""
        assert closure is None, "no closures: losses are members' own"
        self.steps += 1
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            if self._values is None:
                self._step_views(group)
            else:
                self._step_whole(group, self._values[i])

    def _step_views(self, group: dict[str, Any]) -> None:
        params = group["params"]
        whole = (
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
        )
        views = [[t.unbind(0) for t in tensors] for tensors in whole]
        for k, lr in enumerate(group["lr"]):
            weights, grads, averages, squares = ([t[k] for t in tensors] for tensors in views)
            beta1, beta2 = group["betas"][k]
            torch._fused_adamw_(
                weights,
                grads,
                averages,
                squares,
                [],
                [self.steps[k]] * len(params),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"][k],
                eps=group["eps"][k],
                amsgrad=False,
                maximize=False,
            )

    def _step_whole(self, group: dict[str, Any], values: Tensor) -> None:
        table_lr, decay, eps, beta1, beta2 = values  # (K,) each
        lr, steps = table_lr * self._factors, self.steps.to(values)
        kept, rate = 1 - lr * decay, lr / (1 - beta1**steps)
        grown = (1 - beta2**steps).sqrt()
        for p in group["params"]:
            average, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            average.lerp_(p.grad, beside(1 - beta1, p))
            square.lerp_(p.grad.square(), beside(1 - beta2, p))
            size = square.sqrt().div_(beside(grown, p)).add_(beside(eps, p))
            p.mul_(beside(kept, p)).sub_(average.div(size).mul_(beside(rate, p)))

    def _whole_values(self) -> Tensor:
        """The values of all groups, (groups, 5, K), beside the parameters."""
        first = self.param_groups[0]["params"][0]
        values = [
            (g["table_lr"], g["weight_decay"], g["eps"], *zip(*g["betas"], strict=True))
            for g in self.param_groups
        ]
        return torch.tensor(values, dtype=first.dtype, device=first.device)

    def load(self, factors: Sequence[float]) -> None:
        """Bring the factors of this step's learning rates to the device, one a member."""
        self._factors.copy_(torch.tensor(factors, dtype=torch.float64))

    def keep(self, members: Sequence[int]) -> None:
        """Forget the state and values of all other members (their parameters are cut already)."""
        keep_members(self.param_groups, members)
        self.steps, self._factors = self.steps[list(members)], self._factors[list(members)]
        if self._values is not None:
            self._values = self._values[..., list(members)]
        for state in self.state.values():
            for key in state:
                state[key] = state[key][list(members)]

    def renew(self, members: Sequence[int], model: GPT, tables: Sequence[ParamTable]) -> None:
        """Begin these members anew, by the tables of all (their parameters are filled already)."""
        self.param_groups = param_groups(model, tables)
        if self._values is not None:
            self._values = self._whole_values()
        for tensor in (self.steps, *(t for state in self.state.values() for t in state.values())):
            tensor[list(members)] = 0.0
