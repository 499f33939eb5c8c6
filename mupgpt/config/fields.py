"""What a field of a config says beside its type: what it decides, and between which bounds it lies.

``result``     the numbers of a run: its weights, step by step
``measure``    how its losses are measured: losses that are compared must share it
``execution``  how the same steps are carried out; a result changes by rounding at most
``record``     what is written down on the way
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Literal

from mupgpt.errors import require

__all__ = [
    "BATCH",
    "CONTEXT",
    "LAYERS",
    "MOST",
    "SEED",
    "STEPS",
    "TOKENS",
    "VOCABULARY",
    "WIDTH",
    "Decides",
    "check",
    "decided",
    "decides",
    "differing",
]

Decides = Literal["result", "measure", "execution", "record"]

# Each lies far above anything that was ever trained, and low enough that what enumerates it ends.
LAYERS = 10_000  # DeepNet has 1,000 (arXiv 2203.00555)
WIDTH = 10**6  # heads and d_ffn too; GPT-3's d_ffn is 49,152
VOCABULARY = 10**7  # XLM-V has a million (arXiv 2301.10472)
CONTEXT = 10**8  # tokens; Llama 4 Scout reads ten million
BATCH = 10**7  # sequences; the largest batches are some 10⁸ tokens
STEPS = 10**9  # the longest runs take some millions
TOKENS = 10**15  # Llama 3 saw 1.5 · 10¹³
SEED = 2**63 - 1  # an integer of 64 bits
MOST = 1e30  # any other number: beyond it fp32 ends


@dataclass(frozen=True)
class _Bounds:
    """Where a number lies: from ``low`` to ``high``, beyond ``above``, short of ``below``."""

    low: float
    high: float
    above: float
    below: float

    def check(self, name: str, value: float) -> None:
        """Refuse a number outside by the end that it passes, and what is no number (NaN)."""
        if self.low <= value <= self.high and self.above < value < self.below:
            return
        require(value == value, name, value, "be a number")
        require(value > self.above, name, value, f"be > {_plain(self.above)}")
        require(value >= self.low, name, value, f"be >= {_plain(self.low)}")
        require(value < self.below, name, value, f"be < {_plain(self.below)}")
        require(value <= self.high, name, value, f"be <= {_plain(self.high)}")


def _plain(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:g}"


def decides(
    what: Decides,
    low: float = -MOST,
    high: float = MOST,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> dict[str, Any]:
    """The metadata of a field: what it decides, and where its number lies (each of several).

    >>> from dataclasses import field
    >>> @dataclass(frozen=True)
    ... class Bulb:
    ...     watts: float = field(default=5.0, metadata=decides("result", above=0))
    >>> check(fields(Bulb)[0], -1.0, "bulb.watts")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: bulb.watts = -1.0: must be > 0
    """
    return {"decides": what, "bounds": _Bounds(low, high, above, below)}


def check(field: "Field[Any]", value: Any, name: str) -> None:
    """Hold ``value`` against the field's bounds; a text is empty only where it is by default.

    Fields that say nothing are not held against anything. Raises `ConfigError` under ``name``.
    """
    bounds = field.metadata.get("bounds")
    if bounds is None:
        return
    if isinstance(value, tuple | list):
        for i, one in enumerate(value):
            check(field, one, f"{name}[{i}]")
    elif isinstance(value, str):
        require(bool(value.strip()) or field.default == "", name, value, "not be empty")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        bounds.check(name, value)


@cache
def decided(config: type, *kinds: Decides) -> tuple[str, ...]:
    """Dotted names of the fields that decide one of ``kinds``; a nested config's are its own.

    >>> from mupgpt.config.schema import TrainConfig
    >>> decided(TrainConfig, "measure")
    ('data.eval_tokens',)
    """
    names: list[str] = []
    for f in fields(config):
        if is_dataclass(f.type):
            names += [f"{f.name}.{name}" for name in decided(f.type, *kinds)]  # type: ignore[arg-type]
        elif f.metadata["decides"] in kinds:
            names.append(f.name)
    return tuple(names)


def differing(
    a: Any, b: Any, *kinds: Decides, apart: Collection[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Fields that decide one of ``kinds`` and differ: dotted name, value in ``a``, value in ``b``.

    A field in ``apart`` is passed over, with all that is nested in it.

    >>> from mupgpt.config.schema import Schedule
    >>> list(differing(Schedule(), Schedule(end=0.0, warmup=0.2), "result", apart=["warmup"]))
    [('end', 0.1, 0.0)]
    """
    for name in decided(type(a), *kinds):
        parts = name.split(".")
        if not any(".".join(parts[: i + 1]) in apart for i in range(len(parts))):
            there, here = attrgetter(name)(a), attrgetter(name)(b)
            if there != here:
                yield name, there, here
