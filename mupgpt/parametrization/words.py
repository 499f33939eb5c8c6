"""The words that a rule is written in: roles, points of the forward, quantities, optimizers."""

from collections.abc import Mapping
from typing import Literal, get_args

__all__ = [
    "MODEL_QUANTITIES",
    "OPTIMIZERS",
    "POINTS",
    "QUANTITIES",
    "ROLES",
    "Optimizer",
    "Point",
    "Power",
    "Quantity",
    "Role",
]

Role = Literal["input", "hidden", "output", "bias", "norm"]
"""What a parameter does to width."""
Point = Literal["emb", "attn", "residual.attn", "residual.mlp", "readout"]
"""A named factor of the forward."""
ModelQuantity = Literal["m_d", "m_L", "m_dh", "d_head", "2L"]
"""What a power may be of anywhere: it is the whole model's."""
Quantity = Literal["m_in", "m_out", "m_rho", ModelQuantity]
"""The first three are a parameter's own: a factor of the forward has none of them."""
Optimizer = Literal["adamw", "sgd", "lion", "muon"]
"""What turns gradients into steps."""
Power = Mapping[Quantity, float]
"""Quantity → exponent: the product of all quantities, each to its exponent."""

ROLES: tuple[Role, ...] = get_args(Role)
POINTS: tuple[Point, ...] = get_args(Point)
MODEL_QUANTITIES: tuple[ModelQuantity, ...] = get_args(ModelQuantity)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
