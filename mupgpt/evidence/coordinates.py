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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from mupgpt.config.plain import from_dict
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import require
from mupgpt.evidence.probes import Backend, Measures, measure
from mupgpt.parametrization.expected_slopes import Axis, Exponent, expected_slopes
from mupgpt.parametrization.rules import Optimizer, Rule, get_rule
from mupgpt.parametrization.table import parametrize

__all__ = ["PLURAL", "SEEDS", "CoordCheck", "Slope", "coord_check", "fit_slopes"]

ALLOWANCE = 0.15
"""Error of a slope that finite widths are forgiven; a wrong exponent is wrong by 1/2 or 1."""
CONFIDENCE = 0.9973
"""Two-sided level of Student's t: three standard errors with many seeds, more with few."""
MAX_ERROR = 0.25
"""Standard error beyond which a slope could not tell a wrong exponent from a right one."""
AGREEMENT = 1e-3
"""Nats by which a token's loss may differ between training and generation."""

SIZES: dict[Axis, tuple[float, ...]] = {
    "width": (64, 128, 256, 512),
    "depth": (2, 4, 8, 16),
    "density": (0.125, 0.25, 0.5, 1.0),
}
FIELD: dict[Axis, str] = {"width": "d_model", "depth": "n_layer", "density": "density"}
PLURAL: dict[str, str] = {"width": "widths", "depth": "depths", "density": "densities"}
SEEDS = tuple(range(8))
SEQUENCES = 2
TOKENS = {"vocab_size": 64, "seq_len": 8}
SHAPES: dict[Axis, dict[str, int]] = {
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


@dataclass(frozen=True, kw_only=True)
class Slope:
    """One probe's exponent of size."""

    setting: str
    """What stays fixed while the width grows (``d_head fixed``, ``n_head fixed``), or ``depth``."""
    measure: str
    """``weights init change gradient step update`` or ``damping``: see
    `mupgpt.evidence.probes.measure`."""
    probe: str
    """``emb``, a matmul's output, ``scores``, ``residual.*``, ``logits``; or a role."""
    by_seed: tuple[float, ...]
    """Slope of log2 RMS against log2 size, one a seed."""
    expected: float
    """The exponent that the rule promises, the highest where several agree with it."""
    lowest: float
    """The lowest one."""
    log2_rms: tuple[float, ...]
    """Mean over the seeds, one a size."""

    @property
    def slope(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return float(np.std(self.by_seed, ddof=1) / math.sqrt(len(self.by_seed)))

    @property
    def deviation(self) -> np.ndarray:
        """Slope less the nearest exponent that the rule allows, one a seed."""
        slopes = np.array(self.by_seed)
        return slopes - slopes.clip(self.lowest, self.expected)

    @property
    def ok(self) -> bool:
        """Whether slope and exponent agree, and the seeds do."""
        return self.se <= MAX_ERROR and is_zero(self.deviation)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a number that is not finite (a run diverged) is None."""
        return {
            "setting": self.setting,
            "measure": self.measure,
            "probe": self.probe,
            "slope": _finite(self.slope),
            "se": _finite(self.se),
            "expected": self.expected,
            "lowest": self.lowest,
            "ok": self.ok,
        }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def is_zero(deviation: np.ndarray) -> bool:
    """Whether the mean of one deviation a seed is within t·se + `ALLOWANCE` of 0.

    >>> is_zero(np.array([0.1, 0.12, 0.11])), is_zero(np.array([0.5, 0.52, 0.51]))
    (True, False)
    """
    n = len(deviation)
    t = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return bool(abs(deviation.mean()) <= ALLOWANCE + t * deviation.std(ddof=1) / math.sqrt(n))


@dataclass(frozen=True)
class Witness:
    """Where a broken part of a rule shows first, apart from errors that reach it from elsewhere."""

    part: str
    """Field and key of the `Rule`."""
    says: str
    probe: tuple[str, str]
    less: tuple[tuple[str, str], ...] = ()
    """Measures whose deviations reach this one and are subtracted."""


ROLES = {
    "input": "embeddings",
    "hidden": "hidden matrices",
    "output": "readout's weight",
    "bias": "biases",
    "norm": "norms",
}
WITNESSES = (
    *(
        Witness(f"init_std.{role}", f"initial std of the {ROLES[role]}", ("weights", role))
        for role in ("input", "hidden", "output")
    ),
    Witness(
        "residual_out_std",
        "initial std of matrices that write into the residual stream",
        ("weights", "residual_out"),
        (("weights", "hidden"),),
    ),
    Witness("forward.emb", "embedding multiplier", ("init", "emb"), (("weights", "input"),)),
    Witness(
        "forward.attn",
        "attention multiplier: scores go as 1/d_head, not as 1/√d_head",
        ("init", "scores"),
        (("init", "q"), ("init", "k")),
    ),
    Witness("forward.residual", "residual multipliers", ("init", "branch"), (("init", "down"),)),
    Witness("forward.readout", "readout multiplier", ("init", "logits"), (("weights", "head"),)),
    *(
        Witness(f"lr.{role}", f"learning rate of the {says}", (measured, role), less)
        for role, says in ROLES.items()
        for measured, less in (("step", (("damping", role),)), ("rate", ()))
    ),
    *(
        Witness("eps", "Adam's ε, which must move as gradients do", ("damping", kind))
        for kind in (*ROLES, "qk")
    ),
)


@dataclass(frozen=True, kw_only=True)
class CoordCheck:
    """Whether a model scales as its rule promises, and else which part is most likely broken."""

    rule: str
    axis: str
    sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    slopes: tuple[Slope, ...]
    generation_gap: float
    """Nats by which generation's loss of a token differs from training's, at most."""
    suspects: Mapping[str, str]
    """Part that is broken → what it is, the likeliest first."""

    @property
    def passed(self) -> bool:
        """Whether every slope agrees with the rule, and generation with training."""
        return self.generation_gap <= AGREEMENT and all(slope.ok for slope in self.slopes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passed": self.passed,
            "rule": self.rule,
            "suspects": list(self.suspects),
            "suspects_are": dict(self.suspects),
            "axis": self.axis,
            "sizes": list(self.sizes),
            "seeds": list(self.seeds),
            "steps": self.steps,
            "allowance": ALLOWANCE,
            "generation_gap": _finite(self.generation_gap),
            "probes": [slope.to_dict() for slope in self.slopes],
        }

    def __str__(self) -> str:
        settings = dict.fromkeys(slope.setting for slope in self.slopes)
        rows: dict[str, dict[str, Slope]] = {}
        for slope in self.slopes:
            rows.setdefault(f"{slope.measure:<10}{slope.probe:<14}", {})[slope.setting] = slope
        lines = [
            f"{self.rule}: slopes of log2 RMS over log2 {self.axis} "
            f"({', '.join(f'{s:g}' for s in self.sizes)}), {len(self.seeds)} seeds, "
            f"{self.steps} steps",
            f"{'':24}" + "".join(f"{setting:<32}" for setting in settings),
            f"{'measure':<10}{'probe':<14}" + f"{'slope ± se':<15}{'expected':<17}" * len(settings),
        ]
        for name, cells in rows.items():
            lines.append((name + "".join(_cell(cells[setting]) for setting in settings)).rstrip())
        lines.append(f"generation differs from training by {self.generation_gap:.1g} nats a token")
        lines += [f"likely broken: {part} ({says})" for part, says in self.suspects.items()]
        lines.append(f"{self.rule}: {'PASSED' if self.passed else 'FAILED'}")
        return "\n".join(lines)


def _cell(slope: Slope) -> str:
    low = f"{slope.lowest:+.1f} … " if slope.lowest < slope.expected else ""
    expected = f"{low}{slope.expected:+z.1f}"
    mark = "" if slope.ok else "off"
    return f"{slope.slope:+.2f} ± {slope.se:<7.3f}{expected:<12}{mark:<5}"


def coord_check(
    rule: str | Rule,
    applied: Rule | None = None,
    *,
    axis: Axis = "width",
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
    fewer than 10 steps. The method is Yang et al.'s (2022, arXiv 2203.03466, appendix D.1).

    >>> coord_check("mup", sizes=(64, 128))
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: widths = (64, 128): must be at least three
    """
    rule = get_rule(rule)
    sizes = tuple(sorted(set(sizes))) or SIZES[axis]
    seeds = tuple(dict.fromkeys(seeds))
    require(len(sizes) >= 3, PLURAL[axis], sizes, "be at least three")
    require(len(seeds) >= 3, "seeds", seeds, "be at least three")
    require(steps >= 10, "steps", steps, "be at least 10: early steps are not typical")
    hparams = hparams or TUNED[rule.optimizer]
    slopes: list[Slope] = []
    gaps: list[float] = []
    for setting, shapes in _settings(rule, axis, sizes, shape or {}).items():
        base = Base.of(shapes[-1 if axis == "density" else 0])
        runs = []
        for model in shapes:
            table = parametrize(model, base, hparams, applied or rule)
            measures, gap = measure(
                model, table, seeds, sequences=SEQUENCES, steps=steps, backend=backend
            )
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
        suspects=_suspects(slopes, max(gaps)),
    )


def _settings(
    rule: Rule, axis: Axis, sizes: Sequence[float], shape: Mapping[str, Any]
) -> dict[str, list[GPTConfig]]:
    """Shapes of each run, by what stays fixed."""
    field = FIELD[axis]
    require(field not in shape, f"shape.{field}", shape.get(field), f"be left to {PLURAL[axis]}")
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


def fit_slopes(
    setting: str,
    sizes: Sequence[float],
    runs: Sequence[Measures],
    expected: Mapping[str, Mapping[str, Exponent]],
) -> Iterator[Slope]:
    """A slope for each probe that all sizes have and the rule speaks of."""
    x = torch.tensor(sizes, dtype=torch.float64).log2()
    x -= x.mean()
    for measured, probe in runs[0]:
        exponents = expected.get(measured, {})
        exponent = exponents.get(probe, exponents.get(probe.split(".")[0]))
        if exponent is None or any((measured, probe) not in run for run in runs):
            continue
        y = torch.stack([run[measured, probe] for run in runs]).double()
        if not y.any():
            continue  # what starts at zero has no power of the size
        y = y.log2()
        y[~y.isfinite()] = math.nan  # a run that diverged
        low, high = exponent if isinstance(exponent, tuple) else (exponent, exponent)
        yield Slope(
            setting=setting,
            measure=measured,
            probe=probe,
            by_seed=tuple((x @ y / (x @ x)).tolist()),
            expected=high,
            lowest=low,
            log2_rms=tuple(y.mean(dim=1).tolist()),
        )


def _suspects(slopes: Sequence[Slope], gap: float) -> dict[str, str]:
    """Parts whose witness is off, the one that is off by most first; if none is, where it shows."""
    off: dict[Witness, float] = {}
    for setting in dict.fromkeys(slope.setting for slope in slopes):
        found = {(s.measure, s.probe): s.deviation for s in slopes if s.setting == setting}
        found["weights", "head"] = found.get(("weights", "output"), found["weights", "input"])
        for witness in WITNESSES:
            if witness.probe in found:
                excess = found[witness.probe] - sum(found.get(probe, 0.0) for probe in witness.less)
                if not is_zero(excess):
                    off[witness] = max(off.get(witness, 0.0), abs(float(excess.mean())))
    named = {w.part: w.says for w in sorted(off, key=lambda w: -off[w])}
    if gap > AGREEMENT:
        named = {"generation": "it does not apply the multipliers that training applies", **named}
    shown = [s for s in slopes if not s.ok]
    if shown and not named:
        named[f"{shown[0].measure} {shown[0].probe}"] = "no single part of the rule explains it"
    return named
