"""A table holds for one shape: the table of another model is refused before it does anything.

A proxy's table on its target is the classic mistake of a transfer: all names agree, and the model
trains with the proxy's learning rates.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from mupgpt.errors import ConfigError
from mupgpt.parametrization.table import ParamTable

__all__ = ["require_own_table"]

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter → its shape."""


def require_own_table(model: nn.Module, tables: ParamTable | Sequence[ParamTable]) -> None:
    """Raise `ConfigError` unless each of ``tables`` has a row for every parameter, of its shape.

    Members are models of one shape: their leading axis is left out. A sharded parameter has the
    shape of the whole.

    >>> from mupgpt.parametrization.table import parametrize
    >>> from mupgpt.resolve import train_config
    >>> c = train_config({"model": "proxy-64"})
    >>> require_own_table(nn.Linear(2, 3), parametrize(c.model, c.base, c.hparams, c.rule))
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: the table is of another model: 'weight' is only in the model
    """
    # An adopted module has no members, whatever it may call by that name.
    leading = int(isinstance(getattr(model, "members", None), int))
    shapes = {name: tuple(p.shape)[leading:] for name, p in model.named_parameters()}
    for table in [tables] if isinstance(tables, ParamTable) else tables:
        rows = {row.name: row.shape for row in table.params}
        if rows != shapes:
            raise ConfigError(f"the table is of another model: {_first_difference(shapes, rows)}")


def _first_difference(model: Shapes, table: Shapes) -> str:
    for name in (*model, *table):
        if name not in model or name not in table:
            return f"{name!r} is only in the {'model' if name in model else 'table'}"
        if model[name] != table[name]:
            here, there = ("×".join(map(str, shapes[name])) for shapes in (model, table))
            return f"{name!r} is {here} in the model and {there} in the table"
    raise AssertionError("they are alike")
