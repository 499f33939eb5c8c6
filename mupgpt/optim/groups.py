"""A table's rows as parameter groups; of members every value is a tuple, one a member."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mupgpt.model.own_table import require_own_table
from mupgpt.model.shards import mesh_of
from mupgpt.parametrization.table import ParamRow, ParamTable

__all__ = ["beside", "keep_members", "of_member", "param_groups"]

FROM_ROWS = ("optimizer", "lr", "weight_decay", "eps")
VALUES = (*FROM_ROWS, "table_lr", "betas")
"""What a group says beside its parameters and their names."""


def param_groups(
    model: nn.Module, tables: ParamTable | Sequence[ParamTable], merge: bool = True
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``: parameters whose rows agree in lr, weight decay and ε.

    Each group carries ``names``, its ``optimizer`` (under most rules ``adamw``), and ``table_lr``,
    from which `set_lr` derives ``lr`` every step. With a list of tables (one per member) all values
    are tuples. With ``merge=False`` each parameter has a group of its own.

    Give an optimizer of your own the base's rate too, ``SomeOptimizer(groups, lr=table.lr)``: other
    libraries' schedulers read ``optimizer.defaults["lr"]``.

    Raises `ConfigError` for the table of another shape.

    >>> from mupgpt.config.schema import Base, GPTConfig, HParams
    >>> from mupgpt.model.gpt import GPT
    >>> from mupgpt.parametrization.table import parametrize
    >>> shape = GPTConfig(n_layer=1, d_model=64, n_head=2, vocab_size=9, seq_len=8)
    >>> table = parametrize(shape, Base.of(shape.widen(32)), HParams(lr=0.01), "mup")
    >>> groups = param_groups(GPT(shape), table)
    >>> sorted({(group["lr"], group["weight_decay"]) for group in groups})
    [(0.005, 0.2), (0.01, 0.0), (0.01, 0.1)]
    """
    solo = isinstance(tables, ParamTable)
    by_member = [tables] if isinstance(tables, ParamTable) else list(tables)
    require_own_table(model, by_member)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        rows = [table.rows[name] for table in by_member]
        values = {key: _values(rows, key, solo) for key in FROM_ROWS}
        # Fused updates want tensors of one mesh.
        key = (*values.values(), mesh_of(p)) if merge else (name,)
        group = groups.setdefault(key, {"params": [], "names": [], **values})
        group["params"].append(p)
        group["names"].append(name)
    betas = tuple(table.betas for table in by_member)
    for group in groups.values():
        group["table_lr"] = group["lr"]
        group["betas"] = betas[0] if solo else betas
    return list(groups.values())


def _values(rows: Sequence[ParamRow], key: str, solo: bool) -> Any:
    values = tuple(getattr(row, key) for row in rows)
    return values[0] if solo else values


def of_member(group: dict[str, Any], k: int) -> dict[str, Any]:
    """The values of member ``k`` in a group of members, as one model's group has them."""
    return {key: group[key][k] for key in VALUES}


def keep_members(groups: list[dict[str, Any]], members: Sequence[int]) -> None:
    """Forget the values of all other members, in place."""
    for group in groups:
        for key in VALUES:
            group[key] = tuple(group[key][k] for k in members)


def beside(vector: Tensor, p: Tensor) -> Tensor:
    """A value a member, (K), in as many dimensions as ``p`` (K, …) has."""
    return vector.view(-1, *[1] * (p.dim() - 1))
