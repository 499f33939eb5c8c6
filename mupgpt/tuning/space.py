"""Search spaces: dimensions by dotted config key, suggested through Optuna's own trial."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from mupgpt.config.fields import decides
from mupgpt.config.plain import settle
from mupgpt.errors import ConfigError

__all__ = ["Dimension", "SearchSpace"]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched value: a range (``low``, ``high``) or a list of ``values``."""

    low: float = field(default=0.0, metadata=decides("result"))
    """Lower bound of a range."""
    high: float = field(default=0.0, metadata=decides("result"))
    """Upper bound of a range."""
    log: bool = field(default=False, metadata=decides("result"))
    """Search the logarithm."""
    values: tuple[float, ...] = field(default=(), metadata=decides("result"))
    """The only values, instead of a range."""
    ratio: float = field(default=2.0, metadata=decides("result", above=1))
    """``grid`` on a log range: ratio of neighbours."""
    points: int = field(default=5, metadata=decides("result", 3, 1000))
    """``grid`` on a log range: points to start with, around the run's own value."""
    center: float = field(default=0.0, metadata=decides("result"))
    """What to start around instead, where the run's own value is 0 (no weight decay)."""

    def __post_init__(self) -> None:
        settle(self, "space")
        if not self.values and not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ConfigError(
                f"space: low = {self.low}, high = {self.high}, log = {self.log}: "
                "a range needs low < high (and low > 0 on a log scale), or give values"
            )

    @property
    def distribution(self) -> BaseDistribution:
        """The same as Optuna names it."""
        if self.values:
            return CategoricalDistribution(self.values)
        return FloatDistribution(self.low, self.high, log=self.log)

    def grid(self, center: float) -> list[float]:
        """The points a grid starts with.

        >>> Dimension(low=1e-4, high=1.0, log=True, points=3).grid(0.5)
        [0.25, 0.5, 1.0]
        """
        if self.values:
            return list(self.values)
        if not self.log:
            step = (self.high - self.low) / (self.points - 1)
            return [self.low + i * step for i in range(self.points)]
        half = self.points // 2
        ladder = [center * self.ratio ** (i - half) for i in range(self.points)]
        return [x for x in ladder if self.low <= x <= self.high]

    def at_edge(self, value: float, margin: float = 0.05) -> str:
        """``"low"`` or ``"high"`` when ``value`` is within ``margin`` of that end, else ``""``."""
        if self.values:
            return ""
        f = math.log if self.log else float
        place = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return "low" if place < margin else "high" if place > 1 - margin else ""


@dataclass(frozen=True)
class SearchSpace:
    """Dimensions by dotted key of the config (``hparams.lr``).

    >>> space = SearchSpace({"hparams.lr": Dimension(low=1e-4, high=1e-1, log=True)})
    >>> space(optuna.trial.FixedTrial({"hparams.lr": 0.01}))
    {'hparams.lr': 0.01}
    """

    dimensions: Mapping[str, Dimension]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """For ``study.ask(fixed_distributions=…)``."""
        return {key: d.distribution for key, d in self.dimensions.items()}

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for ``trial``, by key; the form that wandb's sweep scheduler takes too."""
        return {key: _suggest(trial, key, d) for key, d in self.dimensions.items()}

    def size(self, center: Mapping[str, float]) -> int:
        """How many points `grid` has."""
        return math.prod(len(d.grid(center[key])) for key, d in self.dimensions.items())

    def grid(self, center: Mapping[str, float]) -> list[dict[str, float]]:
        """Every combination of the starting points."""
        axes = [d.grid(center[key]) for key, d in self.dimensions.items()]
        return [
            dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*axes)
        ]

    def extension(self, points: Mapping[float, list[float]]) -> list[dict[str, float]]:
        """What a one-dimensional log grid lacks: two points on each side of every seed's lowest.

        ``points`` is value → loss per seed. Stops at the range's bounds.
        """
        (key, d), *others = self.dimensions.items()
        if others or not d.log or d.values or not points:
            return []
        xs = sorted(points)
        seeds = range(len(next(iter(points.values()))))
        lowest = [min(range(len(xs)), key=lambda i: points[xs[i]][s]) for s in seeds]
        below = max(0, 2 - min(lowest))
        above = max(0, 2 - (len(xs) - 1 - max(lowest)))
        new = [xs[0] / d.ratio ** (i + 1) for i in range(below)]
        new += [xs[-1] * d.ratio ** (i + 1) for i in range(above)]
        return [{key: x} for x in new if d.low <= x <= d.high]


def _suggest(trial: optuna.Trial, key: str, d: Dimension) -> float:
    if d.values:
        return trial.suggest_categorical(key, d.values)
    return trial.suggest_float(key, d.low, d.high, log=d.log)
