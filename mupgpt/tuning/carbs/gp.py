"""Exact Gaussian-process regression: a Matérn-5/2 kernel beside a linear one, fitted to the data.

k(x, x′) = s²·(1 + √5 r + 5r²/3)·e^(−√5 r) + l²·(1 + (x − ½)·(x′ − ½)),  r² = Σ_d (x_d − x′_d)²/ℓ_d²

on inputs in the unit cube. The outputs are standardized, and seen through noise of variance n².
Rasmussen & Williams (2006), algorithm 2.1 and equations 5.9; the priors are wide log-normal ones.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

__all__ = ["GP", "Array", "fit_gp"]

Array = NDArray[np.float64]
JITTER = 1e-8  # of the variance, so that two equal points without noise still have an inverse
ENOUGH = 128  # points that fix the kernel's few parameters; all are used to predict


@dataclass(frozen=True, eq=False)
class GP:
    """The posterior of a function after the values ``y`` at the rows of ``x``, (n, d).

    ``theta`` holds the logarithms of s, l, n and of the d length scales; y ≈ mean + scale·f.
    """

    x: Array
    y: Array
    theta: Array
    mean: float
    scale: float

    @cached_property
    def _solved(self) -> tuple[Array, Array]:
        """The Cholesky factor of the kernel with noise, and K⁻¹y."""
        kernel = _kernel(self.x, self.x, self.theta) + _noise(self.theta) * np.eye(len(self.x))
        factor = np.asarray(cholesky(kernel, lower=True))
        return factor, np.asarray(cho_solve((factor, True), (self.y - self.mean) / self.scale))

    def predict(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return the mean and the standard deviation of the function at each row of ``x``."""
        factor, weights = self._solved
        rows = np.atleast_2d(np.asarray(x, float))
        cross = _kernel(rows, self.x, self.theta)
        spread = np.asarray(solve_triangular(factor, cross.T, lower=True))
        signal, linear, _ = np.exp(2 * self.theta[:3])
        own = signal + linear * (1 + np.sum((rows - 0.5) ** 2, axis=1))
        variance = np.maximum(own - np.sum(spread**2, axis=0), 1e-12)
        return self.mean + self.scale * (cross @ weights), self.scale * np.sqrt(variance)

    def given(self, x: ArrayLike) -> "GP":
        """Return the posterior as it would be if the values at ``x`` came out at their mean.

        Means stay, and what is uncertain about these points and their neighbours goes: a stand-in
        for results that are still to come.
        """
        rows = np.asarray(x, float).reshape(-1, self.x.shape[1])
        values = self.predict(rows)[0] if len(rows) else np.empty(0)
        return GP(np.vstack([self.x, rows]), np.append(self.y, values),
                  self.theta, self.mean, self.scale)  # fmt: skip


def fit_gp(x: ArrayLike, y: ArrayLike) -> GP:
    """Return the posterior under the kernel of the highest marginal likelihood times prior.

    >>> x = np.linspace(0, 1, 12)[:, None]
    >>> mean, deviation = fit_gp(x, np.sin(6 * x[:, 0])).predict([[0.4]])
    >>> bool(abs(mean[0] - math.sin(2.4)) < 0.01 and deviation[0] < 0.05)
    True
    """
    rows, values = np.asarray(x, float), np.asarray(y, float)
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    some = np.linspace(0, len(rows) - 1, min(len(rows), ENOUGH)).astype(int)
    prior = np.array([0.0, -1.0, -2.5] + [-0.5] * rows.shape[1])
    width = np.array([0.5, 1.0, 1.0] + [0.8] * rows.shape[1])

    def loss(theta: Array) -> tuple[float, Array]:
        value, slope = _misfit(theta, rows[some], (values[some] - mean) / scale)
        away = (theta - prior) / width
        return value + float(away @ away) / 2, slope + away / width

    bounds = [(m - 4 * w, m + 4 * w) for m, w in zip(prior, width, strict=True)]
    best = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds,
                    options={"maxiter": 60})  # fmt: skip
    return GP(rows, values, best.x, mean, scale)


def _noise(theta: Array) -> float:
    signal, linear, noise = np.exp(2 * theta[:3])
    return float(noise + JITTER * (signal + linear))


def _kernel(a: Array, b: Array, theta: Array) -> Array:
    """(len(a), len(b)), without noise."""
    signal, linear, _ = np.exp(2 * theta[:3])
    length = np.exp(theta[3:])
    near, far = a / length, b / length
    square = np.sum(near**2, 1)[:, None] + np.sum(far**2, 1) - 2 * near @ far.T
    r = np.sqrt(5 * np.maximum(square, 0))
    return signal * (1 + r + r * r / 3) * np.exp(-r) + linear * (1 + (a - 0.5) @ (b - 0.5).T)


def _misfit(theta: Array, x: Array, y: Array) -> tuple[float, Array]:
    """−log p(y | x, θ), and its gradient: ½·tr((K⁻¹ − αα⊤)·∂K/∂θ) with α = K⁻¹y."""
    signal, linear, noise = np.exp(2 * theta[:3])
    apart = (x[:, None, :] - x[None, :, :]) ** 2 / np.exp(2 * theta[3:])  # (n, n, d)
    r = np.sqrt(5 * apart.sum(-1))
    falling = signal * np.exp(-r)
    matern = falling * (1 + r + r * r / 3)
    straight = linear * (1 + (x - 0.5) @ (x - 0.5).T)
    factor = cholesky(matern + straight + _noise(theta) * np.eye(len(x)), lower=True)
    inverse = cho_solve((factor, True), np.eye(len(x)))
    alpha = inverse @ y
    pull = inverse - np.outer(alpha, alpha)
    trace = np.trace(pull)
    slope = np.array([
        np.sum(pull * matern) + JITTER * signal * trace,
        np.sum(pull * straight) + JITTER * linear * trace,
        noise * trace,
        *np.einsum("ij,ijd->d", pull * falling * (1 + r), apart) * (5 / 6),
    ])  # fmt: skip
    value = y @ alpha / 2 + np.log(np.diag(factor)).sum() + len(x) / 2 * math.log(2 * math.pi)
    return float(value), slope
