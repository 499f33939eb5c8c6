"""What each field of a rule may hold, and the checks by which it refuses anything else.

A misspelt word would not fail by itself: a role that no parameter has scales nothing, and a hidden
learning rate would stay what it was at the base.
"""

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.axes import RULE_AXES
from mupgpt.parametrization.words import MODEL_QUANTITIES, OPTIMIZERS, POINTS, QUANTITIES, ROLES

__all__ = ["CHECKS"]

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


_ROLE, _AXIS = one_of("role", ROLES), one_of("axis", RULE_AXES)
_POWER = mapping(one_of("quantity", QUANTITIES), number)
CHECKS: dict[str, Check] = {
    "name": text,
    "source": text,
    "optimizer": one_of("optimizer", OPTIMIZERS),
    **dict.fromkeys(("init_std", "lr", "weight_decay"), mapping(_ROLE, _POWER)),
    **dict.fromkeys(("residual_out_std", "block_lr", "eps", "block_eps"), _POWER),
    "forward": mapping(
        one_of("forward point", POINTS),
        mapping(one_of("quantity of the model", MODEL_QUANTITIES), number),
    ),
    "decayed": each(_ROLE),
    "covers": each(_AXIS),
    "practice": mapping(_AXIS, text),
    **dict.fromkeys(("truncated", "keeps_decay_time"), flag),
}
"""Field of a `Rule` → what it may hold."""
