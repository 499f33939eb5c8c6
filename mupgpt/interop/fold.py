"""Forward multipliers moved into the weights: a table for modules that multiply by nothing.

A weight W that the forward multiplies by a factor a trains the same as a weight a·W that it does
not multiply, if what the optimizer does to it moves along (abc-symmetry: Yang & Hu 2020, arXiv
2011.14522; for Adam with ε and λ, see `STEP`). A module needs no editing, hook or wrapper then, and
its ``state_dict`` is an ordinary one. Clipping by a global norm is the exception: the gradient of
a·W is smaller by a.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from mupgpt.errors import ConfigError, require
from mupgpt.parametrization.table import Multiplier, ParamRow, ParamTable
from mupgpt.parametrization.words import Optimizer

__all__ = ["CONSTANTS", "Load", "factors", "fold"]

Load = Mapping[str, int]
"""Point of the forward → the power of its multiplier that a parameter carries."""

STEP: Mapping[Optimizer, int] = {"adamw": 1, "lion": 1, "muon": 1, "sgd": 2}
"""The power of a in the learning rate: 1 where a step does not see the gradient's size, which is
that of W's over a. Weight decay goes by the inverse (lr·λ stays), and Adam's ε by 1/a."""

REMEDY = {
    "emb": 'declare what embeds: roles={"wte": "input"}',
    "attn": "keep d_head and attn_mult = 1, or declare the modules that make queries, and them "
    'alone: roles={"*.q_proj": "query"}',
    "residual.attn": "declare the modules that write into the residual stream: "
    'roles={"*.o_proj": "residual_out", "*.down_proj": "residual_out"}',
    "readout": 'declare the readout: roles={"head": "output"}; of a tied one, the norm with a gain '
    'in front of it: roles={"ln_f": "final_norm"}',
}
REMEDY["residual.mlp"] = REMEDY["residual.attn"]


def fold(table: ParamTable, loads: Mapping[str, Load]) -> ParamTable:
    """The table with every multiplier at 1: carried by the parameters that ``loads`` names.

    A multiplier that is not 1 and that nothing carries is a `ConfigError`.

    >>> from mupgpt.parametrization.table import Multiplier, ParamRow, ParamTable
    >>> row = ParamRow(name="head.weight", site="head.weight", role="output", residual_out=False,
    ...                shape=(9, 64), optimizer="adamw", init="normal", init_std=0.08, lr=1e-2,
    ...                weight_decay=0.1, eps=1e-9, why="eps ÷4 (m_d)")
    >>> table = ParamTable(rule="mup", betas=(0.9, 0.95), params=(row,),
    ...                    multipliers={"readout": Multiplier(0.25, "output_mult ÷4 (m_d)")})
    >>> row = fold(table, {"head.weight": {"readout": 1}}).params[0]
    >>> row.init_std, row.lr, row.weight_decay, row.eps
    (0.02, 0.0025, 0.4, 4e-09)
    """
    carried = {point for load in loads.values() for point in load}
    for point, m in table.multipliers.items():
        if m.value != 1.0 and point not in carried:
            what = f"{point} = {m.value:.4g} ({m.why}): no parameter is known to carry it"
            raise ConfigError(f"{what}; {REMEDY[point]}")
        require(m.value > 0, point, m.value, "be > 0 to be carried by weights")
    by_name = factors(table, loads)
    return replace(
        table,
        params=tuple(_row(row, by_name[row.name], loads[row.name]) for row in table.params),
        multipliers={
            point: Multiplier(1.0, f"{m.why} = {m.value:.4g}, in the weights")
            if m.value != 1.0
            else m
            for point, m in table.multipliers.items()
        },
    )


def factors(table: ParamTable, loads: Mapping[str, Load]) -> dict[str, float]:
    """Name → the product of the multipliers that the parameter carries."""
    values = {point: m.value for point, m in table.multipliers.items()}
    return {
        name: math.prod(values[point] ** power for point, power in load.items())
        for name, load in loads.items()
    }


def _row(row: ParamRow, a: float, load: Load) -> ParamRow:
    if a == 1.0:
        return row
    rate = a ** STEP[row.optimizer]
    return replace(
        row,
        init=repr(a) if row.init == "ones" else row.init,
        init_std=row.init_std * a,
        lr=row.lr * rate,
        weight_decay=row.weight_decay / rate,
        eps=row.eps / a,
        why=f"{row.why}; ×{a:.4g} carried ({', '.join(load)})",
    )


CONSTANTS = {"zeros": 0.0, "ones": 1.0}
"""Constant starts that a table has names for; another one stands there in figures."""
