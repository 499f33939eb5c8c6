"""What a coordinate check must find under a rule: exponents of size, derived from stability.

They follow from keeping the change of every activation at 0, given a rule's forward multipliers and
initialization, but not from its learning rates: else a control would pass against itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mupgpt.parametrization.axes import AXES, SizeAxis
from mupgpt.parametrization.rules import Rule
from mupgpt.parametrization.words import Point, Power, Role

__all__ = ["Exponent", "expected_slopes"]

Exponent = float | tuple[float, float]
"""A power of the size, or the lowest and the highest that agree with theory."""

BRANCH = ("q", "k", "v", "o", "up", "down", "scores")
MASKED = ("hidden", "qk", "residual_out")


def expected_slopes(
    rule: Rule, axis: SizeAxis = "width", *, d_head_grows: bool, tied: bool
) -> dict[str, dict[str, Exponent]]:
    """Exponents of size that a coordinate check must find under ``rule``: measure → probe → power.

    With w, l, r and h the growth of log width, depth, density and d_head (each 0 or 1), n = w + r
    that of a hidden matrix's fan-in, and b the rule's exponent of the residual multipliers:

    ``change``    0 for every activation: each layer learns as much as is stable (Yang et al. 2022,
                  arXiv 2203.03466; over depth Dey et al. 2025, arXiv 2505.01618). Inside a branch
                  its own weights make −l − b of it and the stream makes 0: any power between the
                  two will do. At b = −l they are one; a rule with a higher b has lazy branches.
    ``update``    l layers of n aligned products share it: −n − l − b for matrices inside blocks.
                  Biases and gains there sum nothing: −l − b.
    ``step``      As the update, for optimizers whose first step is the learning rate times damping.
    ``rate``      For SGD: what takes the gradient to the update.
    ``weights``   the rule's std, where stable: independent products add up as √fan-in, so −n/2 is
                  the most for hidden matrices, and −n/2 − l/2 − b for residual outputs.
    ``init``      0, unless random sums meet a multiplier made for aligned ones: logits of a random
                  readout go as w/2 − w, and q·k/d_head as h/2 − h. Both are −1/2. ``branch`` is
                  what blocks add to the stream, multiplier included. The stream is the sum of that
                  and of embeddings: any power between theirs will do.
    ``gradient``  the loss's derivative passes readout multiplier and readout weight (under 1/m:
                  −w), then √fan-in of each transposed matrix; norms in between cost nothing.
                  That of q and k sums random products over d_head under 1/d_head: −h/2 more.
                  A gain that the queries of all heads share has one such sum a head: +(w − h)/2.
                  They agree once it has moved; under SGD, whose first step knows the gradient's
                  size, its update may lag by as much, w/2.
    ``damping``   0 for √v/(√v + ε): ε moves with the gradients, or is too small to matter.

    Over density a hidden matrix's root mean squares are over all elements, the dropped ones being
    zero: r/2 more. Over depth the residual stream has an exponent after the last block only, since
    the first ones hold a falling share of all branches. ``logits`` are those of tokens other than
    the input's own, with which a tied head is aligned from the start.

    >>> from mupgpt.parametrization.rules import get_rule
    >>> slopes = expected_slopes(get_rule("mup"), d_head_grows=True, tied=True)
    >>> slopes["update"]["hidden"], slopes["init"]["logits"], slopes["init"]["scores"]
    (-1.0, -0.5, -0.5)
    """
    g = _growth(rule, axis, d_head_grows, tied)
    gradient, update = _gradient(g), _update(g)
    slopes: dict[str, dict[str, Exponent]] = {
        "weights": _over_all(g.weights, g),
        "init": _init(g),
        "change": _change(g),
        "gradient": _over_all(gradient, g),
        "update": _over_all(update, g),
    }
    if rule.optimizer == "sgd":
        _add_rates(slopes, gradient, update, g)
    else:
        slopes["step"] = slopes["update"]
        slopes["damping"] = _over_all(dict.fromkeys(update, 0.0), g)
    return slopes


@dataclass(frozen=True, kw_only=True)
class _Growth:
    """Exponents from which all others follow; the letters are those of `expected_slopes`."""

    tied: bool
    width: float  # w
    depth: float  # l
    fan: float  # n
    d_head: float  # h
    emb: float
    branch: float  # b
    head_step: float  # of the readout's weight
    weights: Mapping[str, float]

    @property
    def readout(self) -> float:
        """Of the readout multiplier: it makes up for the step of the readout's weight."""
        return -self.width - self.head_step

    @property
    def head(self) -> float:
        """Of the readout weight's initial std."""
        return self.weights["input" if self.tied else "output"]

    @property
    def inside(self) -> float:
        """Of a hidden matrix's output at initialization."""
        return self.weights["hidden"] + self.fan / 2

    @property
    def outside(self) -> float:
        """Of a branch's output at initialization, in front of its multiplier."""
        return self.weights["residual_out"] + self.fan / 2


