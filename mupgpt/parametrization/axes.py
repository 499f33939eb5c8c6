"""The one table of axes: in which ways two runs may differ, and what each is to whom.

A rule says which axes it covers, a transfer lists those that differ, a coordinate check and a
verdict grow one of them. All read this table; what a rule's powers do along an axis follows from
the quantities that grow with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from mupgpt.config.schema import TrainConfig
from mupgpt.errors import unknown
from mupgpt.parametrization.layout import count_kept, densities
from mupgpt.parametrization.words import Quantity

__all__ = ["AXES", "RULE_AXES", "AxisName", "AxisRow", "RuleAxis", "SizeAxis", "find_axis"]

RuleAxis = Literal["width", "ffn ratio", "d_head", "depth", "density"]
"""What a rule can cover."""
SizeAxis = Literal["width", "depth", "density"]
"""What a coordinate check can grow."""
AxisName = Literal[
    RuleAxis, "block", "kv groups", "context", "batch", "steps", "tokens/parameter", "vocabulary",
    "corpus",
]  # fmt: skip
"""All of them."""
RULE_AXES: tuple[RuleAxis, ...] = get_args(RuleAxis)


@dataclass(frozen=True, kw_only=True)
class AxisRow:
    """One way in which two runs may differ."""

    name: AxisName
    key: str = ""
    """What it is called in a config, dotted; empty where no single key moves it alone."""
    value: Callable[[TrainConfig], float | str]
    """Where a run stands on it: a size, or words. A ratio is target's over source's."""
    sizes: str = ""
    """The plural, where a coordinate check grows it."""
    grows: tuple[Quantity, ...] = ()
    """A rule's quantities that grow with it, but for those of d_head."""
    judged: Literal["", "up", "down"] = ""
    """Which way a sweep goes along ``key`` from proxy to target, where a verdict judges it: up; or
    down, as masks are tuned dense."""
    practice: str = ""
    """What keeping the hyperparameters along it rests on where no rule can say anything (``{rule}``
    is the rule's name); empty: on nothing."""
    beside: str = ""
    """What remains to be said once a choice of a transfer answers it."""
    formerly: str = ""
    """Its other name in version 0.1.0, still understood."""


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


def _corpus(c: TrainConfig) -> str:
    """Where a run's tokens come from, in words."""
    return f"{c.data.source} ({c.data.tokenizer})"


_EMPIRICAL = "kept; transfers in practice (arXiv 2203.03466, Table 1)"

AXES: dict[AxisName, AxisRow] = {
    row.name: row
    for row in (
        AxisRow(
            name="width",
            key="model.d_model",
            value=lambda c: c.model.d_model,
            sizes="widths",
            grows=("m_in", "m_out", "m_d"),
            judged="up",
        ),
        AxisRow(name="ffn ratio", key="model.d_ffn", value=_ffn_ratio),
        AxisRow(name="d_head", key="model.d_head", value=lambda c: c.model.d_head),
        AxisRow(
            name="depth",
            key="model.n_layer",
            value=lambda c: c.model.n_layer,
            sizes="depths",
            grows=("m_L", "2L"),
            judged="up",
        ),
        AxisRow(
            name="density",
            key="model.density",
            value=_density,
            sizes="densities",
            grows=("m_rho",),
            judged="down",
        ),
        AxisRow(name="block", value=_block),
        AxisRow(
            name="kv groups",
            key="model.n_kv_head",
            value=lambda c: c.model.n_head / c.model.n_kv_head,
        ),
        AxisRow(
            name="context",
            key="model.seq_len",
            value=lambda c: c.model.seq_len,
            judged="up",
            practice=_EMPIRICAL,
        ),
        AxisRow(
            name="batch",
            key="batch_size",
            value=lambda c: c.batch_size,
            judged="up",
            practice=f"{_EMPIRICAL}, but not between small batches (sweeps/README.md)",
            formerly="batch (sequences)",
        ),
        AxisRow(
            name="steps",
            key="steps",
            value=lambda c: c.steps,
            judged="up",
            practice="kept as rule {rule} is published: lr·λ·steps changes",
            beside="; lr kept (arXiv 2203.03466, Table 1), though the best one falls with the"
            " horizon (arXiv 2409.19913)",
            formerly="horizon",
        ),
        AxisRow(
            name="tokens/parameter",
            value=lambda c: c.tokens / count_kept(c.model),
            practice="as steps and batch",
        ),
        AxisRow(name="vocabulary", key="model.vocab_size", value=lambda c: c.model.vocab_size),
        AxisRow(name="corpus", key="data.source", value=_corpus),
    )
}
"""Every axis by name, in the order in which they are shown."""


def find_axis(name: str, kind: str = "axis") -> AxisRow:
    """The row of that name, present or former; else a `ConfigError` with the nearest one.

    >>> find_axis("horizon").key
    'steps'
    >>> find_axis("dept")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: unknown axis 'dept'; did you mean 'depth'?
    """
    for row in AXES.values():
        if name in (row.name, row.formerly) and name:
            return row
    raise unknown(kind, name, AXES)
