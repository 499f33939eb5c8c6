"""Robust least squares: a Huber loss on logarithms, minimised by L-BFGS from many starts."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from mupgpt.scaling.runs import FloatArray

__all__ = ["Model", "huber_sum", "minimize_huber", "separable_start"]

DELTA = 1e-3
# Parameters (p,) to values (n,) and their Jacobian (n, p).
Model = Callable[[FloatArray], tuple[FloatArray, FloatArray]]


def huber_sum(residuals: ArrayLike, delta: float = DELTA) -> float:
    """Return Σ of r²/2 where |r| ≤ δ and of δ(|r| − δ/2) beyond (Huber 1964).

    >>> huber_sum([0.5, 3.0], delta=1.0)
    2.625
    """
    size = np.abs(np.asarray(residuals, float))
    inside = np.minimum(size, delta)
    return float(np.sum(inside * (size - inside / 2)))


def minimize_huber(
    model: Model, starts: Iterable[FloatArray], delta: float = DELTA
) -> tuple[FloatArray, float]:
    """Return the parameters with the smallest Huber sum reached from `starts`, and that sum.

    `model` maps parameters (p,) to residuals (n,) and their Jacobian (n, p). The terms are summed,
    and divided by δ² while minimising: L-BFGS stops on an absolute change of the objective, and
    on the mean of numbers near 1e-6 it stops early (which is how arXiv 2404.10102 explains
    Chinchilla's own estimates).
    """

    def objective(params: FloatArray) -> tuple[float, FloatArray]:
        residuals, jacobian = model(params)
        size = np.abs(residuals)
        inside = np.minimum(size, delta)
        slope = np.clip(residuals, -delta, delta)
        return float(inside @ (size - inside / 2)) / delta**2, slope @ jacobian / delta**2

    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6}
    ends = [minimize(objective, x0, jac=True, method="L-BFGS-B", options=options) for x0 in starts]
    best = min(ends, key=lambda end: end.fun)
    return best.x, float(best.fun) * delta**2


def separable_start(
    basis: Callable[[float], FloatArray], grid: Iterable[float], target: FloatArray
) -> tuple[float, FloatArray]:
    """Return the grid's best nonlinear parameter and the linear coefficients that go with it.

    `basis` maps the one nonlinear parameter to the columns (n, k) whose combination should equal
    `target`: given that parameter the rest is linear least squares, so no starting guess is needed.
    """

    def attempt(theta: float) -> tuple[float, float, FloatArray]:
        columns = basis(theta)
        coef: FloatArray = np.linalg.lstsq(columns, target, rcond=None)[0].astype(np.float64)
        miss = target - columns @ coef
        return float(miss @ miss), theta, coef

    _, theta, coef = min((attempt(float(theta)) for theta in grid), key=lambda end: end[0])
    return theta, coef
