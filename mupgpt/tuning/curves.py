"""Loss against log2 of one hyperparameter, seed by seed: its optimum, and what missing it costs.

The optimum is the vertex of the parabola through the lowest point and its two neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.interpolate import PchipInterpolator

from mupgpt.errors import ConfigError

__all__ = ["Curve", "half_width", "parabola_optimum", "vertex"]


@dataclass(frozen=True)
class Curve:
    """Loss against log2 of one hyperparameter at one size, one column per seed."""

    log2: np.ndarray
    """(P,), ascending."""
    loss: np.ndarray
    """(P, seeds), nats per token."""

    def inside(self) -> np.ndarray:
        """Whether each seed's lowest point has a neighbour on both sides, (seeds,)."""
        lowest = self.loss.argmin(axis=0)
        return (lowest > 0) & (lowest < len(self.log2) - 1)

    def optima(self) -> np.ndarray:
        """log2 of the best value for each seed, (seeds,)."""
        return np.array([parabola_optimum(self.log2, column) for column in self.loss.T])

    def regret(self, log2: np.ndarray) -> np.ndarray:
        """Relative excess loss at each seed's ``log2`` over its optimum, (seeds,)."""
        columns = zip(self.loss.T, log2, strict=True)
        return np.array([_regret(self.log2, column, x) for column, x in columns])


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[int, np.ndarray]:
    """Index of the lowest inner point, and the parabola through it and its neighbours.

    The parabola comes as (a, b, c) of a x² + b x + c.
    """
    middle = int(np.clip(np.argmin(y), 1, len(x) - 2))
    return middle, np.polyfit(x[middle - 1 : middle + 2], y[middle - 1 : middle + 2], 2)


def parabola_optimum(x: np.ndarray, y: np.ndarray) -> float:
    """Where the parabola through the lowest point and its neighbours is lowest.

    >>> x = np.array([-3.0, -2.0, -1.0, 0.0])
    >>> round(parabola_optimum(x, (x + 1.25) ** 2), 6)
    -1.25
    """
    if len(x) < 3:
        raise ConfigError(f"a curve of {len(x)} points: an optimum needs at least three")
    middle, (a, b, _) = vertex(x, y)
    if a <= 0:  # flat or upside down: no vertex, the lowest point it is
        return float(x[np.argmin(y)])
    return float(np.clip(-b / (2 * a), x[middle - 1], x[middle + 1]))


def _regret(x: np.ndarray, y: np.ndarray, at: float) -> float:
    middle, parabola = vertex(x, y)
    best = np.polyval(parabola, parabola_optimum(x, y))
    near = x[middle - 1] <= at <= x[middle + 1]
    there = np.polyval(parabola, at) if near else PchipInterpolator(x, y)(np.clip(at, x[0], x[-1]))
    return float(there / best - 1.0)


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean of ``values``; infinite for a single one.

    A bootstrap over three seeds covers 74 %, not 95.

    >>> round(half_width([0.1, 0.2, 0.3]), 3)
    0.248
    """
    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
