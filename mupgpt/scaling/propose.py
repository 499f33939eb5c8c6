"""What to train on a budget: shape, tokens, batch, steps and schedule, and the loss to expect.

Every number rests on a named law, published figure or stated default; a proposal lists them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import GPTConfig, Prediction, Schedule, TrainConfig
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.layout import count_params
from mupgpt.presets import PRESETS
from mupgpt.resolve import train_config
from mupgpt.scaling.batch import fit_batch_law
from mupgpt.scaling.chinchilla import (
    HOFFMANN_2022,
    REPLICATION_2024,
    ChinchillaFit,
    ChinchillaLaw,
    Optimum,
)
from mupgpt.scaling.inference import inference_optimum
from mupgpt.scaling.resample import Interval

__all__ = ["Budget", "Proposal", "propose", "shape_of"]

PEAK_FLOPS = 989e12  # bf16 without sparsity, H100 and H200 (NVIDIA's data sheets)
MFU = 0.4
ASPECT = (64, 128)  # d_model per layer; the seven Cerebras-GPT shapes have 77 to 128
HEADS = ((128, 2048), (64, 512), (32, 0))  # d_head, and the d_model from which on it is taken
WARMUP_TOKENS = 375_000_000  # Cerebras-GPT (arXiv 2304.03208)
# Scatter of single runs around the published constants: the Huber sum of the replication's fit,
# .0010183 on 240 runs at δ = 1e-3, is a mean |ln L_fit − ln L| of .0047; a normal error with that
# mean stays within 2.46 times it in 95 % of runs.
PUBLISHED_SCATTER = 2.46 * 0.0047
PUBLISHED_SIZES = (5.7e7, 1.6e10)  # parameters of these runs
CARDS = [preset for preset in PRESETS.values() if preset.card]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent; exactly one of FLOPs, GPU hours and a loss, or inference alone.

    With ``inference_tokens`` the model is the cheapest over its life that reaches the loss of the
    training-optimal model of that budget.
    """

    flops: float = 0.0
    """Training FLOPs, 6·N·D."""
    hours: float = 0.0
    """Hours on ``gpus`` accelerators."""
    gpus: int = 1
    peak_flops: float = PEAK_FLOPS
    """Peak FLOP/s of one accelerator."""
    mfu: float = MFU
    """Share of the peak that training reaches."""
    loss: float = 0.0
    """The loss to reach, nats per token."""
    inference_tokens: float = 0.0
    """Tokens that the model will read and write in its life, 2·N FLOPs each."""

    def __post_init__(self) -> None:
        given = [name for name in ("flops", "hours", "loss") if getattr(self, name)]
        if len(given) > 1 or not (given or self.inference_tokens):
            raise ConfigError(
                f"budget = {' and '.join(given) or 'nothing'}: give one of --flops, --hours (with "
                "--gpus) or --loss, and --inference-tokens beside it or alone"
            )
        for name, value in asdict(self).items():
            require(0 <= value < math.inf, name, value, "be finite and not negative")
        for name in ("gpus", "peak_flops"):
            require(getattr(self, name) > 0, name, getattr(self, name), "be > 0")
        require(0 < self.mfu <= 1, "mfu", self.mfu, "be a share of the peak in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A run to train, the loss to expect of it, and everything that this rests on."""

    config: TrainConfig
    n_params: int
    tokens: int
    flops: float
    """Training FLOPs, 6·N·D."""
    loss: float
    interval: Interval
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``config`` is what `train_config` accepts."""
        c = self.config
        return {
            "n_params": self.n_params,
            "tokens": self.tokens,
            "tokens_per_param": self.tokens / self.n_params,
            "flops": self.flops,
            "flops_convention": "6N",
            "batch_size": c.batch_size,
            "steps": c.steps,
            "loss": self.loss,
            "loss_interval": list(self.interval),
            "assumptions": list(self.assumptions),
            "config": to_dict(c),
        }

    def __str__(self) -> str:
        c, m, (low, high) = self.config, self.config.model, self.interval
        lines = [
            f"{self.n_params:,} parameters: {m.n_layer} layers of {m.d_model}, "
            f"{m.n_head} heads of {m.d_head}, FFN {m.d_ffn}",
            f"{self.tokens:,} tokens ({self.tokens / self.n_params:.3g} per parameter), "
            f"{self.flops:.3g} FLOPs (6N)",
            f"{c.steps:,} steps of {c.batch_size:,} × {m.seq_len:,} tokens; schedule "
            f"{c.schedule.shape} to {c.schedule.end:g}, warm-up {100 * c.schedule.warmup:.3g} %",
            f"expected loss {self.loss:.4f} [{low:.4f}, {high:.4f}] nats per token",
        ]
        return "\n".join([*lines, "assumed", *(f"  {line}" for line in self.assumptions)])


def propose(
    budget: Budget,
    *,
    like: str = "cerebras-gpt-40m",
    fit: ChinchillaFit | None = None,
    batch_size: int = 0,
) -> Proposal:
    """What to train on ``budget``, and the loss that it should reach.

    The law is ``fit``, or without one the published constants of Chinchilla's law (arXiv
    2404.10102 on the runs of 2203.15556). ``like`` is the preset whose vocabulary, context, data,
    base, rule and hyperparameters are taken; ``batch_size`` in sequences replaces the batch law.

    Raises ConfigError for a budget that no shape meets.

    >>> proposal = propose(Budget(flops=1e21))
    >>> proposal.config.model.d_model, proposal.config.model.n_layer, proposal.config.batch_size
    (2560, 34, 568)
    """
    law, law_lines = _law(fit)
    best, best_lines = _best(budget, law)
    recipe = _recipe(like)
    model = shape_of(best.n_params, recipe.model)
    n_params = count_params(model)
    tokens = best.flops / (6 * n_params)  # the shape is not exactly N*: the budget is kept, not D*
    batch = batch_size or _batch(tokens, model.seq_len)
    steps = round(tokens / (batch * model.seq_len))
    require(steps > 0, "batch_size", batch, f"leave one step of the {tokens:.3g} tokens")
    config = _run(recipe, model, batch, steps)
    loss, interval = _expected(law, fit, n_params, config.tokens)
    if fit is not None:  # published constants are of other text: no band to hold a run against
        config = dataclasses.replace(config, prediction=_prediction(loss, interval))
    return Proposal(
        config=config,
        n_params=n_params,
        tokens=config.tokens,
        flops=6.0 * n_params * config.tokens,
        loss=loss,
        interval=interval,
        assumptions=(*law_lines, *_range(fit, n_params), *best_lines, *_assumed(like, batch_size)),
    )


def _recipe(like: str) -> TrainConfig:
    if like not in PRESETS:
        raise unknown("preset", like, PRESETS)
    return train_config({"model": like})


def _prediction(loss: float, interval: Interval) -> Prediction:
    low, high = min(loss, interval.low), max(loss, interval.high)
    return Prediction(loss=loss, low=low, high=high, source="chinchilla on given runs")


def _law(fit: ChinchillaFit | None) -> tuple[ChinchillaLaw, tuple[str, ...]]:
    if fit is not None:
        law = fit.law
        constants = ", ".join(f"{name} {value:.4g}" for name, value in asdict(law).items())
        return law, (
            f"law: L(N, D) fitted to {len(fit.residuals)} given runs ({constants}); its interval is"
            " for one new run",
            *fit.notes,
        )
    return REPLICATION_2024, (
        "law: L(N, D) with the constants of arXiv 2404.10102, fitted to 240 runs of arXiv "
        "2203.15556 on their text and vocabulary: on other text the level differs (--runs fits "
        "your own)",
        "interval: spans these constants and those of arXiv 2203.15556 itself, widened by the "
        f"{100 * PUBLISHED_SCATTER:.2g} % within which 95 % of single runs lie around the fit",
    )


def _range(fit: ChinchillaFit | None, n_params: int) -> tuple[str, ...]:
    low, high = PUBLISHED_SIZES
    if fit is not None or low <= n_params <= high:
        return ()
    return (f"warning: {n_params:.3g} parameters lie outside the {low:.2g} to {high:.2g} of the "
            "runs of these constants: loss and interval are extrapolated",)  # fmt: skip


def _best(budget: Budget, law: ChinchillaLaw) -> tuple[Optimum, tuple[str, ...]]:
    """The N and D to train, and how the budget led there."""
    flops, lines = _flops(budget, law)
    least = law.optimum(flops) if flops else None
    target = budget.loss or (least.loss if least else 0.0)
    if least is not None and not budget.inference_tokens:
        return least, (*lines, "N and D: least loss at C = 6ND (arXiv 2203.15556)")
    try:
        found = inference_optimum(law, target, output_tokens=budget.inference_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    optimum = Optimum(found.flops, found.n_params, found.tokens, target)
    return optimum, (
        *lines,
        f"N and D: least 6ND + 2N·{budget.inference_tokens:.3g} at loss {target:.4f} "
        f"(arXiv 2401.00448, one price per FLOP); {100 * found.saving:.2g} % below the "
        "training-optimal model's bill",
    )


def _flops(budget: Budget, law: ChinchillaLaw) -> tuple[float, tuple[str, ...]]:
    if budget.flops or budget.loss:
        return budget.flops, ()
    if budget.hours:
        flops = budget.hours * 3600 * budget.gpus * budget.peak_flops * budget.mfu
        return flops, (
            f"{flops:.3g} training FLOPs: {budget.hours:g} h on {budget.gpus} accelerators of "
            f"{budget.peak_flops:.3g} FLOP/s peak (--peak-flops) at an MFU of {budget.mfu:g} "
            "(--mfu, 6N convention)",
        )
    # 6ND = 2N·T where D = T/3, and the optimal D is a power of C.
    share = law.alpha / (law.alpha + law.beta)
    flops = (budget.inference_tokens / 3 / law.optimum(1.0).tokens) ** (1 / share)
    return flops, (
        f"{flops:.3g} training FLOPs: as much as using the training-optimal model costs, since "
        "no budget was given (--flops, --hours or --loss)",
    )


def shape_of(n_params: float, like: GPTConfig) -> GPTConfig:
    """The shape nearest to ``n_params`` with 64 to 128 of width per layer.

    Vocabulary, context, biases and tying are those of ``like``; heads are 128 wide from a d_model
    of about 2048 on, 64 from 512 on, else 32.

    >>> like = PRESETS["cerebras-gpt-40m"].shape
    >>> shape = shape_of(13e9, like)
    >>> shape.n_layer, shape.d_model, shape.n_head
    (53, 4480, 35)
    """
    guess = (n_params * math.sqrt(ASPECT[0] * ASPECT[1]) / 12) ** (1 / 3)  # N = 12·L·d²
    head = next(head for head, least in HEADS if guess >= least)
    widths = range(head, head * (2 + math.ceil(1.6 * guess / head)), head)
    shapes = [_shape(like, layers, width, head) for width in widths for layers in _depths(width)]
    middle = math.log(math.sqrt(ASPECT[0] * ASPECT[1]))

    def miss(shape: GPTConfig) -> float:
        # A percent of size weighs as much as a factor of two in aspect.
        off = abs(math.log(count_params(shape) / n_params))
        return 70 * off + abs(math.log(shape.d_model / shape.n_layer) - middle)

    return min(shapes, key=miss)


def _depths(width: int) -> range:
    least, most = (max(2, round(width / aspect)) for aspect in reversed(ASPECT))
    return range(least, most + 1)


def _shape(like: GPTConfig, layers: int, width: int, head: int) -> GPTConfig:
    derived = {"n_head": 0, "n_kv_head": 0, "d_head": head, "d_ffn": 4 * width}
    return dataclasses.replace(like, n_layer=layers, d_model=width, **derived)


def _batch(tokens: float, seq_len: int) -> int:
    """Sequences per step: the power of D through the seven Cerebras-GPT recipes, in eights."""
    spent = [p.recipe["steps"] * p.recipe["batch_size"] * p.shape.seq_len for p in CARDS]
    sizes = [p.recipe["batch_size"] * p.shape.seq_len for p in CARDS]
    found = float(fit_batch_law(spent, sizes).predict(tokens=tokens)[0]) / seq_len
    return max(1, round(found / 8) * 8 or round(found))


def _run(recipe: TrainConfig, model: GPTConfig, batch: int, steps: int) -> TrainConfig:
    few = 2 / (1 - recipe.hparams.beta2)  # the second moment must have settled
    warm = min(0.1 * steps, WARMUP_TOKENS / (batch * model.seq_len))
    warmup = min(0.5, max(few, warm) / steps)
    schedule = Schedule(shape="linear", warmup=warmup, end=0.0)
    return dataclasses.replace(
        recipe, model=model, batch_size=batch, steps=steps, schedule=schedule
    )


def _expected(
    law: ChinchillaLaw, fit: ChinchillaFit | None, n_params: int, tokens: int
) -> tuple[float, Interval]:
    loss = float(law.loss(n_params, tokens))
    if fit is not None:
        return loss, fit.predict_interval(n_params, tokens)
    other = float(HOFFMANN_2022.loss(n_params, tokens))
    ends = min(loss, other), max(loss, other)
    wide = math.exp(PUBLISHED_SCATTER)
    return loss, Interval(ends[0] / wide, ends[1] * wide)


def _assumed(like: str, batch_size: int) -> tuple[str, ...]:
    preset = PRESETS[like]
    batch = "batch: as given" if batch_size else (
        "batch: power law in D through the seven Cerebras-GPT recipes (arXiv 2304.03208)"
    )  # fmt: skip
    return (
        f"shape: {ASPECT[0]} to {ASPECT[1]} of width per layer, as the Cerebras-GPT shapes",
        batch,
        "schedule: linear to zero (arXiv 2502.15938); warm-up of 375M tokens as Cerebras-GPT, at "
        "most 10 % of the run",
        f"vocabulary, context, data, base, rule {preset.rule} and hyperparameters: preset {like}; "
        "`mupgpt transfer SWEEP --to FILE` puts your own in their place",
    )
