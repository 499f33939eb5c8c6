"""Laws for models trained past their optimum, and from loss to downstream error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.scaling.resample import (
    LEVEL,
    Draws,
    Interval,
    fit_curve,
    intervals_of,
    unidentified,
    vanished,
)
from mupgpt.scaling.robust import separable_start
from mupgpt.scaling.runs import (
    FloatArray,
    Runs,
    as_columns,
    need_distinct,
    need_runs,
)

__all__ = ["DownstreamFit", "OvertrainingFit", "fit_downstream", "fit_overtraining"]


@dataclass(frozen=True, eq=False)
class OvertrainingFit:
    """L(C, M) = E + (a·M^η + b·M^−η)·C^−η, with intervals and residuals ln L_fit − ln L."""

    E: float
    a: float
    b: float
    eta: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    notes: tuple[str, ...]
    draws: Draws = field(repr=False)

    def predict(self, flops: ArrayLike, tokens_per_param: ArrayLike) -> FloatArray:
        """Return the loss at C = 6ND training FLOPs and M = D/N tokens per parameter."""
        c, m = np.asarray(flops, float), np.asarray(tokens_per_param, float)
        return self.E + (self.a * m**self.eta + self.b * m**-self.eta) * c**-self.eta

    def predict_interval(
        self, flops: float, tokens_per_param: float, level: float = LEVEL
    ) -> Interval:
        """Return the interval for the loss of one new run."""
        x, y = np.log(np.array([flops, tokens_per_param]))
        low, high = self.draws.interval(lambda theta: float(_log_loss(x, y, theta)[0]), level)
        return Interval(math.exp(low), math.exp(high))


def fit_overtraining(
    runs: Runs, *, draws: int = 400, seed: int = 0, level: float = LEVEL
) -> OvertrainingFit:
    """Return L = E + (a·M^η + b·M^−η)·C^−η fitted to runs (Gadre et al., arXiv 2403.08540).

    M = D/N is tokens per parameter and C = 6ND: this is Chinchilla's law with one exponent 2η for
    both terms, so four small runs at one M and one cheap run at a larger M already fix it.
    Least squares on ln L.

    Raises ValueError for fewer than 5 runs, fewer than 3 budgets or one M only.

    >>> n, d = np.array([1e8, 2e8, 4e8, 8e8, 1e8]), np.array([2e9, 4e9, 8e9, 16e9, 32e9])
    >>> fit = fit_overtraining(Runs(n_params=n, tokens=d, loss=1.8 + 400 / n**0.3 + 600 / d**0.3))
    >>> round(2 * fit.eta, 4), round(fit.E, 4)
    (0.3, 1.8)
    """
    n_params, tokens = runs.column("n_params"), runs.column("tokens")
    law = "the over-training law"
    need_runs("loss", runs.loss, 5, law)
    need_distinct("tokens_per_param", tokens / n_params, 2, law)
    need_distinct("flops", 6 * n_params * tokens, 3, law)
    x, y, z = np.log(6 * n_params * tokens), np.log(tokens / n_params), np.log(runs.loss)

    def basis(eta: float) -> FloatArray:
        return np.column_stack([np.ones_like(x), np.exp(eta * (y - x)), np.exp(-eta * (y + x))])

    eta, coef = separable_start(basis, np.arange(0.05, 0.5, 0.01), runs.loss)
    floor = 1e-2 * runs.loss.min() / basis(eta).max(axis=0)
    start = np.append(np.log(np.maximum(coef, floor)), eta)
    curve = fit_curve(partial(_log_loss, x, y), z, start, draws=draws, seed=seed)
    e, a, b, eta = _parameters(curve.theta[None])[0].tolist()
    intervals = intervals_of(("E", "a", "b", "eta"), _parameters(curve.draws.params), level)
    notes = unidentified({"E": e, "eta": eta}, intervals) + vanished("E", e, runs.loss)
    return OvertrainingFit(e, a, b, eta, intervals, curve.residuals, notes, curve.draws)


def _log_loss(x: FloatArray, y: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ln L and its Jacobian for x = ln C, y = ln M and θ = (ln E, ln a, ln b, η)."""
    e, a, b, eta = theta
    short, long = a + eta * (y - x), b - eta * (y + x)
    logs = np.logaddexp(e, np.logaddexp(short, long))
    one, two = np.exp(short - logs), np.exp(long - logs)
    return logs, np.stack([np.exp(e - logs), one, two, one * (y - x) - two * (y + x)], axis=-1)


def _parameters(thetas: FloatArray) -> FloatArray:
    return np.column_stack([np.exp(np.clip(thetas[:, :3], -700, 700)), thetas[:, 3]])


@dataclass(frozen=True, eq=False)
class DownstreamFit:
    """Err(L) = ε − k·e^(−γL), with intervals and residuals Err_fit − Err."""

    epsilon: float
    k: float
    gamma: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    notes: tuple[str, ...]
    draws: Draws = field(repr=False)

    def predict(self, loss: ArrayLike) -> FloatArray:
        """Return the error expected at each loss."""
        return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss, float))

    def predict_interval(self, loss: float, level: float = LEVEL) -> Interval:
        """Return the interval for the error of one new model at this loss."""
        x = np.array(loss)
        return self.draws.interval(lambda theta: float(_error(x, theta)[0]), level)


def fit_downstream(
    loss: ArrayLike,
    error: ArrayLike,
    *,
    draws: int = 400,
    seed: int = 0,
    level: float = LEVEL,
) -> DownstreamFit:
    """Return the average downstream error as a function of loss: Err = ε − k·e^(−γL).

    Gadre et al., arXiv 2403.08540. `error` is a fraction (1 − accuracy), averaged over
    tasks: single tasks are too noisy to follow it. Least squares on the error.

    Raises ValueError for fewer than 4 models or an error above 1.

    >>> loss = np.array([2.6, 2.3, 2.0, 1.8, 1.6])
    >>> fit = fit_downstream(loss, 0.9 - 2.0 * np.exp(-1.1 * loss), draws=20)
    >>> round(fit.epsilon, 4), round(fit.k, 4), round(fit.gamma, 4)
    (0.9, 2.0, 1.1)
    """
    x, y = as_columns(loss=loss, error=error).values()
    need_runs("loss", x, 4, "the downstream law")
    need_distinct("loss", x, 3, "the downstream law")
    if y.max() > 1:
        raise ValueError(f"error has {y.max():g}: give fractions, 1 − accuracy, not percent")

    def basis(gamma: float) -> FloatArray:
        return np.column_stack([np.ones_like(x), -np.exp(-gamma * x)])

    gamma, coef = separable_start(basis, np.geomspace(0.05, 10, 60), y)
    start = np.array([coef[0], math.log(max(coef[1], 1e-6)), gamma])
    curve = fit_curve(partial(_error, x), y, start, draws=draws, seed=seed)
    thetas = np.vstack([curve.theta, curve.draws.params])
    rows = np.column_stack([thetas[:, 0], np.exp(np.minimum(thetas[:, 1], 700)), thetas[:, 2]])
    epsilon, k, gamma = rows[0].tolist()
    intervals = intervals_of(("epsilon", "k", "gamma"), rows[1:], level)
    notes = unidentified({"epsilon": epsilon, "gamma": gamma}, intervals)
    return DownstreamFit(epsilon, k, gamma, intervals, curve.residuals, notes, curve.draws)


def _error(x: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Err and its Jacobian for θ = (ε, ln k, γ)."""
    fall = np.exp(np.clip(theta[1] - theta[2] * x, -700, 700))
    return theta[0] - fall, np.stack([np.ones_like(x), -fall, fall * x], axis=-1)
