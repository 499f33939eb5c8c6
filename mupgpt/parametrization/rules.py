"""Parametrizations as literals: exponents of ratios, for each role and each point of the forward.

A rule says by which power of which quantity a base value is multiplied. The quantities are

    m_in   fan-in ratio of the parameter (target over base)
    m_out  fan-out ratio of the parameter
    m_d    d_model ratio
    m_L    depth ratio
    m_rho  density ratio of the parameter: the share of its weights that a static mask keeps
    m_dh   d_head ratio
    d_head, 2L   absolute: the target's head width, twice its depth

so ``{"m_in": -0.5}`` reads "divided by the square root of the fan-in ratio". A role that a
literal does not name keeps the base value, and a word that is none of a rule's is refused. No other
code knows an exponent; what a coordinate check must find under them is derived in
`mupgpt.parametrization.expected_slopes`.

A rule of your own is another literal. This one, µP without its attention, makes of a preset:

>>> from mupgpt.parametrization.table import parametrize
>>> from mupgpt.resolve import train_config
>>> mine = Rule(
...     name="mine", source="Yang et al. 2022 (arXiv 2203.03466, Table 8), attention as ever",
...     init_std={"hidden": {"m_in": -0.5}}, lr={"hidden": {"m_in": -1}},
...     forward={"readout": {"m_d": -1}},
... )
>>> c = train_config({"model": "cerebras-gpt-13b"})
>>> row = parametrize(c.model, c.base, c.hparams, mine).site("blocks.*.mlp.up.weight")
>>> print(f"{row.init_std:.4f} {row.lr:.4f} {row.why}")
0.0179 0.0003 std ÷√20 (m_in); lr ÷20 (m_in)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mupgpt.errors import unknown
from mupgpt.parametrization.axes import RuleAxis
from mupgpt.parametrization.grammar import CHECKS
from mupgpt.parametrization.words import Optimizer, Point, Power, Quantity, Role

__all__ = ["RULES", "Rule", "get_rule"]

WIDTH: tuple[RuleAxis, ...] = ("width", "ffn ratio", "d_head")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parametrization. Each mapping goes from a role (or a forward point) to a `Power`.

    Raises `ConfigError` for a word, an exponent or a type that is none of a rule's:

    >>> Rule(name="mine", source="here", lr={"hiden": {"m_in": -1}})
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: rule 'mine', lr: unknown role 'hiden'; did you mean 'hidden'?
    """

    name: str
    """Its name in configs and on the command line."""
    source: str
    """Where it is defined."""
    optimizer: Optimizer = "adamw"
    """What turns gradients into steps. ``muon`` is for the matrices inside blocks; embeddings,
    readout, biases and norms stay with AdamW. β₁ is the momentum of ``sgd`` and ``muon``."""
    init_std: Mapping[Role, Power] = field(default_factory=dict)
    """Role → power of the initial standard deviation."""
    residual_out_std: Power = field(default_factory=dict)
    """Further power for matrices that write into the residual stream."""
    lr: Mapping[Role, Power] = field(default_factory=dict)
    """Role → power of the learning rate."""
    block_lr: Power = field(default_factory=dict)
    """Further power of the learning rate of everything inside blocks."""
    weight_decay: Mapping[Role, Power] = field(default_factory=dict)
    """Role → power of the weight decay λ."""
    decayed: tuple[Role, ...] = ("input", "hidden", "output")
    """Roles that are decayed at all."""
    eps: Power = field(default_factory=dict)
    """Power of Adam's ε, in every group."""
    block_eps: Power = field(default_factory=dict)
    """Further power of ε inside blocks."""
    forward: Mapping[Point, Power] = field(default_factory=dict)
    """Forward point (``emb attn residual.attn residual.mlp readout``) → power of its multiplier,
    of the model's quantities alone. ``attn`` multiplies q in front of softmax(q·k/√d_head)."""
    truncated: bool = False
    """Normal cut at ±2σ (elements beyond are drawn again), without correcting the std."""
    covers: tuple[RuleAxis, ...] = WIDTH
    """Axes (``width``, ``ffn ratio``, ``d_head``, ``depth``, ``density``) over which the source
    says that hyperparameters stay; a control covers none."""
    practice: Mapping[RuleAxis, str] = field(default_factory=dict)
    """Axis that no theory of the source covers → what a transfer along it rests on."""
    keeps_decay_time: bool = True
    """Whether lr·λ of a matrix is the same at every width, so that a transfer can keep
    lr·λ·steps by moving λ alone (Wang & Aitchison, arXiv 2405.13698)."""

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            check(f"rule {self.name!r}, {name}", getattr(self, name))

    @property
    def quantities(self) -> set[Quantity]:
        """Every quantity of which it has some power."""
        by_name = (self.init_std, self.lr, self.weight_decay, self.forward)
        powers = [power for powers in by_name for power in powers.values()]
        powers += [self.residual_out_std, self.block_lr, self.eps, self.block_eps]
        return {quantity for power in powers for quantity in power}


