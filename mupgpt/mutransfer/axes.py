"""In which ways two runs differ, and what each difference rests on."""

from dataclasses import dataclass
from typing import Any, Literal

from mupgpt.config.schema import TrainConfig
from mupgpt.mutransfer.choices import Choice, chosen
from mupgpt.parametrization.layout import count_kept, densities
from mupgpt.parametrization.rules import Rule, get_rule

__all__ = ["AXES", "Axis", "axes_between", "corpus_name"]

Status = Literal["covered", "heuristic", "unsupported"]

AXES = ("width", "ffn ratio", "d_head", "depth", "density", "block", "kv groups", "context",
        "batch (sequences)", "steps", "tokens/parameter", "vocabulary", "corpus")  # fmt: skip
"""Names of all axes, in the order in which they are shown."""


@dataclass(frozen=True)
class Axis:
    """One way in which source and target may differ, and what covers it."""

    name: str
    source: float | str
    target: float | str
    status: Status
    by: str

    @property
    def differs(self) -> bool:
        """Whether source and target do differ."""
        return self.source != self.target

    @property
    def ratio(self) -> float | None:
        """Target over source, where that means something."""
        a, b = self.source, self.target
        return b / a if isinstance(a, int | float) and isinstance(b, int | float) else None


def axes_between(
    a: TrainConfig, b: TrainConfig, choices: tuple[Choice, ...] | None = None
) -> list[Axis]:
    """Every axis on which two runs may differ, with what the rule of ``a`` says of it.

    ``choices`` are those of a transfer; None: those that the rule comes with.
    """
    rule = get_rule(a.rule)
    choices = chosen(rule) if choices is None else choices
    empirical = "kept; transfers in practice (arXiv 2203.03466, Table 1)"
    batch = f"{empirical}, but not between small batches (sweeps/README.md)"
    batch = _by_choice(choices, "batch (sequences)") or batch
    horizon = f"kept as rule {rule.name} is published: lr·λ·steps changes"
    if said := _by_choice(choices, "steps"):
        horizon = f"{said}; lr kept (arXiv 2203.03466, Table 1), though the best one falls with the"
        horizon += " horizon (arXiv 2409.19913)"
    nothing = "no rule; the optimum may move"
    rows: list[tuple[str, Any, Any, Status, str]] = [
        ("width", a.model.d_model, b.model.d_model, *_by_rule(rule, "width")),
        ("ffn ratio", _ffn_ratio(a), _ffn_ratio(b), *_by_rule(rule, "ffn ratio")),
        ("d_head", a.model.d_head, b.model.d_head, *_by_rule(rule, "d_head")),
        ("depth", a.model.n_layer, b.model.n_layer, *_by_rule(rule, "depth")),
        ("density", _density(a), _density(b), *_by_rule(rule, "density")),
        ("block", _block(a), _block(b), "unsupported", nothing),
        ("kv groups", _kv_groups(a), _kv_groups(b), "unsupported", nothing),
        ("context", a.model.seq_len, b.model.seq_len, "heuristic", empirical),
        ("batch (sequences)", a.batch_size, b.batch_size, "heuristic", batch),
        ("steps", a.steps, b.steps, "heuristic", horizon),
        ("tokens/parameter", _tokens_per_param(a), _tokens_per_param(b), "heuristic",
         "as steps and batch"),
        ("vocabulary", a.model.vocab_size, b.model.vocab_size, "unsupported", nothing),
        ("corpus", corpus_name(a), corpus_name(b), "unsupported", nothing),
    ]  # fmt: skip
    return [Axis(*row) for row in rows]


def _by_choice(choices: tuple[Choice, ...], axis: str) -> str:
    """What the choices say of an axis."""
    return "; ".join(f"{c.says} ({c.source})" for c in choices if axis in c.axes)


def _by_rule(rule: Rule, axis: str) -> tuple[Status, str]:
    """What ``rule`` says of an axis: its status, and what that rests on."""
    if axis in rule.covers:
        return "covered", rule.source
    if axis in rule.practice:
        return "heuristic", rule.practice[axis]
    says = "says nothing" if rule.covers else "is a control"
    return "unsupported", f"rule {rule.name} {says}"


def _ffn_ratio(c: TrainConfig) -> float:
    return c.model.d_ffn / c.model.d_model


def _density(c: TrainConfig) -> float | str:
    """The share of weights that masks keep; in words where groups differ."""
    kept = densities(c.model)
    same = kept["attn"] == kept["mlp"]
    return kept["attn"] if same else ", ".join(f"{g} {share:g}" for g, share in kept.items())


def _block(c: TrainConfig) -> str:
    """The kind of block in words."""
    m = c.model
    said = {"qk-norm": m.qk_norm, "biases": m.bias, "untied head": not m.tied}
    return " ".join([m.positions, m.norm, m.activation, *(name for name in said if said[name])])


def _kv_groups(c: TrainConfig) -> float:
    return c.model.n_head / c.model.n_kv_head


def _tokens_per_param(c: TrainConfig) -> float:
    return c.tokens / count_kept(c.model)


def corpus_name(c: TrainConfig) -> str:
    """Where a run's tokens come from, in words."""
    return f"{c.data.source} ({c.data.tokenizer})"
