"""Seeded resampling: how sure a fit is of its parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from mupgpt.scaling.robust import Model
from mupgpt.scaling.runs import FloatArray, IntArray

__all__ = [
    "LEVEL",
    "Draws",
    "Interval",
    "fit_curve",
    "intervals_of",
    "pairs_bootstrap",
    "percentile_interval",
    "unidentified",
    "vanished",
]

LEVEL = 0.95
# A term that vanishes has no slope left, and Levenberg–Marquardt would step to infinity: each
# parameter is held to its start by a spring far too weak to move one that the data hold.
HAIR = 1e-7


class Interval(NamedTuple):
    """A confidence interval, its two ends included.

    >>> Interval(0.3, 0.4).covers(0.34)
    True
    """

    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Return whether `value` lies inside."""
        return self.low <= value <= self.high


def percentile_interval(draws: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the central interval that holds `level` of the draws.

    >>> percentile_interval(range(101), 0.5)
    Interval(low=25.0, high=75.0)
    """
    low, high = np.quantile(np.asarray(draws, float), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def intervals_of(names: Sequence[str], draws: FloatArray, level: float) -> dict[str, Interval]:
    """Return one interval per named column of `draws` (draws, parameters)."""
    return {n: percentile_interval(c, level) for n, c in zip(names, draws.T, strict=True)}


def pairs_bootstrap(
    refit: Callable[[IntArray], FloatArray], groups: ArrayLike, *, draws: int, seed: int
) -> FloatArray:
    """Return `refit` of each resample, (draws, parameters): whole groups drawn with replacement.

    Rows of one group (one size, one block of a curve) share their error, so they come and go
    together; `np.arange(n)` as groups is the plain bootstrap over runs.
    """
    rng = np.random.default_rng(seed)
    _, label = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(label == k) for k in range(label.max() + 1)]
    picks = rng.integers(len(members), size=(draws, len(members)))
    return np.array([refit(np.concatenate([members[k] for k in pick])) for pick in picks])


class Draws(NamedTuple):
    """Resampled parameters (draws, parameters) and, for each, the error of one new point."""

    params: FloatArray
    noise: FloatArray

    def interval(self, model: Callable[[FloatArray], float], level: float) -> Interval:
        """Return the interval for one new measurement of `model(parameters)`."""
        values = np.array([model(row) for row in self.params])
        return percentile_interval(values + self.noise, level)


def t_bootstrap(
    refit: Callable[[FloatArray], FloatArray],
    fitted: FloatArray,
    scale: FloatArray,
    rng: np.random.Generator,
) -> Draws:
    """Return refits to `fitted` plus normal noise of standard deviations ``scale``, (draws,).

    For a linear model and the scales of `t_scales` this gives Student's t interval exactly, where
    resampling five or six points with replacement would give one much too narrow (and often no fit
    at all).
    """
    noise = scale[:, None] * rng.standard_normal((len(scale), len(fitted) + 1))
    return Draws(np.array([refit(fitted + row[:-1]) for row in noise]), noise[:, -1])


def t_scales(
    residuals: FloatArray, n_params: int, draws: int, rng: np.random.Generator
) -> FloatArray:
    """The noise's own scale, drawn anew each time, (draws,).

    With s the residual standard error on ν degrees of freedom, a draw is s·√(ν/χ²_ν). Raises
    ValueError where no residual is left.
    """
    dof = len(residuals) - n_params
    if dof < 1:
        raise ValueError(
            f"{len(residuals)} runs for {n_params} parameters: no residual is left to "
            f"make an interval from; give at least {n_params + 1} runs"
        )
    return math.sqrt(float(residuals @ residuals) / dof) * np.sqrt(dof / rng.chisquare(dof, draws))


class CurveFit(NamedTuple):
    """Least-squares parameters of a curve, its residuals (fit − target), and its draws."""

    theta: FloatArray
    residuals: FloatArray
    draws: Draws


def fit_curve(
    model: Model,
    target: FloatArray,
    start: FloatArray,
    *,
    draws: int,
    seed: int,
) -> CurveFit:
    """Return the parameters that bring the model's values closest to `target`, and draws of them.

    `model` maps parameters (p,) to values (n,) and their Jacobian (n, p). Levenberg–Marquardt from
    `start`, for each draw of the t bootstrap too: from a best fit that has let a term vanish
    no draw would find back.
    """

    def solve(goal: FloatArray) -> FloatArray:
        return least_squares(
            lambda theta: np.append(model(theta)[0] - goal, HAIR * (theta - start)),
            start,
            jac=lambda theta: np.vstack([model(theta)[1], HAIR * np.eye(len(start))]),
            method="lm",
        ).x

    theta = solve(target)
    fitted = model(theta)[0]
    residuals = fitted - target
    rng = np.random.default_rng(seed)
    scale = t_scales(residuals, len(theta), draws, rng)
    sample = t_bootstrap(solve, fitted, scale, rng)
    return CurveFit(theta, residuals, sample)


def unidentified(values: Mapping[str, float], intervals: Mapping[str, Interval]) -> tuple[str, ...]:
    """Return a sentence for each parameter whose interval is wider than the value itself.

    >>> unidentified({"beta": 0.3}, {"beta": Interval(-0.1, 1.2)})
    ('beta is not identified: 0.3 with an interval of [-0.1, 1.2]',)
    """
    return tuple(
        f"{name} is not identified: {value:.3g} with an interval of "
        f"[{intervals[name].low:.3g}, {intervals[name].high:.3g}]"
        for name, value in values.items()
        if not intervals[name].high - intervals[name].low < abs(value)
    )


def vanished(name: str, value: float, loss: FloatArray) -> tuple[str, ...]:
    """Return a sentence when the irreducible term of a law was fitted away."""
    if value > 1e-3 * loss.min():
        return ()
    return (f"the fit takes {name} to zero: the losses do not level off within these runs",)
