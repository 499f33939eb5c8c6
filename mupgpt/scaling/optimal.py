"""Optimal learning rate and batch size over N and D, from grids of runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import Akima1DInterpolator

from mupgpt.scaling.linear import PowerFit, fit_loglog
from mupgpt.scaling.resample import LEVEL
from mupgpt.scaling.runs import FloatArray, as_columns, distinct

__all__ = ["OptimalFit", "SweepOptimum", "fit_optimal", "interpolated_minimum"]

Method = Literal["quadratic", "akima"]


@dataclass(frozen=True)
class SweepOptimum:
    """The learning rate (and batch size) of least loss for one model and token count.

    `edge` says that the best run lies on the edge of its grid, so that the true optimum may lie
    outside: such a point is shown, and no law is fitted to it.
    """

    n_params: float
    tokens: float
    batch: float
    lr: float
    loss: float
    edge: bool


def interpolated_minimum(
    x: ArrayLike, loss: ArrayLike, method: Method = "quadratic"
) -> tuple[float, float, bool]:
    """Return where the loss is least, that loss, and whether it is on the edge of the points.

    "quadratic" is the parabola through the lowest point and its two neighbours, "akima" the lowest
    point of Akima's spline through all of them. Several losses at one x (seeds) are averaged.

    >>> x, loss, edge = interpolated_minimum([0.0, 1.5, 3.0], [3.0, 2.25, 6.0])
    >>> round(x, 6), round(loss, 6), edge
    (1.0, 2.0, False)
    """
    at, place = np.unique(np.asarray(x, float), return_inverse=True)
    mean = np.bincount(place, np.asarray(loss, float)) / np.bincount(place)
    low = int(mean.argmin())
    if low in (0, len(at) - 1):
        return float(at[low]), float(mean[low]), True
    if method == "akima":
        fine = np.linspace(at[0], at[-1], 2001)
        curve = Akima1DInterpolator(at, mean)(fine)
        return float(fine[curve.argmin()]), float(curve.min()), False
    middle = at[low]
    curve, slope, level = np.polyfit(at[low - 1 : low + 2] - middle, mean[low - 1 : low + 2], 2)
    return float(middle - slope / (2 * curve)), float(level - slope**2 / (4 * curve)), False


@dataclass(frozen=True, eq=False)
class OptimalFit:
    """η* = k·N^p·D^q and B* = k′·N^p′·D^q′, with the optima that they were fitted to.

    `by_batch` has one optimum per (N, D, B), `by_size` one per (N, D), flagged ones included;
    `lr` and `batch` hold exponents, intervals and residuals. `batch` is None when no two batch
    sizes were tried.
    """

    lr: PowerFit
    batch: PowerFit | None
    by_batch: tuple[SweepOptimum, ...]
    by_size: tuple[SweepOptimum, ...]
    notes: tuple[str, ...]


def fit_optimal(
    *,
    n_params: ArrayLike,
    tokens: ArrayLike,
    batch: ArrayLike,
    lr: ArrayLike,
    loss: ArrayLike,
    method: Method = "quadratic",
    level: float = LEVEL,
) -> OptimalFit:
    """Return the laws of the best learning rate and batch size over N and D.

    The recipe of "Resolving Discrepancies" (arXiv 2406.19146): for each (N, D, B) interpolate the
    loss in ln η to its minimum; then those minima in ln B; then regress ln η* and ln B* on ln N and
    ln D. All arguments have one entry per run. Optima on the edge of a grid are flagged and left
    out. Where tokens move with n_params the exponent of n_params is that of both together.

    Raises ValueError when fewer than two models have an optimum inside their grid.

    >>> n, b, lr = (a.ravel() for a in np.meshgrid([1e7, 1e8], [32], [1e-3, 2e-3, 4e-3, 8e-3]))
    >>> best = 3e-3 * (n / 3e7) ** -0.2
    >>> fit = fit_optimal(n_params=n, tokens=20 * n, batch=b, lr=lr,
    ...                   loss=3 + 0.1 * np.log(lr / best) ** 2)
    >>> round(fit.lr.exponents["n_params"], 6)
    -0.2
    """
    given = as_columns(n_params=n_params, tokens=tokens, batch=batch, lr=lr, loss=loss)
    rows = sorted(zip(*given.values(), strict=True))
    by_batch = tuple(_best_lr(rows, method))
    searched = any(_same_model(p, q) for p, q in itertools.pairwise(by_batch))
    by_size = tuple(_best_batch(by_batch, method) if searched else by_batch)
    usable = [point for point in by_size if not point.edge]
    if len(usable) < 2:
        raise ValueError(
            f"lr: {len(usable)} of {len(by_size)} models have their best run inside the grid, and "
            "a law needs 2; extend the grids of lr (and batch) until the loss rises on both sides"
        )
    predictors, notes = _predictors(usable)
    notes += tuple(f"left out, on the edge of its grid: {_shown(p)}" for p in by_size if p.edge)
    if not searched:
        notes += ("one batch size per model: its best is not searched",)
    return OptimalFit(
        lr=fit_loglog([p.lr for p in usable], level, **predictors),
        batch=fit_loglog([p.batch for p in usable], level, **predictors) if searched else None,
        by_batch=by_batch,
        by_size=by_size,
        notes=notes,
    )


def _same_model(one: SweepOptimum, other: SweepOptimum) -> bool:
    return (one.n_params, one.tokens) == (other.n_params, other.tokens)


def _best_lr(rows: Sequence[tuple[float, ...]], method: Method) -> Iterator[SweepOptimum]:
    for (n, d, b), runs in itertools.groupby(rows, key=lambda row: row[:3]):
        _, _, _, lr, loss = np.array(list(runs)).T
        at, lowest, edge = interpolated_minimum(np.log(lr), loss, method)
        yield SweepOptimum(n, d, b, float(np.exp(at)), lowest, edge)


def _best_batch(points: Sequence[SweepOptimum], method: Method) -> Iterator[SweepOptimum]:
    """The best batch of each model, among batches whose own best rate is not on an edge.

    A model with a single batch size has it on the edge: beside others whose batch was searched,
    neither its batch nor its rate is an optimum.
    """
    for (n, d), group in itertools.groupby(points, key=lambda p: (p.n_params, p.tokens)):
        own = list(group)
        inside = [p for p in own if not p.edge]
        if not inside:
            yield min(own, key=lambda p: p.loss)
            continue
        _, _, b, lr, loss, _ = np.array([astuple(p) for p in inside]).T
        at, lowest, edge = interpolated_minimum(np.log(b), loss, method)
        rate = float(np.exp(np.interp(at, np.log(b), np.log(lr))))
        yield SweepOptimum(n, d, float(np.exp(at)), rate, lowest, edge)


def _predictors(points: Sequence[SweepOptimum]) -> tuple[dict[str, FloatArray], tuple[str, ...]]:
    n = np.array([p.n_params for p in points])
    d = np.array([p.tokens for p in points])
    if distinct(d) == 1:
        return {"n_params": n}, ()
    if distinct(n) == 1:
        return {"tokens": d}, ()
    columns = np.column_stack([np.ones_like(n), np.log(n), np.log(d)])
    if np.linalg.matrix_rank(columns - columns.mean(axis=0), tol=1e-6) < 2:
        return {"n_params": n}, ("tokens move with n_params: one exponent stands for both",)
    return {"n_params": n, "tokens": d}, ()


def _shown(point: SweepOptimum) -> str:
    return (
        f"n_params {point.n_params:.3g}, tokens {point.tokens:.3g}, batch {point.batch:.3g}, "
        f"lr {point.lr:.3g}"
    )
