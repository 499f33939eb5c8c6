"""Optimizers that a table names, for one model and for K members; clipping per member."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupgpt.lean import LeanAdamW
from mupgpt.memory import SCHEMES
from mupgpt.model import GPT
from mupgpt.plain import ConfigError
from mupgpt.shards import global_norm, local, mesh_of
from mupgpt.table import ParamRow, ParamTable

__all__ = [
    "Joint",
    "Lion",
    "MemberAdamW",
    "PerMember",
    "all_adamw",
    "assert_rates",
    "clip_gradients",
    "effective_lrs",
    "make_optimizer",
    "param_groups",
]


def param_groups(
    model: nn.Module, tables: ParamTable | Sequence[ParamTable], merge: bool = True
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``: parameters whose rows agree in lr, weight decay and ε.

    Each group carries ``names``, its ``optimizer`` (under most rules ``adamw``), and ``table_lr``,
    from which `set_lr` derives ``lr`` every step. With a list of tables (one per member) all values
    are tuples. With ``merge=False`` each parameter has a group of its own. A parameter without a
    row, or a row without a parameter, is an error.
    """
    solo = isinstance(tables, ParamTable)
    columns = [tables] if isinstance(tables, ParamTable) else list(tables)
    named = dict(model.named_parameters())
    _same_names(set(named), set(columns[0].rows))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in named.items():
        rows = [table.rows[name] for table in columns]
        values = {key: _values(rows, key, solo) for key in VALUES}
        # Fused updates want tensors of one mesh.
        key = (*values.values(), mesh_of(p)) if merge else (name,)
        group = groups.setdefault(key, {"params": [], "names": [], **values})
        group["params"].append(p)
        group["names"].append(name)
    betas = [table.betas for table in columns]
    for group in groups.values():
        group["table_lr"] = group["lr"]
        group["betas"] = betas[0] if solo else tuple(betas)
    return list(groups.values())


VALUES = ("optimizer", "lr", "weight_decay", "eps")


def _values(rows: Sequence[ParamRow], key: str, solo: bool) -> Any:
    values = tuple(getattr(row, key) for row in rows)
    return values[0] if solo else values


def _same_names(in_model: set[str], in_table: set[str]) -> None:
    if odd := sorted(in_model ^ in_table):
        where = "the model" if odd[0] in in_model else "the table"
        raise ValueError(f"parameter {odd[0]!r} is only in {where}: the table is of another shape")


