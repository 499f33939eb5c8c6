"""The critical batch size: what a larger batch costs in tokens, and how it grows with the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.scaling.linear import PowerFit, fit_loglog
from mupgpt.scaling.resample import LEVEL, Interval, fit_curve, intervals_of
from mupgpt.scaling.runs import FloatArray, as_columns, need_distinct, need_runs

__all__ = ["CriticalBatchFit", "fit_batch_law", "fit_critical_batch"]


@dataclass(frozen=True, eq=False)
class CriticalBatchFit:
    """D(B) = d_min·(1 + B/b_crit), with intervals and residuals ln D_fit − ln D.

    At B = b_crit a run needs twice the tokens of a small batch and twice the steps of a large one.
    """

    d_min: float
    b_crit: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    notes: tuple[str, ...]

    @property
    def s_min(self) -> float:
        """The fewest steps that any batch size can reach this loss in: d_min/b_crit."""
        return self.d_min / self.b_crit

    def predict(self, batch: ArrayLike) -> FloatArray:
        """Return the tokens needed to reach the loss at each batch size."""
        return self.d_min * (1 + np.asarray(batch, float) / self.b_crit)


def fit_critical_batch(
    batch: ArrayLike,
    tokens: ArrayLike,
    *,
    draws: int = 400,
    seed: int = 0,
    level: float = LEVEL,
) -> CriticalBatchFit:
    """Return D = D_min·(1 + B/B_crit) fitted to the tokens that reach one loss at each batch size.

    The law of McCandlish et al. (arXiv 1812.06162) and of Power Lines (arXiv 2505.13738). B_crit
    comes in the units of `batch`: give both in tokens and s_min is in steps. Least squares on ln D.
    A note says so when the batches tried do not reach, or all exceed, the critical one.

    Raises ValueError for fewer than 3 batch sizes.

    >>> fit = fit_critical_batch([1e5, 1e6, 4e6], [1.1e9, 2e9, 5e9], draws=20)
    >>> round(fit.d_min), round(fit.b_crit)
    (1000000000, 1000000)
    """
    sizes, spent = as_columns(batch=batch, tokens=tokens).values()
    need_runs("batch", sizes, 3, "the critical-batch law")
    need_distinct("batch", sizes, 3, "the critical-batch law")
    x, z = np.log(sizes), np.log(spent)
    start = np.array([z.min(), x.mean()])
    curve = fit_curve(partial(_log_tokens, x), z, start, draws=draws, seed=seed)
    d_min, b_crit = np.exp(curve.theta).tolist()
    rows = np.exp(np.clip(curve.draws.params, -700, 700))
    intervals = intervals_of(("d_min", "b_crit"), rows, level)
    low, high = intervals["b_crit"]
    notes = ()
    if high > 10 * sizes.max():
        notes = (
            f"b_crit is not identified from above: all batches are small; it exceeds {low:.3g}",
        )
    elif low < sizes.min() / 10:
        notes = (
            f"b_crit is not identified from below: all batches are large; it is under {high:.3g}",
        )
    return CriticalBatchFit(d_min, b_crit, intervals, curve.residuals, notes)


def _log_tokens(x: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ln D and its Jacobian for x = ln B and θ = (ln D_min, ln B_crit)."""
    grown = np.logaddexp(0, x - theta[1])
    return theta[0] + grown, np.stack([np.ones_like(x), np.exp(-grown) - 1], axis=-1)


def fit_batch_law(tokens: ArrayLike, batch: ArrayLike, *, level: float = LEVEL) -> PowerFit:
    """Return B = k·D^m: a critical or optimal batch size as a power of the run's tokens.

    Power Lines (arXiv 2505.13738) finds both to follow D, whatever N.

    >>> fit = fit_batch_law(tokens=[1e9, 1e10, 1e11], batch=[100.0, 200.0, 400.0])
    >>> round(fit.exponents["tokens"], 4)
    0.301
    """
    return fit_loglog(batch, level, tokens=tokens)
