"""Laws of compute alone: the power law on FLOPs, and loss as a straight line in log C."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import f as fisher

from mupgpt.scaling.linear import LinearFit, fit_linear
from mupgpt.scaling.resample import (
    LEVEL,
    Draws,
    Interval,
    fit_curve,
    intervals_of,
    unidentified,
    vanished,
)
from mupgpt.scaling.runs import FloatArray, Runs, need_distinct, need_runs

__all__ = ["ComputeFit", "LogComputeFit", "fit_compute", "fit_log_compute"]

FEW = 5  # with so few runs a third parameter follows their noise


@dataclass(frozen=True, eq=False)
class ComputeFit:
    """L(C) = a·C^−b + c, with intervals of a, b, c and residuals ln L_fit − ln L.

    c = 0 and has no interval when the law was fitted without an irreducible term.
    """

    a: float
    b: float
    c: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    notes: tuple[str, ...]
    theta: FloatArray
    center: float
    draws: Draws = field(repr=False)

    def predict(self, flops: ArrayLike) -> FloatArray:
        """Return the loss expected at each training budget."""
        x = np.log(np.asarray(flops, float)) - self.center
        return np.exp(_log_loss(x, self.theta)[0])

    def predict_interval(self, flops: float, level: float = LEVEL) -> Interval:
        """Return the interval for the loss of one new run of `flops`."""
        x = np.array(math.log(flops) - self.center)
        low, high = self.draws.interval(lambda theta: float(_log_loss(x, theta)[0]), level)
        return Interval(math.exp(low), math.exp(high))


def fit_compute(
    runs: Runs,
    *,
    irreducible: bool | None = None,
    draws: int = 400,
    seed: int = 0,
    level: float = LEVEL,
) -> ComputeFit:
    """Return L = a·C^−b + c fitted to runs by least squares on ln L (arXiv 2304.03208).

    `irreducible` keeps (True) or drops (False) c. By default it is kept only when more than five
    runs are given and the interval of c stays clear of zero: a law with a c that the runs do not
    fix can extrapolate far worse than one without. `notes` say which law was taken and why.

    Raises ValueError for fewer than 3 runs (5 with c) or fewer distinct budgets than parameters.

    >>> flops = np.geomspace(1e18, 1e22, 9)
    >>> fit = fit_compute(Runs(flops=flops, loss=600 * flops**-0.15 + 1.5), draws=20)
    >>> round(fit.b, 6), round(fit.c, 6)
    (0.15, 1.5)
    """
    if irreducible is not None:
        return _fit(runs, irreducible, draws, seed, level)
    if len(runs) <= FEW:
        note = f"{len(runs)} runs do not fix an irreducible loss: fitted without one"
        return _noted(_fit(runs, False, draws, seed, level), note)
    full = _fit(runs, True, draws, seed, level)
    around = full.intervals["c"]
    if around.low > 0.01 * float(runs.loss.min()):
        return full
    note = (
        f"c is not identified ({full.c:.3g} with an interval of [{around.low:.3g}, "
        f"{around.high:.3g}]): fitted without an irreducible loss"
    )
    return _noted(_fit(runs, False, draws, seed, level), note)


def _noted(fit: ComputeFit, note: str) -> ComputeFit:
    return dataclasses.replace(fit, notes=(note, *fit.notes))


def _fit(runs: Runs, irreducible: bool, draws: int, seed: int, level: float) -> ComputeFit:
    count = 3 if irreducible else 2
    flops = runs.column("flops")
    need_runs("loss", runs.loss, 5 if irreducible else 3, "the power law on flops")
    need_distinct("flops", flops, count, "the power law on flops")
    logs = np.log(flops)
    center = float(logs.mean())
    x, z = logs - center, np.log(runs.loss)
    start = _start(x, z, irreducible)
    curve = fit_curve(partial(_log_loss, x), z, start, draws=draws, seed=seed)
    rows = _parameters(curve.draws.params, center)
    intervals = intervals_of(("a", "b", "c")[:count], rows, level)
    a, b, c = (*_parameters(curve.theta[None], center)[0].tolist(), 0.0)[:3]
    return ComputeFit(
        a=a,
        b=b,
        c=c,
        intervals=intervals,
        residuals=curve.residuals,
        notes=_law_notes({"a": a, "b": b, "c": c}, intervals, runs.loss),
        theta=curve.theta,
        center=center,
        draws=curve.draws,
    )


def _law_notes(
    values: dict[str, float], intervals: dict[str, Interval], loss: FloatArray
) -> tuple[str, ...]:
    # a is an exponential of b and always wide.
    notes = unidentified({n: values[n] for n in intervals if n != "a"}, intervals)
    return notes + vanished("c", values["c"], loss) if "c" in intervals else notes


def _log_loss(x: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ln L and its Jacobian for centred x = ln C and θ = (ln a at the centre, b[, ln c])."""
    term = theta[0] - theta[1] * x
    if len(theta) == 2:
        return term, np.stack([np.ones_like(x), -x], axis=-1)
    logs = np.logaddexp(term, theta[2])
    share = np.exp(term - logs)
    return logs, np.stack([share, -share * x, 1 - share], axis=-1)


