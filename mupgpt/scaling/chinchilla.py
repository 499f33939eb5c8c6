"""Chinchilla's parametric law (approach 3): loss as a function of parameters and tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.scaling.resample import (
    LEVEL,
    Interval,
    intervals_of,
    pairs_bootstrap,
    percentile_interval,
    unidentified,
)
from mupgpt.scaling.robust import huber_sum, minimize_huber
from mupgpt.scaling.runs import FloatArray, IntArray, Runs, need_distinct, need_runs

__all__ = [
    "HOFFMANN_2022",
    "REPLICATION_2024",
    "ChinchillaFit",
    "ChinchillaLaw",
    "Optimum",
    "fit_chinchilla",
    "synthetic_isoflop",
    "synthetic_runs",
]

LAW = "Chinchilla's law in n_params and tokens"
POLISHED_STARTS = 40


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal run of a budget: training FLOPs, parameters, tokens, loss in nats."""

    flops: float
    n_params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A·N^−α + B·D^−β in nats per token (Hoffmann et al., arXiv 2203.15556).

    >>> round(HOFFMANN_2022.loss(70e9, 1.4e12).item(), 3)
    1.921
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> FloatArray:
        """Return the loss of runs of N parameters on D tokens."""
        n, d = np.asarray(n_params, float), np.asarray(tokens, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(self, flops: float) -> Optimum:
        """Return the N and D of least loss at C = 6ND.

        N* = G·(C/6)^a and D* = (C/6)^b/G with a = β/(α+β), b = α/(α+β), G = (αA/βB)^(1/(α+β))
        (arXiv 2203.15556).

        >>> best = REPLICATION_2024.optimum(5.76e23)
        >>> round(best.n_params / 1e9, 1), round(best.tokens / best.n_params, 1)
        (73.2, 17.9)
        """
        total = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        n_params = g * (flops / 6) ** (self.beta / total)
        tokens = flops / (6 * n_params)
        return Optimum(flops, n_params, tokens, float(self.loss(n_params, tokens)))


# Hoffmann et al.'s estimates before rounding: two digits move their loss by more than the noise.
HOFFMANN_2022 = ChinchillaLaw(
    E=math.exp(0.5267228),
    A=math.exp(6.0073404),
    B=math.exp(6.0179186),
    alpha=0.33917084,
    beta=0.2849083,
)
# The best fit from the grid of arXiv 2404.10102 on 240 of Hoffmann et al.'s runs.
REPLICATION_2024 = ChinchillaLaw(E=1.81724, A=477.84, B=2143.86, alpha=0.34731, beta=0.36718)


@dataclass(frozen=True, eq=False)
class ChinchillaFit:
    """A fitted law, with bootstrap intervals of E, A, B, alpha, beta and of both optimal exponents.

    `residuals` are ln L_fit − ln L of each run, `objective` their Huber sum (δ = 1e-3), `draws`
    the law refitted to each resample.
    """

    law: ChinchillaLaw
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    objective: float
    notes: tuple[str, ...]
    draws: tuple[ChinchillaLaw, ...] = field(repr=False)

    def predict(self, n_params: ArrayLike, tokens: ArrayLike) -> FloatArray:
        """Return the loss expected of runs of N parameters on D tokens."""
        return self.law.loss(n_params, tokens)

    def predict_interval(self, n_params: float, tokens: float, level: float = LEVEL) -> Interval:
        """Return the interval for the loss of one new run: the law's uncertainty and the noise."""
        noise = np.random.default_rng(0).choice(self.residuals, len(self.draws))
        losses = np.array([float(law.loss(n_params, tokens)) for law in self.draws])
        return percentile_interval(losses * np.exp(-noise), level)

    def optimum(self, flops: float) -> Optimum:
        """Return the compute-optimal run at C = 6ND FLOPs."""
        return self.law.optimum(flops)

    def optimum_intervals(self, flops: float, level: float = LEVEL) -> dict[str, Interval]:
        """Return the intervals of n_params, tokens and loss of the compute-optimal run."""
        found = [law.optimum(flops) for law in self.draws]
        names = ("n_params", "tokens", "loss")
        return {n: percentile_interval([getattr(o, n) for o in found], level) for n in names}


def fit_chinchilla(
    runs: Runs,
    *,
    start: ChinchillaLaw | None = None,
    draws: int = 200,
    seed: int = 0,
    level: float = LEVEL,
) -> ChinchillaFit:
    """Return L = E + A·N^−α + B·D^−β fitted to runs (arXiv 2203.15556, approach 3).

    Minimises Σ Huber(ln L_fit − ln L) with δ = 1e-3 by L-BFGS: from `start` when given, else from
    the best points of the paper's grid. Each bootstrap resample is refitted from the best fit.

    Raises ValueError for fewer than 6 runs, or fewer than 3 sizes or 3 token counts. What the runs
    cannot tell is said in `notes`.

    >>> runs = synthetic_runs(HOFFMANN_2022, noise=0.002, seed=0)
    >>> fit = fit_chinchilla(runs, start=HOFFMANN_2022, draws=50)
    >>> fit.intervals["alpha"].covers(HOFFMANN_2022.alpha), fit.notes
    (True, ())
    """
    n_params, tokens = runs.column("n_params"), runs.column("tokens")
    need_runs("loss", runs.loss, 6, LAW)
    need_distinct("n_params", n_params, 3, LAW)
    need_distinct("tokens", tokens, 3, LAW)
    x, y, z = np.log(n_params), np.log(tokens), np.log(runs.loss)
    center = (float(x.mean()), float(y.mean()))
    x, y = x - center[0], y - center[1]
    starts = [_to_theta(start, center)] if start else _grid_starts(x, y, z, center)
    theta, objective = minimize_huber(partial(_residuals, x, y, z), starts)

    def refit(index: IntArray) -> FloatArray:
        model = partial(_residuals, x[index], y[index], z[index])
        return minimize_huber(model, [theta])[0]

    thetas = pairs_bootstrap(refit, np.arange(len(z)), draws=draws, seed=seed)
    laws = tuple(_from_theta(row, center) for row in thetas)
    law = _from_theta(theta, center)
    intervals = _intervals(laws, level)
    return ChinchillaFit(
        law=law,
        intervals=intervals,
        residuals=_residuals(x, y, z, theta)[0],
        objective=objective,
        notes=_notes(law, intervals, x, y),
        draws=laws,
    )


def synthetic_runs(
    law: ChinchillaLaw,
    *,
    n_params: ArrayLike = (5e7, 1e8, 2e8, 4e8, 8e8, 1.6e9, 3.2e9, 6.4e9),
    tokens_per_param: ArrayLike = (2.5, 5, 10, 20, 40, 80, 160),
    noise: float = 0.0,
    seed: int = 0,
) -> Runs:
    """Return runs of every size at every ratio, drawn from a law with lognormal noise.

    >>> len(synthetic_runs(HOFFMANN_2022))
    56
    """
    n, ratio = np.meshgrid(np.asarray(n_params, float), np.asarray(tokens_per_param, float))
    n, tokens = n.ravel(), (n * ratio).ravel()
    error = np.random.default_rng(seed).standard_normal(n.size)
    return Runs(n_params=n, tokens=tokens, loss=law.loss(n, tokens) * np.exp(noise * error))


def synthetic_isoflop(
    law: ChinchillaLaw,
    *,
    budgets: ArrayLike = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21),
    sizes: int = 10,
    noise: float = 0.0,
    seed: int = 0,
) -> Runs:
    """Return runs of several sizes around each budget's optimum, drawn from a law.

    >>> len(synthetic_isoflop(HOFFMANN_2022))
    90
    """
    around = np.geomspace(0.3, 3.3, sizes)
    flops = np.repeat(np.asarray(budgets, float), sizes)
    best = np.array([law.optimum(float(c)).n_params for c in flops])
    n = best * np.tile(around, flops.size // sizes)
    tokens = flops / (6 * n)
    error = np.random.default_rng(seed).standard_normal(n.size)
    return Runs(n_params=n, tokens=tokens, loss=law.loss(n, tokens) * np.exp(noise * error))


def _residuals(
    x: FloatArray, y: FloatArray, z: FloatArray, theta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """ln L_fit − ln L and its Jacobian in θ = (e, a, b, α, β), for centred x = ln N, y = ln D.

    Centring parts the level of each term from its exponent: a and α are otherwise so correlated
    that L-BFGS crawls along their valley.
    """
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(x, e), a - alpha * x, b - beta * y])
    top = terms.max(axis=0)
    share = np.exp(terms - top)
    total = share.sum(axis=0)
    share /= total
    jacobian = np.column_stack([*share, -share[1] * x, -share[2] * y])
    return top + np.log(total) - z, jacobian