_GPT2_RESIDUAL: Power = {"2L": -0.5}  # Radford et al. 2019: residual outputs ÷ √(2L)
_GPT2_DEPTH: Mapping[RuleAxis, str] = {
    "depth": "1/√(2L) at initialization alone, as Cerebras-GPT went from 24 to 10…40 layers"
    " (arXiv 2304.03208)"
}

_SP = Rule(
    name="sp",
    source="the control: constant std and lr (GPT-2)",
    residual_out_std=_GPT2_RESIDUAL,
    covers=(),
    practice=_GPT2_DEPTH,
)

_SP_FANIN = Rule(
    name="sp-fanin",
    source="the control of mup's own plots: std ∝ 1/√fan_in, constant lr",
    init_std={"hidden": {"m_in": -0.5}, "output": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    covers=(),
    practice=_GPT2_DEPTH,
)

_MUP = Rule(
    name="mup",
    source="Yang et al. 2022 (arXiv 2203.03466, Table 8) with λ and ε scaled",
    init_std={"hidden": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    lr={"hidden": {"m_in": -1}},
    weight_decay={"hidden": {"m_in": 1}},
    eps={"m_d": -1},  # under the 1/m readout every gradient shrinks as 1/width
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    practice=_GPT2_DEPTH,
)

_MUP_CONSTANT_LR = replace(
    _MUP,
    name="mup-constant-lr",
    source="a control with one mistake: mup whose hidden learning rate is not divided",
    lr={},
    covers=(),
)

_CEREBRAS = Rule(
    name="cerebras",
    source="Cerebras-GPT (arXiv 2304.03208, appendix G, Table 14), as published",
    init_std={"hidden": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    lr={"hidden": {"m_in": -1}},
    forward={"attn": {"d_head": -0.5}, "readout": {"m_d": -1}},
    truncated=True,
    practice=_GPT2_DEPTH,
    keeps_decay_time=False,
)

_MUP_PACKAGE = Rule(
    name="mup-package",
    source="the package mup 1.0.0 with its AdamW, and 1/d attention as its README does it",
    init_std={"hidden": {"m_in": -0.5}},
    lr={"hidden": {"m_in": -1}},
    weight_decay={"hidden": {"m_in": 1}},
    decayed=("input", "hidden", "output", "bias", "norm"),
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    practice={"depth": "kept; transfers in practice (arXiv 2203.03466, Table 1)"},
)

_COMPLETEP = Rule(
    name="completep",
    source="CompleteP, α = 1 (Dey et al. 2025, arXiv 2505.01618, Table 1)",
    init_std={"hidden": {"m_in": -0.5}},
    lr={"hidden": {"m_in": -1}},
    weight_decay={"hidden": {"m_in": 1}},
    block_eps={"m_d": -1, "m_L": -1},
    forward={
        "attn": {"m_dh": -0.5},
        "residual.attn": {"m_L": -1},
        "residual.mlp": {"m_L": -1},
        "readout": {"m_d": -1},
    },
    covers=(*WIDTH, "depth"),
)

_COMPLETEP_EPS = replace(
    _COMPLETEP,
    name="completep-eps",
    source="completep with ε over width in every group, as gradients outside blocks shrink too",
    eps={"m_d": -1},
    block_eps={"m_L": -1},
)

_DEPTH_MUP = Rule(
    name="depth-mup",
    source="Depth-µP (Yang et al. 2023, arXiv 2310.02244): α = 1/2 in CompleteP's Table 1",
    init_std={"hidden": {"m_in": -0.5}},
    lr={"hidden": {"m_in": -1}},
    block_lr={"m_L": -0.5},
    weight_decay={"hidden": {"m_in": 1}},
    block_eps={"m_d": -1, "m_L": -0.5},
    forward={
        "attn": {"m_dh": -0.5},
        "residual.attn": {"m_L": -0.5},
        "residual.mlp": {"m_L": -0.5},
        "readout": {"m_d": -1},
    },
    covers=(*WIDTH, "depth"),
)

_MINICPM = Rule(
    name="minicpm",
    source="MiniCPM (Hu et al. 2024, arXiv 2404.06395); its scale_depth is residual_mult·√L_base",
    init_std={"hidden": {"m_d": -0.5}},
    lr={"hidden": {"m_d": -1}},
    forward={
        "residual.attn": {"m_L": -0.5},
        "residual.mlp": {"m_L": -0.5},
        "readout": {"m_d": -1},
    },
    covers=("width",),  # at one d_head and FFN ratio: attention stays 1/√d_head
    practice={
        "depth": "branches ÷ √depth as MiniCPM's (arXiv 2404.06395), but a kept lr, under which"
        " the steps of all layers add up to √depth"
    },
    keeps_decay_time=False,
)

_SUPAR = Rule(
    name="supar",
    source="SµPar (Dey et al. 2024, arXiv 2405.15743) over mup: λ and ε scaled",
    init_std={"hidden": {"m_in": -0.5, "m_rho": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    lr={"hidden": {"m_in": -1, "m_rho": -1}},
    weight_decay={"hidden": {"m_in": 1, "m_rho": 1}},
    eps={"m_d": -1},
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    covers=(*WIDTH, "density"),
    practice=_GPT2_DEPTH,
)

_MUP_SGD = Rule(
    name="mup-sgd",
    source="Yang et al. 2022 (arXiv 2203.03466, Table 8, SGD) with λ scaled as MuSGD does",
    optimizer="sgd",
    init_std={"hidden": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    lr={
        "input": {"m_out": 1},
        "hidden": {"m_out": 1, "m_in": -1},
        "output": {"m_in": 1},
        "bias": {"m_out": 1},
        "norm": {"m_out": 1},
    },
    weight_decay={
        "input": {"m_out": -1},
        "hidden": {"m_out": -1, "m_in": 1},
        "output": {"m_in": -1},
    },
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    practice=_GPT2_DEPTH,
)

_MUP_LION = Rule(
    name="mup-lion",
    source="mup for Lion (Chen et al. 2023, arXiv 2302.06675), whose step is a sign like Adam's",
    optimizer="lion",
    init_std={"hidden": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    lr={"hidden": {"m_in": -1}},
    weight_decay={"hidden": {"m_in": 1}},
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    practice=_GPT2_DEPTH,
)

_MUP_MUON = Rule(
    name="mup-muon",
    source="mup with torch.optim.Muon's `original` step: an orthogonal matrix × √max(1, out/in),"
    " whose gain is the same at every width (arXiv 2310.17813)",
    optimizer="muon",
    init_std={"hidden": {"m_in": -0.5}},
    residual_out_std=_GPT2_RESIDUAL,
    eps={"m_d": -1},
    forward={"attn": {"m_dh": -0.5}, "readout": {"m_d": -1}},
    covers=("width", "d_head"),  # out < in at another ratio would need √(out/in)
    practice=_GPT2_DEPTH,
)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        _MUP, _SP, _SP_FANIN, _MUP_CONSTANT_LR, _CEREBRAS, _MUP_PACKAGE,
        _COMPLETEP, _COMPLETEP_EPS, _DEPTH_MUP, _MINICPM, _SUPAR,
        _MUP_SGD, _MUP_LION, _MUP_MUON,
    )
}  # fmt: skip
"""Every shipped rule by name."""


def get_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the rule itself.

    >>> get_rule("mup").lr["hidden"]
    {'m_in': -1}
    >>> get_rule("mupp")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: unknown rule 'mupp'; did you mean 'mup'?
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    return RULES[rule]
