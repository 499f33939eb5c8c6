"""A table's rows as parameter groups, and the learning rates derived from them at every step."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from mupgpt.model.own_table import require_own_table
from mupgpt.model.shards import mesh_of
from mupgpt.parametrization.table import ParamRow, ParamTable

__all__ = ["VALUES", "param_groups"]


def param_groups(
    model: nn.Module, tables: ParamTable | Sequence[ParamTable], merge: bool = True
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``: parameters whose rows agree in lr, weight decay and ε.

    Each group carries ``names``, its ``optimizer`` (under most rules ``adamw``), and ``table_lr``,
    from which `set_lr` derives ``lr`` every step. With a list of tables (one per member) all values
    are tuples. With ``merge=False`` each parameter has a group of its own. Raises `ConfigError`
    for the table of another shape.
    """
    solo = isinstance(tables, ParamTable)
    columns = [tables] if isinstance(tables, ParamTable) else list(tables)
    require_own_table(model, columns)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in model.named_parameters():
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
