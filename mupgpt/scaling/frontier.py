"""The compute-optimal frontier without a loss formula: Chinchilla's approaches 1 and 2."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.scaling.linear import PowerFit, fit_loglog
from mupgpt.scaling.resample import LEVEL, Interval, intervals_of, pairs_bootstrap
from mupgpt.scaling.runs import (
    FloatArray,
    IntArray,
    Runs,
    distinct,
    need_distinct,
    need_runs,
)

__all__ = ["FrontierFit", "fit_envelope", "fit_isoflop"]

BUDGET_RTOL = 0.1
# Three runs fix a parabola and leave nothing that could show their scatter.
BUDGET_SIZES = 4


@dataclass(frozen=True, eq=False)
class FrontierFit:
    """N* = k_n·C^n_exponent and D* = k_d·C^d_exponent, with the points they were fitted to.

    `flops`, `n_params`, `tokens`, `loss` are the optima found (one per bin or budget),
    `residuals` are ln N* − ln fit, `intervals` hold both exponents. The envelope's bins are not
    independent: there `intervals` come from resampled sizes, and those of `n_law` do not hold.
    """

    n_exponent: float
    d_exponent: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    notes: tuple[str, ...]
    flops: FloatArray
    n_params: FloatArray
    tokens: FloatArray
    loss: FloatArray
    n_law: PowerFit = field(repr=False)
    d_law: PowerFit = field(repr=False)

    def predict(self, flops: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the optimal n_params and tokens of each budget."""
        return self.n_law.predict(flops=flops), self.d_law.predict(flops=flops)


def fit_envelope(
    runs: Runs, *, bins: int = 1500, draws: int = 200, seed: int = 0, level: float = LEVEL
) -> FrontierFit:
    """Return the frontier from the lower envelope of each size's loss over FLOPs (approach 1).

    Each size's loss is interpolated in ln C between its runs (one per horizon, each with its own
    decay); in each of `bins` log-spaced budgets the best size is N*, and N* ∝ C^a is fitted
    (arXiv 2203.15556). Budgets up to the last one won by the smallest size, and from the
    first one won by the largest, are left out: there the optimum may lie outside the sizes tried.
    Intervals come from resampling whole sizes.

    Raises ValueError for fewer than 4 sizes, or fewer than 3 sizes on the envelope's inside.

    >>> from mupgpt.scaling.chinchilla import HOFFMANN_2022, synthetic_runs
    >>> fit = fit_envelope(synthetic_runs(HOFFMANN_2022), draws=20)
    >>> abs(fit.n_exponent - 0.4566) < 0.02
    True
    """
    n_params, flops = runs.column("n_params"), runs.column("flops")
    need_distinct("n_params", n_params, 4, "the envelope")
    tokens, loss = runs.column("tokens"), runs.loss
    points = _envelope(n_params, tokens, flops, loss, bins)
    inside = len(np.unique(points[1]))
    if inside < 3:
        raise ValueError(
            f"n_params: {inside} sizes win a budget between those of the smallest and the largest, "
            "and the envelope needs 3; add sizes, or horizons so that their curves cross"
        )

    def refit(index: IntArray) -> FloatArray:
        return _exponents(
            _envelope(n_params[index], tokens[index], flops[index], loss[index], bins)
        )

    slopes = pairs_bootstrap(refit, n_params, draws=draws, seed=seed)
    kept = slopes[np.isfinite(slopes).all(axis=1)]
    notes = ("budgets where the smallest or the largest size wins are left out",)
    if len(kept) < len(slopes):
        notes += (f"{len(slopes) - len(kept)} of {draws} resamples left too few sizes to fit",)
    return _frontier(points, intervals_of(("n_exponent", "d_exponent"), kept, level), notes)


