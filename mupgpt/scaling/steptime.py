"""How long a step takes, from its memory traffic and FLOPs, and the best shape for a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.config.schema import GPTConfig
from mupgpt.scaling.chinchilla import ChinchillaLaw
from mupgpt.scaling.linear import LinearFit, fit_linear
from mupgpt.scaling.resample import LEVEL, Interval, unidentified
from mupgpt.scaling.runs import FloatArray, as_columns, need_runs

__all__ = ["ShapeChoice", "Shapes", "StepTimeFit", "best_shape", "fit_step_time", "memory_copies"]


def memory_copies(model: GPTConfig, batch: int, *, fused_attention: bool = False) -> int:
    """Return the elements read and written by one training step on `batch` sequences.

    Every operation reads its inputs and writes its output (the count of "Time Matters",
    arXiv 2406.18922); the backward pass is taken as twice the forward. `fused_attention` leaves
    out the score matrix, which a fused kernel never writes. The paper's GPT is counted: heads that
    fill d_model, an MLP without a gate.

    >>> memory_copies(GPTConfig(n_layer=1, d_model=2, n_head=1, vocab_size=4, seq_len=2), batch=1)
    828
    """
    rows, width, ffn = batch * model.seq_len, model.d_model, model.d_ffn
    pairs = 0 if fused_attention else batch * model.n_head * model.seq_len**2
    activations = rows * width
    attention = 4 * _matmul(rows, width, width) + 4 * activations + 4 * pairs
    mlp = _matmul(rows, width, ffn) + 2 * rows * ffn + _matmul(rows, ffn, width)
    norms_and_adds = 2 * 2 * activations + 2 * 3 * activations
    embedding_and_norm = 4 * activations
    head = _matmul(rows, width, model.vocab_size) + 2 * rows * model.vocab_size
    return 3 * (model.n_layer * (attention + mlp + norms_and_adds) + embedding_and_norm + head)


def _matmul(rows: int, fan_in: int, fan_out: int) -> int:
    return rows * fan_in + fan_in * fan_out + rows * fan_out


@dataclass(frozen=True, eq=False)
class StepTimeFit:
    """seconds = overhead + per_copy·copies + per_flop·FLOPs, with t intervals.

    `residuals` are relative, (measured − fit)/measured; R² is that of the seconds themselves.
    """

    overhead: float
    per_copy: float
    per_flop: float
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    r2: float
    notes: tuple[str, ...]
    line: LinearFit = field(repr=False)

    def predict(self, copies: ArrayLike, flops: ArrayLike) -> FloatArray:
        """Return the seconds of a step that moves `copies` elements and does `flops`."""
        moved, done = np.asarray(copies, float), np.asarray(flops, float)
        return self.overhead + self.per_copy * moved + self.per_flop * done

    def predict_interval(self, copies: float, flops: float, level: float = LEVEL) -> Interval:
        """Return the interval for the measured seconds of one new shape."""
        row = {"overhead": 1.0, "per_copy": copies, "per_flop": flops}
        weight = 1 / float(self.predict(copies, flops))
        low, high = self.line.predict_interval(level, weight, **row)
        return Interval(float(low[0]), float(high[0]))


def fit_step_time(
    seconds: ArrayLike, copies: ArrayLike, flops: ArrayLike, *, level: float = LEVEL
) -> StepTimeFit:
    """Return the step time as a linear function of memory copies and FLOPs (arXiv 2406.18922).

    `seconds`, `copies` (elements moved), `flops` are per step, one entry per shape measured. Rows
    are weighted by 1/seconds, so that each shape's relative error counts alike: unweighted, the
    slowest shape decides alone.

    Raises ValueError for fewer than 4 shapes, or copies and FLOPs that move together.

    >>> copies, flops = np.array([1e8, 4e8, 2e8, 9e8]), np.array([1e10, 2e10, 8e10, 9e10])
    >>> fit = fit_step_time(0.01 + 1e-10 * copies + 2e-12 * flops, copies, flops)
    >>> round(fit.overhead, 6), round(fit.r2, 6)
    (0.01, 1.0)
    """
    time, moved, done = as_columns(seconds=seconds, copies=copies, flops=flops).values()
    need_runs("seconds", time, 4, "the step-time model")
    line = fit_linear(
        time,
        level,
        weights=1 / time,
        overhead=np.ones_like(time),
        per_copy=moved,
        per_flop=done,
    )
    miss = line.residuals * time
    notes = unidentified({n: line.coef[n] for n in ("per_copy", "per_flop")}, line.intervals)
    notes += tuple(
        f"{name} is negative ({value:.3g}): do not predict shapes outside those measured"
        for name, value in line.coef.items()
        if value < 0
    )
    return StepTimeFit(
        **line.coef,
        intervals=line.intervals,
        residuals=line.residuals,
        r2=1 - float(miss @ miss) / float(np.sum((time - time.mean()) ** 2)),
        notes=notes,
        line=line,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """Candidates, one entry each: parameters, elements moved and FLOPs of a step."""

    n_params: ArrayLike
    copies: ArrayLike
    flops: ArrayLike


@dataclass(frozen=True, eq=False)
class ShapeChoice:
    """The best of several shapes for a time budget, and what each of them would reach."""

    best: int
    seconds_per_step: FloatArray
    steps: FloatArray
    tokens: FloatArray
    loss: FloatArray


def best_shape(
    fit: StepTimeFit,
    law: ChinchillaLaw,
    shapes: Shapes,
    *,
    seconds: float,
    tokens_per_step: float,
) -> ShapeChoice:
    """Return which candidate reaches the least loss in `seconds`, and the loss of each.

    A shape's step time gives its steps, these its tokens D, and the law L(N, D): the loss depends
    on N and not on where the parameters sit, while the time depends on the shape
    (arXiv 2406.18922).

    Raises ValueError when no candidate finishes a single step in that time.

    >>> from mupgpt.scaling.chinchilla import HOFFMANN_2022
    >>> copies, flops = np.array([1e8, 4e8, 2e8, 9e8]), np.array([1e10, 2e10, 8e10, 9e10])
    >>> fit = fit_step_time(0.01 + 1e-10 * copies + 2e-12 * flops, copies, flops)
    >>> shapes = Shapes(n_params=[1e6, 4e6], copies=[1e8, 4e8], flops=[1e10, 4e10])
    >>> best_shape(fit, HOFFMANN_2022, shapes, seconds=3600, tokens_per_step=8192).best
    1
    """
    sizes, copies, flops = as_columns(**vars(shapes)).values()
    each = fit.predict(copies, flops)
    if not np.all(each > 0):
        raise ValueError(
            f"seconds_per_step[{int(each.argmin())}] = {each.min():g}: the fitted times do not "
            "reach this shape; measure shapes around the candidates"
        )
    steps = np.floor(seconds / each)
    if not steps.any():
        raise ValueError(
            f"seconds = {seconds:g} is less than one step ({each.min():.3g} s): give more"
        )
    tokens = steps * tokens_per_step
    loss = np.full(len(sizes), np.inf)
    loss[steps > 0] = law.loss(sizes[steps > 0], tokens[steps > 0])
    return ShapeChoice(int(loss.argmin()), each, steps, tokens, loss)
