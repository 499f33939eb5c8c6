"""Optimizers of one model: torch's own by name, Lion, and several as one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mupgpt.errors import ConfigError

__all__ = ["OPTIMIZERS", "Joint", "MakeOptimizer", "by_kind", "one_model"]

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""What makes an optimizer of a table's groups."""


def one_model(
    groups: list[dict[str, Any]], optimizers: Mapping[str, MakeOptimizer]
) -> torch.optim.Optimizer:
    """The optimizer of one model: that of its groups, or `Joint` where they name several."""
    parts = {
        kind: _make(kind, optimizers[kind], [g for g in groups if g["optimizer"] == kind])
        for kind in dict.fromkeys(group["optimizer"] for group in groups)
    }
    return Joint(parts) if len(parts) > 1 else next(iter(parts.values()))


def _make(kind: str, make: MakeOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """What ``make`` makes, if it steps these groups: what it leaves out would never learn."""
    wanted = [(group["table_lr"], len(group["params"])) for group in groups]
    made = make(groups)
    found = [(g.get("table_lr"), len(g["params"])) for g in getattr(made, "param_groups", [])]
    if not isinstance(made, torch.optim.Optimizer) or found != wanted:
        raise ConfigError(
            f"optimizers[{kind!r}] made {type(made).__name__}: must be a torch.optim.Optimizer "
            "over the groups that it was given, as they are"
        )
    return made


def by_kind(optimizer: torch.optim.Optimizer) -> Mapping[str, torch.optim.Optimizer]:
    """Kind of a table's rows → the optimizer that steps them."""
    if isinstance(optimizer, Joint):
        return optimizer.parts
    return {group.get("optimizer", "adamw"): optimizer for group in optimizer.param_groups}


def _momentum(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups for an optimizer that calls β₁ momentum and has no ε of Adam's meaning."""
    return [
        {**{k: v for k, v in group.items() if k not in ("betas", "eps")},
         "momentum": group["betas"][0]}
        for group in groups
    ]  # fmt: skip


class Lion(torch.optim.Optimizer):
    """w ← w − η (sign(β₁m + (1 − β₁)g) + λw), then m ← β₂m + (1 − β₂)g.

    Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        assert closure is None, "no closures: a step is one backward"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(average.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - beta2)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(_momentum(groups)),
    "lion": Lion,
    "muon": lambda groups: torch.optim.Muon(_momentum(groups), adjust_lr_fn="original"),
}
"""A row's ``optimizer`` → what makes it, for such groups of one model."""


class Joint(torch.optim.Optimizer):
    """Several optimizers as one: each steps its own groups; groups and state are shared."""

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([g for part in parts.values() for g in part.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each part."""
        assert closure is None, "no closures: a step is one backward"
        for kind, part in self.parts.items():
            part.param_groups = [g for g in self.param_groups if g["optimizer"] == kind]
            part.state = self.state  # a loaded state replaces both
            part.step()