def _envelope(
    n_params: FloatArray, tokens: FloatArray, flops: FloatArray, loss: FloatArray, bins: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    sizes = np.unique(n_params)
    grid = np.linspace(math.log(flops.min()), math.log(flops.max()), bins)
    curves, horizons = np.empty((len(sizes), bins)), np.empty((len(sizes), bins))
    for row, size in enumerate(sizes):
        own = np.flatnonzero(n_params == size)
        own = own[np.argsort(flops[own], kind="stable")]
        at = np.log(flops[own])
        curves[row] = np.interp(grid, at, loss[own], left=math.inf, right=math.inf)
        horizons[row] = np.interp(grid, at, np.log(tokens[own]))
    reached = np.isfinite(np.min(curves, axis=0))
    winner = np.where(reached, curves.argmin(axis=0), -1)
    at = _between(winner, len(sizes) - 1)
    at = at[reached[at]]
    best = winner[at]
    return np.exp(grid[at]), sizes[best], np.exp(horizons[best, at]), curves[best, at]


def _between(winner: IntArray, largest: int) -> IntArray:
    """Bins after the smallest size's last win and before the largest size's first.

    Leaving out only the bins that these two win would keep the others' wins beside them, and so
    bend the frontier towards the middle.
    """
    after = np.flatnonzero(winner == 0)
    before = np.flatnonzero(winner == largest)
    start = int(after[-1]) + 1 if after.size else 0
    return np.arange(start, int(before[0]) if before.size else len(winner))


def _exponents(points: tuple[FloatArray, ...]) -> FloatArray:
    flops, n_params, tokens, _ = points
    if len(np.unique(n_params)) < 3:
        return np.full(2, math.nan)
    x = np.log(flops) - np.log(flops).mean()
    return np.array([x @ np.log(n_params), x @ np.log(tokens)]) / (x @ x)


def fit_isoflop(runs: Runs, *, rtol: float = BUDGET_RTOL, level: float = LEVEL) -> FrontierFit:
    """Return the frontier from one parabola of loss in ln N per budget (approach 2).

    Runs whose FLOPs agree within `rtol` share a budget: the most crowded stretch of that width is
    the first one, the most crowded of what is left the next. So FLOPs may scatter, as figures read
    off a plot do, and runs may lie between the budgets. The parabola's lowest point gives N*, the
    one in ln D gives D*, and power laws through them the exponents, with Student's t intervals
    (arXiv 2203.15556). Left out, with a note, are runs in a stretch of fewer than 4 sizes, and
    budgets whose parabola is lowest outside the sizes tried.

    Raises ValueError when fewer than 2 budgets are usable.

    >>> from mupgpt.scaling.chinchilla import HOFFMANN_2022, synthetic_isoflop
    >>> fit = fit_isoflop(synthetic_isoflop(HOFFMANN_2022, noise=0.001))
    >>> abs(fit.n_exponent - 0.4566) < 0.01, fit.intervals["n_exponent"].covers(0.4566)
    (True, True)
    """
    columns = [runs.column(name) for name in ("flops", "n_params", "tokens")]
    need_runs("loss", runs.loss, 6, "approach 2")
    points, notes, apart = [], [], 0
    for own in _budgets(columns[0], rtol):
        flops, n_params, tokens = (column[own] for column in columns)
        budget = math.exp(float(np.log(flops).mean()))
        if min(distinct(n_params), distinct(tokens)) < BUDGET_SIZES:
            apart += len(own)
            continue
        size = _lowest(np.log(n_params), runs.loss[own])
        horizon = _lowest(np.log(tokens), runs.loss[own])
        if size is None or horizon is None:
            notes.append(f"budget {budget:.3g} left out: its lowest loss is not between its sizes")
            continue
        points.append((budget, math.exp(size[0]), math.exp(horizon[0]), size[1]))
    if apart:
        notes.append(
            f"{apart} runs left out: their flops agree within {rtol:g} with those of fewer than "
            f"{BUDGET_SIZES} sizes"
        )
    if len(points) < 2:
        raise ValueError(
            f"flops: {len(points)} budgets have their lowest loss between the sizes tried "
            f"({BUDGET_SIZES} or more, their flops within {rtol:g}), and the exponents need 2; "
            "add sizes on both sides of each budget's best"
        )
    return _frontier(tuple(np.array(sorted(points)).T), None, tuple(notes), level)


def _budgets(flops: FloatArray, rtol: float) -> list[IntArray]:
    """Places of the runs of each budget, most crowded first; every run is in one of them."""
    left, budgets = np.argsort(flops, kind="stable"), []
    while left.size:
        ends = np.searchsorted(flops[left], flops[left] * (1 + rtol), side="right")
        first = int(np.argmax(ends - np.arange(left.size)))
        budgets.append(left[first : ends[first]])
        left = np.delete(left, slice(first, ends[first]))
    return budgets


def _lowest(x: FloatArray, loss: FloatArray) -> tuple[float, float] | None:
    """The lowest point of the parabola through (x, loss), or None when it is not between them."""
    middle = float(x.mean())
    curve, slope, level = np.polyfit(x - middle, loss, 2)
    if curve <= 0:
        return None
    at = middle - slope / (2 * curve)
    return (at, level - slope**2 / (4 * curve)) if x.min() < at < x.max() else None


def _frontier(
    points: tuple[FloatArray, ...],
    intervals: dict[str, Interval] | None,
    notes: tuple[str, ...],
    level: float = LEVEL,
) -> FrontierFit:
    flops, n_params, tokens, loss = points
    n_law = fit_loglog(n_params, level, flops=flops)
    d_law = fit_loglog(tokens, level, flops=flops)
    own = {"n_exponent": n_law.intervals["flops"], "d_exponent": d_law.intervals["flops"]}
    return FrontierFit(
        n_exponent=n_law.exponents["flops"],
        d_exponent=d_law.exponents["flops"],
        intervals=intervals or own,
        residuals=n_law.residuals,
        notes=notes + n_law.notes,
        flops=flops,
        n_params=n_params,
        tokens=tokens,
        loss=loss,
        n_law=n_law,
        d_law=d_law,
    )