def _start(x: FloatArray, z: FloatArray, irreducible: bool) -> FloatArray:
    """The straight line in logs; with c, the best line through L − c over trial values of c."""
    trials = (
        np.linspace(0, 0.95, 20)[:, None] * np.exp(z.min()) if irreducible else np.zeros((1, 1))
    )

    def line(c: float) -> tuple[float, FloatArray]:
        slope, level = np.polyfit(x, np.log(np.exp(z) - c), 1)
        theta = np.array([level, -slope, math.log(max(c, 1e-3))][: 2 + irreducible])
        return float(np.sum((_log_loss(x, theta)[0] - z) ** 2)), theta

    return min((line(float(c)) for c in trials.ravel()), key=lambda end: end[0])[1]


def _parameters(thetas: FloatArray, center: float) -> FloatArray:
    log_a = np.minimum(thetas[:, 0] + thetas[:, 1] * center, 700)
    return np.column_stack([np.exp(log_a), thetas[:, 1], np.exp(np.minimum(thetas[:, 2:], 700))])


@dataclass(frozen=True, eq=False)
class LogComputeFit:
    """L(C) = intercept − drop·log10(C), in nats, with t intervals and residuals L − L_fit."""

    intercept: float
    drop: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    r2: float
    notes: tuple[str, ...]
    line: LinearFit = field(repr=False)

    def predict(self, flops: ArrayLike) -> FloatArray:
        """Return the loss expected at each training budget."""
        return self.intercept - self.drop * np.log10(np.asarray(flops, float))

    def predict_interval(self, flops: float, level: float = LEVEL) -> Interval:
        """Return the interval for the loss of one new run of `flops`."""
        low, high = self.line.predict_interval(level, one=1.0, decades=math.log10(flops))
        return Interval(float(low[0]), float(high[0]))


def fit_log_compute(runs: Runs, *, level: float = LEVEL) -> LogComputeFit:
    """Return loss as a straight line in log C, whatever N and D ("more compute", arXiv 2404.19484).

    `drop` is the loss gained per tenfold compute. When the runs also give N and D, a note says
    whether tokens per parameter explain what C leaves over (F-test at 1 %): the line holds only
    between runs balanced alike, and not far beyond them, since it falls below zero in the end.

    Raises ValueError for fewer than 3 runs or one budget only.

    >>> fit = fit_log_compute(Runs(flops=[1e18, 1e19, 1e20], loss=[3.0, 2.5, 2.0]))
    >>> round(fit.drop, 9), round(fit.predict(1e21).item(), 9)
    (0.5, 1.5)
    """
    flops = runs.column("flops")
    need_runs("loss", runs.loss, 3, "the line in log flops")
    need_distinct("flops", flops, 2, "the line in log flops")
    decades = np.log10(flops)
    line = fit_linear(runs.loss, level, one=np.ones(len(runs)), decades=decades)
    low, high = line.intervals["decades"]
    return LogComputeFit(
        intercept=line.coef["one"],
        drop=-line.coef["decades"],
        intervals={"intercept": line.intervals["one"], "drop": Interval(-high, -low)},
        residuals=line.residuals,
        r2=line.r2,
        notes=_balance_note(runs, decades, line),
        line=line,
    )


def _balance_note(runs: Runs, decades: FloatArray, line: LinearFit) -> tuple[str, ...]:
    if runs.n_params is None and runs.tokens is None:
        return ()
    ratio = np.log(runs.column("tokens") / runs.column("n_params"))
    columns = np.column_stack([np.ones_like(decades), decades, ratio, ratio**2])
    coef, _, rank, _ = np.linalg.lstsq(columns, runs.loss, rcond=None)
    dof = len(runs) - 4
    if rank < 4 or dof < 1:
        return ()
    rest = float(np.sum((runs.loss - columns @ coef) ** 2))
    gain = (float(line.residuals @ line.residuals) - rest) / 2
    if rest > 0 and fisher.sf(gain / (rest / dof), 2, dof) > 0.01:
        return ()
    return ("compute alone does not explain these runs: tokens per parameter matters too",)
