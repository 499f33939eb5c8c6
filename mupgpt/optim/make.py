"""The optimizer that a table asks for, for one model or for members."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mupgpt.errors import ConfigError
from mupgpt.optim.groups import param_groups
from mupgpt.optim.lean import LeanAdamW
from mupgpt.optim.members import MemberAdamW, PerMember
from mupgpt.optim.solo import one_model
from mupgpt.parametrization.table import ParamTable
from mupgpt.planning.memory import SCHEMES

__all__ = ["all_adamw", "make_optimizer"]


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

    >>> from mupgpt import Base, GPTConfig, HParams, parametrize
    >>> shape = GPTConfig(n_layer=1, d_model=8, d_head=8, vocab_size=9, seq_len=4)
    >>> table = parametrize(shape, Base.of(shape), HParams(), "mup")
    >>> from mupgpt import GPT
    >>> type(make_optimizer(GPT(shape), table)).__name__
    'AdamW'
    """
    members = getattr(model, "members", None)  # an adopted module has no such axis
    if not isinstance(members, int):
        groups = param_groups(model, tables)
        return one_model(groups) if memory == "exact" else _lean(groups, memory, seed, backend)
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
