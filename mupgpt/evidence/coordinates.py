"""Coordinate check: do activations, gradients and updates scale with size as the rule promises?

A small GPT is trained for a few steps at several sizes, from the same seeds on the same tokens.
The root mean square of each probe follows a power of the size. Its exponent is fitted once for each
seed; the mean over the seeds must agree with what
`mupgpt.parametrization.expected_slopes` derives.

The batch is a handful of tokens on purpose. An update sums over tokens, and only its part that is
aligned with the activations follows the theory's exponents: that part leads once the widths exceed
the number of tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mupgpt.config.plain import from_dict
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import require, unknown
from mupgpt.evidence.coordinate_report import CoordCheck, find_suspects
from mupgpt.evidence.probes import Backend, measure
from mupgpt.evidence.slopes import Slope, fit_slopes
from mupgpt.parametrization.axes import AXES, SizeAxis
from mupgpt.parametrization.expected_slopes import expected_slopes
from mupgpt.parametrization.rules import Rule, get_rule
from mupgpt.parametrization.table import parametrize
from mupgpt.parametrization.words import Optimizer

__all__ = ["SEEDS", "coord_check"]

SIZES: dict[SizeAxis, tuple[float, ...]] = {
    "width": (64, 128, 256, 512),
    "depth": (2, 4, 8, 16),
    "density": (0.125, 0.25, 0.5, 1.0),
}
SEEDS = tuple(range(8))
TOKENS = {"vocab_size": 64, "seq_len": 8}
SHAPES: dict[SizeAxis, dict[str, int]] = {
    "width": {"n_layer": 2, **TOKENS},
    "depth": {"d_model": 64, **TOKENS},
    "density": {"n_layer": 2, "d_model": 256, **TOKENS},  # a row keeps more weights than tokens
}
D_HEAD, N_HEAD = 32, 2
HPARAMS = HParams(lr=6e-3, init_std=0.08, emb_mult=10.0, attn_mult=2.0, weight_decay=0.0)
TUNED: dict[Optimizer, HParams] = {
    "adamw": HPARAMS,
    "lion": HPARAMS,
    "muon": dataclasses.replace(HPARAMS, lr_mult_hidden=4.0),
    "sgd": dataclasses.replace(HPARAMS, lr=0.1, lr_mult_input=0.3),
}
"""Values at which every part of the model moves by about as much as it is large, in 10 steps."""


def coord_check(
    rule: str | Rule,
    applied: Rule | None = None,
    *,
    axis: SizeAxis = "width",
    sizes: Sequence[float] = (),
    seeds: Sequence[int] = SEEDS,
    steps: int = 10,
    shape: Mapping[str, Any] | None = None,
    hparams: HParams | None = None,
    backend: Backend = None,
) -> CoordCheck:
    """Slopes of all probes over ``sizes`` (widths, depths, densities) against the rule's exponents.

    ``applied`` is the rule that models are built and trained by, where it is not ``rule`` itself.
    ``shape`` changes fields of the smallest model's `GPTConfig`: ``{"activation": "swiglu"}``.
    Over width the check runs twice: with d_head fixed at 32, and with two heads that grow (unless
    the rule covers width alone). The smallest size is the base; over density the dense model is.
    ``hparams`` default to values that suit the rule's optimizer, ``backend`` compiles the training
    step. Gradients are not clipped. Raises `ConfigError` for fewer than three sizes or seeds, or
    fewer than 10 steps.
    """
    if axis not in SIZES:
        raise unknown("axis of a coordinate check", axis, SIZES)
    rule = get_rule(rule)
    sizes = tuple(sorted(set(sizes))) or SIZES[axis]
    seeds = tuple(dict.fromkeys(seeds))
    require(len(sizes) >= 3, AXES[axis].sizes, sizes, "be at least three")
    require(len(seeds) >= 3, "seeds", seeds, "be at least three")
    require(steps >= 10, "steps", steps, "be at least 10: early steps are not typical")
    hparams = hparams or TUNED[rule.optimizer]
    slopes: list[Slope] = []
    gaps: list[float] = []
    for setting, shapes in _settings(rule, axis, sizes, shape or {}).items():
        base = Base.of(shapes[-1 if AXES[axis].judged == "down" else 0])
        runs = []
        for model in shapes:
            table = parametrize(model, base, hparams, applied or rule)
            measures, gap = measure(model, table, seeds, steps=steps, backend=backend)
            runs.append(measures)
            gaps.append(gap)
        grows = setting == "n_head fixed"
        expected = expected_slopes(rule, axis, d_head_grows=grows, tied=shapes[0].tied)
        slopes += fit_slopes(setting, sizes, runs, expected)
    return CoordCheck(
        rule=rule.name,
        axis=axis,
        sizes=sizes,
        seeds=seeds,
        steps=steps,
        slopes=tuple(slopes),
        generation_gap=max(gaps),
        suspects=find_suspects(slopes, max(gaps)),
    )


def _settings(
    rule: Rule, axis: SizeAxis, sizes: Sequence[float], shape: Mapping[str, Any]
) -> dict[str, list[GPTConfig]]:
    """Shapes of each run, by what stays fixed."""
    field = AXES[axis].key.removeprefix("model.")
    require(
        field not in shape, f"shape.{field}", shape.get(field), f"be left to {AXES[axis].sizes}"
    )
    first = {**SHAPES[axis], field: sizes[0], **shape}
    heads = {} if "n_head" in shape else {"d_head": D_HEAD}
    if axis != "width":
        given = ({**heads, **first, field: size} for size in sizes)
        return {axis: [from_dict(GPTConfig, fields, "shape") for fields in given]}
    small = from_dict(GPTConfig, {**heads, **first}, "shape")
    settings = {"d_head fixed": [small.widen(int(size)) for size in sizes]}
    if "d_head" in rule.covers or not rule.covers:  # a control is held against everything
        fixed = {"n_head": N_HEAD, **first, "d_head": 0}
        small = from_dict(GPTConfig, fixed, "shape")
        settings["n_head fixed"] = [_with_wider_heads(small, int(size)) for size in sizes]
    return settings


def _with_wider_heads(model: GPTConfig, d_model: int) -> GPTConfig:
    """``model`` at another width with as many heads."""
    ratio = d_model / model.d_model
    d_head, d_ffn = int(model.d_head * ratio), int(model.d_ffn * ratio)
    return dataclasses.replace(model, d_model=d_model, d_head=d_head, d_ffn=d_ffn)