def _grid_starts(
    x: FloatArray, y: FloatArray, z: FloatArray, center: tuple[float, float]
) -> list[FloatArray]:
    """The points of the paper's grid with the smallest Huber sums: polishing all 4500 adds none."""
    exponents, levels = np.arange(0, 2.1, 0.5), np.arange(0, 26, 5)
    grid = itertools.product(np.arange(-1, 1.1, 0.5), levels, levels, exponents, exponents)
    thetas = np.array([(e, a - p * center[0], b - q * center[1], p, q) for e, a, b, p, q in grid])
    miss = [huber_sum(_residuals(x, y, z, theta)[0]) for theta in thetas]
    return list(thetas[np.argsort(miss, kind="stable")[:POLISHED_STARTS]])


def _to_theta(law: ChinchillaLaw, center: tuple[float, float]) -> FloatArray:
    e, a, b = np.log([law.E, law.A, law.B])
    return np.array([e, a - law.alpha * center[0], b - law.beta * center[1], law.alpha, law.beta])


def _from_theta(theta: FloatArray, center: tuple[float, float]) -> ChinchillaLaw:
    e, a, b, alpha, beta = theta.tolist()
    logs = np.array([e, a + alpha * center[0], b + beta * center[1]])
    E, A, B = np.exp(np.minimum(logs, 700)).tolist()
    return ChinchillaLaw(E, A, B, alpha, beta)


def _intervals(laws: tuple[ChinchillaLaw, ...], level: float) -> dict[str, Interval]:
    rows = np.array([astuple(law) for law in laws])
    alpha, beta = rows[:, 3], rows[:, 4]
    share = beta / (alpha + beta)
    rows = np.column_stack([rows, share, 1 - share])
    names = ("E", "A", "B", "alpha", "beta", "n_exponent", "d_exponent")
    return intervals_of(names, rows, level)


def _notes(
    law: ChinchillaLaw, intervals: dict[str, Interval], x: FloatArray, y: FloatArray
) -> tuple[str, ...]:
    # A and B are exponentials of the exponents and always wide; α and β carry their question.
    judged = {"E": law.E, "alpha": law.alpha, "beta": law.beta}
    notes = unidentified(judged, intervals)
    if abs(float(np.corrcoef(x, y)[0, 1])) > 0.999:
        notes += (
            "alpha and beta cannot be told apart: tokens move with n_params in every run; "
            "add runs at another number of tokens per parameter",
        )
    return notes