def _growth(rule: Rule, axis: SizeAxis, d_head_grows: bool, tied: bool) -> _Growth:
    width, depth = float(axis == "width"), float(axis == "depth")
    fan = width + (axis == "density")
    emb = _slope(rule.forward.get("emb", {}), axis)
    branches: tuple[Point, ...] = ("residual.attn", "residual.mlp")
    branch = max(_slope(rule.forward.get(point, {}), axis) for point in branches)
    head_step = _slope(rule.lr.get("output", {}), axis)
    if rule.optimizer == "sgd":
        head_step = (head_step - width) / 2  # its step has the multiplier in it, which undoes it
    if tied:
        head_step = -emb
    matrices: tuple[Role, ...] = ("input", "hidden", "output")
    std = {role: _slope(rule.init_std.get(role, {}), axis) for role in matrices}
    out = std["hidden"] + _slope(rule.residual_out_std, axis)
    weights = {  # the rule's own, but no more than keeps activations stable
        "input": min(std["input"], -emb),
        "hidden": min(std["hidden"], -fan / 2),
        "residual_out": min(out, -fan / 2 - depth / 2 - branch),
        "output": min(std["output"], head_step + width / 2),
    }
    return _Growth(
        tied=tied, width=width, depth=depth, fan=fan, d_head=width * d_head_grows,
        emb=emb, branch=branch, head_step=head_step, weights=weights,
    )  # fmt: skip


def _slope(power: Power, axis: SizeAxis) -> float:
    """Exponent of the size in a power, for anything but the attention multiplier."""
    return sum((power.get(quantity, 0.0) for quantity in AXES[axis].grows), 0.0)


def _init(g: _Growth) -> dict[str, Exponent]:
    embedded = g.weights["input"] + g.emb
    branches = g.outside + g.branch + g.depth / 2
    ends = min(embedded, branches), max(embedded, branches)
    stream: Exponent = ends if ends[0] < ends[1] else embedded
    return {
        "emb": embedded,
        **dict.fromkeys(("q", "k", "v", "up"), g.inside),
        **dict.fromkeys(("o", "down"), g.outside),
        "scores": 2 * g.inside - g.d_head / 2,
        "branch": g.outside + g.branch,
        "residual.last" if g.depth else "residual": stream,
        "logits": g.readout + g.head + g.width / 2,
    }


def _change(g: _Growth) -> dict[str, Exponent]:
    lazy = min(0.0, -g.depth - g.branch)
    change: dict[str, Exponent] = {
        probe: (lazy, 0.0) if lazy and probe in BRANCH else 0.0 for probe in _init(g)
    }
    return change | {"branch": (lazy + g.branch, g.branch) if lazy else g.branch}


def _gradient(g: _Growth) -> dict[str, float]:
    by_stream = g.readout + g.head
    by_branch = by_stream + g.branch
    return {
        "input": max(g.readout, by_stream + g.emb) if g.tied else by_stream + g.emb,
        "hidden": by_branch + g.outside,
        "qk": by_branch + g.outside - g.d_head / 2,
        "residual_out": by_branch,
        "bias": by_branch + max(0.0, g.outside),
        "norm": by_branch + g.outside + g.inside,
        "norm.final": by_stream,
        "norm.qk": by_branch + g.outside + g.width / 2 - g.d_head,
        "output": g.readout,
    }


def _update(g: _Growth) -> dict[str, float]:
    vectors = -g.depth - g.branch
    return {
        "input": -g.emb,
        **dict.fromkeys(MASKED, vectors - g.fan),
        **dict.fromkeys(("bias", "norm", "norm.qk"), vectors),
        "norm.final": 0.0,
        "output": g.head_step,
    }


def _add_rates(
    slopes: dict[str, dict[str, Exponent]],
    gradient: Mapping[str, float],
    update: Mapping[str, float],
    g: _Growth,
) -> None:
    """The rates that SGD needs; and the updates that lag, as their gradients begin small."""
    rate = {kind: update[kind] - gradient[kind] for kind in update}
    slopes["rate"] = {**rate, "qk": rate["hidden"]}  # they share one learning rate
    late = g.width / 2  # a gain's gradients from all heads do not agree at first
    for measure, powers in (("rate", rate), ("update", update)):
        slopes[measure]["norm.qk"] = (powers["norm.qk"] - late, powers["norm.qk"])
    if g.d_head:
        slopes["update"]["qk"] = (update["qk"] - 0.5, update["qk"])
        slopes["change"] |= dict.fromkeys(("q", "k", "scores"), (-0.5, 0.0))


def _over_all(powers: Mapping[str, float], g: _Growth) -> dict[str, Exponent]:
    """Powers of a measure of weights over all elements, of which a growing share is kept."""
    kept = g.fan - g.width
    return {kind: p + kept / 2 if kind in MASKED else p for kind, p in powers.items()}
