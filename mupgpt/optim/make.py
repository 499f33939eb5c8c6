"""The optimizer that a table asks for, for one model or for members."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mupgpt.errors import ConfigError, unknown
from mupgpt.optim.groups import param_groups
from mupgpt.optim.lean import LeanAdamW
from mupgpt.optim.members import MemberAdamW, PerMember
from mupgpt.optim.solo import OPTIMIZERS, MakeOptimizer, one_model
from mupgpt.parametrization.table import ParamTable
from mupgpt.planning.memory import SCHEMES

__all__ = ["MakeOptimizer", "all_adamw", "make_optimizer"]


def make_optimizer(
    model: nn.Module,
    tables: ParamTable | Sequence[ParamTable],
    memory: str = "exact",
    seed: int = 0,
    backend: str | None = None,
    optimizers: Mapping[str, MakeOptimizer] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the rule of the table names, over the table's groups.

    For one model it is torch's own (and our `Lion`), `Joint` where a rule takes two; for members
    `MemberAdamW`, or `PerMember` where any of them takes another one. A sixteen-bit ``memory``
    (see `SCHEMES`) takes `LeanAdamW`, for one model and rules of AdamW alone; ``seed`` keys its
    rounding and ``backend`` compiles its update.

    ``optimizers`` are your own in the place of ours: kind of the table's rows → what makes an
    optimizer of such groups (see `param_groups`), for one model. A rule's exponents hold for the
    kind that it names, so yours must take steps whose size scales as that kind's.

    >>> from mupgpt.config.schema import Base, GPTConfig, HParams
    >>> from mupgpt.model.gpt import GPT
    >>> from mupgpt.parametrization.table import parametrize
    >>> shape = GPTConfig(n_layer=1, d_model=8, n_head=1, vocab_size=9, seq_len=8)
    >>> table = parametrize(shape, Base.of(shape), HParams(), "mup")
    >>> type(make_optimizer(GPT(shape), table)).__name__
    'AdamW'
    >>> type(make_optimizer(GPT(shape), table, optimizers={"adamw": torch.optim.RAdam})).__name__
    'RAdam'

    Raises `ConfigError` for a kind that no row names, or sixteen bits where they are unknown.
    """
    members = getattr(model, "members", None)  # an adopted module has no such axis
    if not isinstance(members, int):
        assert isinstance(tables, ParamTable), "one model has one table"
        optimizer = _of_one(param_groups(model, tables), memory, seed, backend, optimizers or {})
        optimizer.defaults["lr"] = tables.lr  # other libraries' schedulers take it as the rate
        return optimizer
    assert memory == "exact", "members have fp32 state"
    tables = [tables] * members if isinstance(tables, ParamTable) else tables
    if all_adamw(tables) and not optimizers:
        return MemberAdamW(param_groups(model, tables))
    groups = param_groups(model, tables, merge=False)
    return PerMember(groups, _rows(groups, optimizers or {}))


def all_adamw(tables: Sequence[ParamTable]) -> bool:
    """Whether nothing in these tables takes another optimizer than AdamW."""
    return all(row.optimizer == "adamw" for table in tables for row in table.rows.values())


def _of_one(
    groups: list[dict[str, Any]],
    memory: str,
    seed: int,
    backend: str | None,
    own: Mapping[str, MakeOptimizer],
) -> torch.optim.Optimizer:
    if memory == "exact":
        return one_model(groups, _rows(groups, own))
    others = [*own, *sorted({group["optimizer"] for group in groups} - {"adamw"})]
    if others:
        whose = "optimizers names another" if own else "the rule asks for"
        raise ConfigError(
            f"memory = {memory!r}: sixteen-bit weights are stepped by AdamW, and {whose} "
            f"{others[0]}; use memory = 'exact'" + ("" if own else " or a rule of AdamW")
        )
    remainder = SCHEMES[memory].remainder > 0
    return LeanAdamW(groups, remainder=remainder, seed=seed, backend=backend)


def _rows(
    groups: list[dict[str, Any]], own: Mapping[str, MakeOptimizer]
) -> Mapping[str, MakeOptimizer]:
    """Ours, with ``own`` in their places."""
    named = {kind for group in groups for kind in _kinds(group["optimizer"])}
    for kind in own:
        if kind not in named:
            raise unknown("optimizer", kind, named)
    return {**OPTIMIZERS, **own}


def _kinds(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
