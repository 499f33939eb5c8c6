"""The words that a rule is written in, and the checks by which it refuses any other.

A misspelt word would not fail by itself: a role that no parameter has scales nothing, and a hidden
learning rate would stay what it was at the base.
"""

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any, Literal, get_args

from mupgpt.errors import ConfigError, require, unknown

__all__ = [
    "MODEL_QUANTITIES",
    "OPTIMIZERS",
    "POINTS",
    "QUANTITIES",
    "ROLES",
    "Check",
    "Optimizer",
    "Point",
    "Power",
    "Quantity",
    "Role",
    "each",
    "flag",
    "mapping",
    "number",
    "one_of",
    "text",
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

Check = Callable[[str, Any], None]
"""(where, value) → nothing, or a `ConfigError` that names the place, the value and the remedy."""


def text(where: str, value: Any) -> None:
    """Refuse what is no text, or says nothing."""
    require(isinstance(value, str) and bool(value.strip()), where, value, "be a text, not empty")


def flag(where: str, value: Any) -> None:
    """Refuse what is neither True nor False: the text "no" would count as True."""
    require(isinstance(value, bool), where, value, "be True or False")


def number(where: str, value: Any) -> None:
    """Refuse what is no finite number.

    >>> number("lr.hidden.m_in", "-1")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: lr.hidden.m_in = '-1': must be a finite number
    """
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    require(finite, where, value, "be a finite number")


def one_of(kind: str, known: Collection[str]) -> Check:
    """The check that refuses a word that is not among ``known``, with the nearest one.

    >>> one_of("role", ROLES)("lr", "hidden ")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: lr: unknown role 'hidden '; did you mean 'hidden'?
    """

    def check(where: str, value: Any) -> None:
        if value not in known:
            raise ConfigError(f"{where}: {unknown(kind, str(value), known)}")

    return check


def each(check: Check) -> Check:
    """The check of every element of a tuple; a bare string is none, though it has elements."""

    def check_all(where: str, values: Any) -> None:
        require(isinstance(values, tuple), where, values, 'be a tuple, as in ("hidden",)')
        for value in values:
            check(where, value)

    return check_all


def mapping(key: Check, value: Check) -> Check:
    """The check of every key and every value of a mapping."""

    def check_all(where: str, found: Any) -> None:
        require(isinstance(found, Mapping), where, found, "be a mapping")
        for name, inner in found.items():
            key(where, name)
            value(f"{where}.{name}", inner)

    return check_all