def make_optimizer(
    model: nn.Module,
    tables: ParamTable | Sequence[ParamTable],
    memory: str = "exact",
    seed: int = 0,
    backend: str | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the rule of the table names, over the table's groups.

    For one model it is torch's own (and our `Lion`), `Joint` where a rule takes two; for members
    `MemberAdamW`, or `PerMember` where any of them takes another one. A sixteen-bit ``memory``
    (see `SCHEMES`) takes `LeanAdamW`, for one model and rules of AdamW alone; ``seed`` keys its
    rounding and ``backend`` compiles its update.
    """
    members = getattr(model, "members", None)  # an adopted module has no such axis
    if members is None:
        groups = param_groups(model, tables)
        return _one_model(groups) if memory == "exact" else _lean(groups, memory, seed, backend)
    assert memory == "exact", "members have fp32 state"
    tables = [tables] * members if isinstance(tables, ParamTable) else tables
    if all_adamw(tables):
        return MemberAdamW(param_groups(model, tables))
    return PerMember(param_groups(model, tables, merge=False))


def all_adamw(tables: Sequence[ParamTable]) -> bool:
    """Whether nothing in these tables takes another optimizer than AdamW."""
    return all(row.optimizer == "adamw" for table in tables for row in table.rows.values())


def _lean(groups: list[dict[str, Any]], memory: str, seed: int, backend: str | None) -> LeanAdamW:
    for kind in {group["optimizer"] for group in groups} - {"adamw"}:
        raise ConfigError(
            f"memory = {memory!r}: sixteen-bit weights are stepped by AdamW, and the rule asks for "
            f"{kind}; use memory = 'exact' or a rule of AdamW"
        )
    remainder = SCHEMES[memory].remainder > 0
    return LeanAdamW(groups, remainder=remainder, seed=seed, backend=backend)


def _one_model(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    kinds = dict.fromkeys(group["optimizer"] for group in groups)
    parts = {
        kind: OPTIMIZERS[kind]([group for group in groups if group["optimizer"] == kind])
        for kind in kinds
    }
    return Joint(parts) if len(parts) > 1 else next(iter(parts.values()))


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
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(average.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - beta2)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(_momentum(groups)),
    "lion": Lion,
    "muon": lambda groups: torch.optim.Muon(_momentum(groups), adjust_lr_fn="original"),
}
"""A row's ``optimizer`` → torch's optimizer for such groups of one model."""


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


class PerMember(torch.optim.Optimizer):
    """One optimizer a member, over views of its parameters: any that one model may have.

    Values of a group are tuples with one value a member, as `MemberAdamW`'s; members may differ
    in their optimizer too.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        self.solos = [self._solo(k) for k in range(len(groups[0]["lr"]))]

    def _solo(self, k: int) -> torch.optim.Optimizer:
        keys = (*VALUES, "table_lr", "betas")
        return _one_model([
            {key: group[key][k] for key in keys}
            | {"params": [p.detach()[k] for p in group["params"]], "place": place}
            for place, group in enumerate(self.param_groups)
        ])  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every member by its own optimizer."""
        assert closure is None, "no closures: losses are members' own"
        for k, solo in enumerate(self.solos):
            for group in solo.param_groups:
                whole = self.param_groups[group["place"]]
                group["lr"] = whole["lr"][k]
                for view, p in zip(group["params"], whole["params"], strict=True):
                    view.data, view.grad = p.detach()[k], p.grad[k]
            solo.step()
            solo.zero_grad()

    def keep(self, members: Sequence[int]) -> None:
        """Forget the optimizers of all other members (their parameters are cut already)."""
        _keep_values(self.param_groups, members)
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
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            if self._values is None:
                self._step_views(group)
            else:
                self._step_whole(group, self._values[place])

    def _step_views(self, group: dict[str, Any]) -> None:
        params = group["params"]
        columns = [
            [t.unbind(0) for t in tensors]
            for tensors in (
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
            )
        ]
        for k, lr in enumerate(group["lr"]):
            weights, grads, averages, squares = ([views[k] for views in c] for c in columns)
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
            average.lerp_(p.grad, _beside(1 - beta1, p))
            square.lerp_(p.grad.square(), _beside(1 - beta2, p))
            size = square.sqrt().div_(_beside(grown, p)).add_(_beside(eps, p))
            p.mul_(_beside(kept, p)).sub_(average.div(size).mul_(_beside(rate, p)))

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
        _keep_values(self.param_groups, members)
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


def _beside(vector: Tensor, p: Tensor) -> Tensor:
    """(K,) in as many dimensions as ``p`` (K, …) has."""
    return vector.view(-1, *[1] * (p.dim() - 1))


def _keep_values(groups: list[dict[str, Any]], members: Sequence[int]) -> None:
    for group in groups:
        for key in (*VALUES, "table_lr", "betas"):
            group[key] = tuple(group[key][k] for k in members)


def set_lr(optimizer: torch.optim.Optimizer, factor: float | Sequence[float]) -> None:
    """Derive every group's ``lr`` as factor × the table's: never read back, never accumulated.

    For members the factor may be one for all, or one each.
    """
    groups = optimizer.param_groups
    if not isinstance(groups[0]["table_lr"], tuple):
        assert not isinstance(factor, Sequence), "one model has one factor"
        for group in groups:
            group["lr"] = group["table_lr"] * factor
        return
    members = len(groups[0]["table_lr"])
    factors = factor if isinstance(factor, Sequence) else [factor] * members
    if isinstance(optimizer, MemberAdamW) and optimizer.vectors:
        optimizer.load(factors)
        return
    for group in groups:
        group["lr"] = tuple(lr * f for lr, f in zip(group["table_lr"], factors, strict=True))


def effective_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate that each parameter has at this moment, by name (one model)."""
    groups = optimizer.param_groups
    return {name: group["lr"] for group in groups for name in group["names"]}


def assert_rates(
    model: GPT, optimizer: torch.optim.Optimizer, table: ParamTable, factor: float
) -> None:
    """Our promise: each parameter of ``model`` is stepped once, at ``factor`` × the table's rate.

    Whatever replaces parameters behind an optimizer's back, or rates, breaks µP without a word.
    """
    groups = optimizer.param_groups
    stepped = [pair for g in groups for pair in zip(g["names"], map(id, g["params"]), strict=True)]
    present = [(name, id(p)) for name, p in model.named_parameters()]
    assert sorted(stepped) == sorted(present), "the optimizer's parameters are not the model's"
    for name, lr in effective_lrs(optimizer).items():
        expected = table.rows[name].lr * factor
        assert lr == expected, f"lr of {name} is {lr}, the table says {expected}"


@torch.no_grad()
def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """Scale each member's gradient to at most ``max_norm``; returns the norms before, (*K).

    As ``torch.nn.utils.clip_grad_norm_``, per member; 0 measures without clipping. Clipping breaks
    abc-equivalence (a gradient's size depends on the representation), so rules are compared in one
    representation.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if model.members is None:
        norm = global_norm(grads)
    else:
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]
        norm = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # To ask a GPU would hold it up.
    by_members = model.members is not None
    if max_norm and ((norm.is_cuda and by_members) or bool((coefficient != 1.0).any())):
        if not by_members:
            torch._foreach_mul_([local(g) for g in grads], coefficient)
        else:
            for g in grads:
                g.mul_(_beside(coefficient, g))
    return norm
