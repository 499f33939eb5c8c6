"""The law of learning-rate annealing: a whole loss curve from its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import lfilter

from mupgpt.scaling.resample import (
    LEVEL,
    Interval,
    intervals_of,
    pairs_bootstrap,
    percentile_interval,
    unidentified,
)
from mupgpt.scaling.robust import minimize_huber, separable_start
from mupgpt.scaling.runs import FloatArray, IntArray, need_distinct, need_runs, positive

__all__ = ["AnnealingFit", "LossCurve", "annealing_areas", "fit_annealing"]

BLOCKS_PER_CURVE = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve:
    """One run: the learning rate of every step, and the loss measured at some of them.

    `lr[i]` is the rate of step i (zero is allowed), `steps` the steps that were measured (from 0),
    `loss` their loss in nats. Leave out the first steps, where no law holds yet: a few times the
    warm-up is enough.

    Raises ValueError for a negative rate, a step outside the schedule or a bad loss.
    """

    lr: FloatArray
    steps: IntArray
    loss: FloatArray

    def __post_init__(self) -> None:
        steps = np.asarray(self.steps, np.intp)
        loss = positive("loss", self.loss)
        rates = _rates(self.lr)
        if len(steps) != len(loss):
            raise ValueError(f"steps has {len(steps)} values, loss {len(loss)}: give one loss each")
        if steps.min() < 0 or steps.max() >= len(rates):
            raise ValueError(
                f"steps run from {steps.min()} to {steps.max()} but lr has {len(rates)} steps: "
                "give lr for every step of the run, and count steps from 0"
            )
        for name, value in (("lr", rates), ("steps", steps), ("loss", loss)):
            object.__setattr__(self, name, value)


def annealing_areas(lr: ArrayLike, decay: float = 0.999) -> tuple[FloatArray, FloatArray]:
    """Return S1 and S2 after each step: the summed rate, and the summed annealing momentum.

    S1 = Σ η_i and S2 = Σ m_i with m_i = λ·m_(i−1) + η_(i−1) − η_i (Tissue et al.,
    arXiv 2408.11029). Warm-up is no annealing: m is zero until the rate first stops rising.

    >>> s1, s2 = annealing_areas([1.0, 1.0, 0.5, 0.5], decay=0.5)
    >>> s1.tolist(), s2.tolist()
    ([1.0, 2.0, 2.5, 3.0], [0.0, 0.0, 0.5, 0.75])
    """
    rates = _rates(lr)
    drop = -np.diff(rates, prepend=rates[0])
    risen = np.flatnonzero(np.diff(rates) <= 0)
    drop[: (risen[0] if risen.size else len(rates)) + 1] = 0.0
    momentum = lfilter([1.0], [1.0, -decay], drop)
    return np.cumsum(rates), np.cumsum(momentum)


@dataclass(frozen=True, eq=False)
class AnnealingFit:
    """L(s) = L0 + A·S1^−α − C·S2 with its λ, intervals of L0, A, alpha, C, residuals ln fit − ln L.

    `residuals` run through the curves in the order given; `draws` hold (L0, A, α, C).
    """

    L0: float
    A: float
    alpha: float
    C: float
    decay: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    objective: float
    notes: tuple[str, ...]
    draws: FloatArray = field(repr=False)

    def predict(self, lr: ArrayLike) -> FloatArray:
        """Return the loss after each step of a schedule given as one rate per step."""
        return _loss(*annealing_areas(lr, self.decay), (self.L0, self.A, self.alpha, self.C))

    def predict_interval(self, lr: ArrayLike, level: float = LEVEL) -> Interval:
        """Return the interval for the final loss measured under a schedule."""
        s1, s2 = (area[-1:] for area in annealing_areas(lr, self.decay))
        noise = np.random.default_rng(0).choice(self.residuals, len(self.draws))
        final = np.array([_loss(s1, s2, tuple(row))[0] for row in self.draws])
        return percentile_interval(final * np.exp(-noise), level)


def fit_annealing(
    curves: Sequence[LossCurve],
    *,
    decays: Sequence[float] = (0.999,),
    draws: int = 100,
    seed: int = 0,
    level: float = LEVEL,
) -> AnnealingFit:
    """Return L(s) = L0 + A·S1^−α − C·S2 fitted to loss curves (Tissue et al., arXiv 2408.11029).

    Minimises the Huber sum (δ = 1e-3) of ln L_fit − ln L; of several `decays` (λ) the one with the
    least is kept: a short run may want one smaller than the paper's .999. Multiplying all
    rates by one number changes A and C, and no prediction. Losses beside each other on a curve
    share their error, so the bootstrap draws blocks of a curve, ten to each.

    Raises ValueError without curves or with fewer than 10 measurements. When no curve anneals, C is
    zero and a note says so.

    >>> lr = np.linspace(1e-3, 0, 2000)
    >>> s1, s2 = annealing_areas(lr)
    >>> loss = 2.5 + 0.5 * s1**-0.4 - 0.2 * s2
    >>> fit = fit_annealing([LossCurve(lr=lr, steps=range(100, 2000, 10), loss=loss[100::10])])
    >>> round(fit.L0, 3), round(fit.alpha, 3)
    (2.5, 0.4)
    """
    if not curves:
        raise ValueError("curves is empty: give at least one LossCurve")
    z = np.log(np.concatenate([curve.loss for curve in curves]))
    need_runs("loss", z, 10, "the annealing law")
    fits = [(*_fit_decay(curves, z, decay), decay) for decay in decays]
    theta, objective, decay = min(fits, key=lambda fit: fit[1])
    s1, s2, scale = _features(curves, decay)

    def refit(index: IntArray) -> FloatArray:
        return minimize_huber(partial(_residuals, s1[index], s2[index], z[index]), [theta])[0]

    thetas = pairs_bootstrap(refit, _blocks(curves), draws=draws, seed=seed)
    rows = np.array([_from_theta(row, scale) for row in thetas])
    intervals = intervals_of(("L0", "A", "alpha", "C"), rows, level)
    values = dict(zip(("L0", "A", "alpha", "C"), _from_theta(theta, scale), strict=True))
    judged = {name: values[name] for name in ("L0", "alpha", "C") if s2.any() or name != "C"}
    notes = unidentified(judged, intervals)
    if not s2.any():
        intervals["C"] = Interval(-math.inf, math.inf)
        notes += ("C is not identified: no curve lowers its rate; add one that anneals",)
    return AnnealingFit(
        **values,
        decay=decay,
        intervals=intervals,
        residuals=_residuals(s1, s2, z, theta)[0],
        objective=objective,
        notes=notes,
        draws=rows,
    )


def _rates(lr: ArrayLike) -> FloatArray:
    rates = np.array(lr, dtype=np.float64)
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"lr has shape {rates.shape}: give one rate per step")
    bad = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
    if bad.size or not rates.any():
        i = int(bad[0]) if bad.size else 0
        raise ValueError(f"lr[{i}] = {rates[i]:g}: rates are finite, none negative, not all zero")
    return rates


def _features(
    curves: Sequence[LossCurve], decay: float
) -> tuple[FloatArray, FloatArray, tuple[float, float]]:
    """S1 and S2 at the measured steps, each over its own scale, and these scales."""
    areas = [[a[c.steps] for a in annealing_areas(c.lr, decay)] for c in curves]
    s1, s2 = (np.concatenate(parts) for parts in zip(*areas, strict=True))
    if s1.min() <= 0:
        raise ValueError("steps includes one before any rate above zero: measure later steps")
    need_distinct("summed lr at the measured steps", s1, 4, "the annealing law")
    scale = (math.exp(float(np.log(s1).mean())), float(np.abs(s2).max()) or 1.0)
    return s1 / scale[0], s2 / scale[1], scale


def _fit_decay(
    curves: Sequence[LossCurve], z: FloatArray, decay: float
) -> tuple[FloatArray, float]:
    s1, s2, _ = _features(curves, decay)

    def basis(alpha: float) -> FloatArray:
        return np.column_stack([np.ones_like(s1), s1**-alpha, -s2])

    alpha, (level, rise, anneal) = separable_start(basis, np.arange(0.05, 1.5, 0.05), np.exp(z))
    small = 1e-3 * math.exp(z.min())
    start = np.array([math.log(max(level, small)), math.log(max(rise, small)), alpha, anneal])
    return minimize_huber(partial(_residuals, s1, s2, z), [start])


def _residuals(
    s1: FloatArray, s2: FloatArray, z: FloatArray, theta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """ln L_fit − ln L and its Jacobian in θ = (ln L0, ln A, α, C), S1 and S2 being scaled."""
    level, alpha = np.exp(theta[0]), theta[2]
    rise = np.exp(theta[1] - alpha * np.log(s1))
    loss = np.maximum(level + rise - theta[3] * s2, 1e-6)  # a step too far must not end in log(<0)
    jacobian = np.column_stack([np.full_like(s1, level), rise, -rise * np.log(s1), -s2])
    return np.log(loss) - z, jacobian / loss[:, None]


def _from_theta(theta: FloatArray, scale: tuple[float, float]) -> tuple[float, ...]:
    level, rise, alpha, anneal = (float(v) for v in theta)
    return math.exp(level), math.exp(rise) * scale[0] ** alpha, alpha, anneal / scale[1]


def _loss(s1: FloatArray, s2: FloatArray, params: tuple[float, ...]) -> FloatArray:
    level, rise, alpha, anneal = params
    with np.errstate(divide="ignore"):  # before the first rate above zero the law says ∞
        return level + rise * s1**-alpha - anneal * s2


def _blocks(curves: Sequence[LossCurve]) -> IntArray:
    labels = [
        k * BLOCKS_PER_CURVE + np.arange(len(c.loss)) * BLOCKS_PER_CURVE // len(c.loss)
        for k, c in enumerate(curves)
    ]
    return np.concatenate(labels).astype(np.intp)
