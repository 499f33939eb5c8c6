"""Is the proxy adequate? What has to hold for its hyperparameters to carry over, line by line.

Whatever differs between proxy and target is judged by what covers it, as `axes_between` says: an
axis that nothing covers is a "no", one that transfers in practice only a "caution". Beyond that a
proxy can be too small, too short or too noisy; those bounds are published ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mupgpt.config.schedules import least_warmup, warmup_steps
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import require
from mupgpt.mutransfer.axes import Axis, axes_between
from mupgpt.parametrization.rules import RULES, get_rule
from mupgpt.util.text import align, show

__all__ = ["Criterion", "ProxyCheck", "check_proxy"]

Status = Literal["fine", "caution", "no"]
STATUS: Mapping[str, Status] = {"covered": "fine", "heuristic": "caution", "unsupported": "no"}

YANG = "Yang et al. 2022 (arXiv 2203.03466)"
CEREBRAS = "Cerebras-GPT (arXiv 2304.03208)"
LEAST = {"depth": 4, "batch": 32, "context": 128, "steps": 5000}
"""From which size on transfer was seen (Yang et al. 2022, section 6.1)."""
LEAST_WIDTH = 128  # the narrowest curve of Yang et al., figure 1; their section 6.1 asks for 256
LEAST_HEADS = 4  # those of Cerebras-GPT's 40M proxy
USED_RATIO = 28  # Jais-30B: width 7168 over a base of 256
DEPTHS = (10 / 24, 40 / 24)  # Cerebras-GPT: a proxy of 24 layers, models of 10 to 40
SAME_TOKENS = 2.0  # ratio of tokens per parameter up to which two runs count as alike
LEAST_SEEDS = 3  # Student's t of a 95 % interval is 12.7 with two seeds, 4.3 with three


@dataclass(frozen=True)
class Criterion:
    """One thing that has to hold, as it stands for this proxy and this target."""

    name: str
    status: Status
    proxy: Any
    """Its value at the proxy; None where it has none or is not known."""
    target: Any
    """Its value at the target; None where it has none."""
    why: str
    """The reason, and for anything but "fine" what to do."""
    source: str
    """Where the reason comes from."""


@dataclass(frozen=True)
class ProxyCheck:
    """Every criterion, and whether the proxy is adequate."""

    criteria: tuple[Criterion, ...]

    @property
    def adequate(self) -> bool:
        """Whether no criterion says no."""
        return not self.named("no")

    def named(self, status: Status) -> list[str]:
        """The names of the criteria of that status."""
        return [c.name for c in self.criteria if c.status == status]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"adequate": self.adequate, "criteria": [asdict(c) for c in self.criteria]}

    def __str__(self) -> str:
        sources = list(dict.fromkeys(c.source for c in self.criteria))
        rows = [("criterion", "", "proxy", "target", "why")]
        rows += [
            (c.name, c.status, *("" if v is None else show(v) for v in (c.proxy, c.target)),
             f"{c.why} [{1 + sources.index(c.source)}]")
            for c in self.criteria
        ]  # fmt: skip
        notes = [f"[{i}] {source}" for i, source in enumerate(sources, start=1)]
        no, cautions = ", ".join(self.named("no")), ", ".join(self.named("caution"))
        verdict = f"NOT ADEQUATE: {no}" if no else "adequate"
        cautions = f"; caution: {cautions}" if cautions else ""
        return "\n".join([*align(rows, {2, 3}), "", *notes, "", verdict + cautions])


def check_proxy(
    proxy: TrainConfig,
    target: TrainConfig,
    *,
    seeds: int | None = None,
    critical_batch: float = 0.0,
) -> ProxyCheck:
    """Whether what is tuned on ``proxy`` can be expected to hold for ``target``.

    The rule is the proxy's. ``seeds`` is the number of seeds per trial, where known;
    ``critical_batch`` the proxy's measured critical batch size in tokens (0: not known).

    >>> from mupgpt.resolve import train_config
    >>> proxy = train_config({"model": "cerebras-gpt-40m"})
    >>> found = check_proxy(proxy, train_config({"model": "cerebras-gpt-13b"}))
    >>> found.adequate, found.named("caution")[:2]
    (True, ['d_head', 'depth'])
    """
    require(seeds is None or seeds >= 1, "seeds", seeds, "be >= 1")
    require(critical_batch >= 0, "critical_batch", critical_batch, "be >= 0 tokens (0: not known)")
    axes = axes_between(proxy, target)
    return ProxyCheck((
        *(JUDGES.get(axis.name, _by_rule)(axis, proxy, target) for axis in axes),
        _ratio(proxy, target),
        _heads(proxy, target),
        _critical_batch(proxy, target, critical_batch),
        _warmup(proxy, target),
        _precision(proxy, target),
        _seeds(seeds),
    ))  # fmt: skip


def _by_rule(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    """An axis of which only the rule has something to say."""
    source = f"rule {proxy.rule}: {get_rule(proxy.rule).source}"
    if not axis.differs:
        return Criterion(axis.name, "fine", axis.source, axis.target, "alike", source)
    status = STATUS[axis.status]
    remedy = "; give the proxy the target's" if status == "no" else ""
    return Criterion(axis.name, status, axis.source, axis.target, axis.by + remedy, source)


def _width(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    found = _by_rule(axis, proxy, target)
    if found.status == "no":
        return replace(found, why=f"{axis.by}; sweep under a rule whose width transfers")
    status: Status = "fine" if proxy.model.d_model >= LEAST_WIDTH else "caution"
    why = {
        "fine": f"at least {LEAST_WIDTH}, the narrowest published curve (its paper asks for 256)",
        "caution": f"under {LEAST_WIDTH}, the narrowest published curve: finite width may still "
        "show; widen it, or check sizes in between: mupgpt rungs",
    }[status]
    return replace(found, status=status, why=why, source=f"{YANG}, figure 1 and section 6.1")


def _d_head(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    found = replace(_by_rule(axis, proxy, target), source=f"{YANG}, appendix D.4")
    if found.status != "fine" or not axis.differs:
        return found
    why = "the rule covers it, but it is best kept: let the number of heads grow instead"
    return replace(found, status="caution", why=why)


def _depth(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    """As any scale, but what transfers in practice alone was seen to do so over a small ratio."""
    ratio, (low, high) = target.model.n_layer / proxy.model.n_layer, DEPTHS
    if not axis.differs or axis.status != "heuristic" or low <= ratio <= high:
        return _scale(axis, proxy, target)
    better = [name for name in RULES if _covers_depth(replace(proxy, rule=name), target)]
    other = f", or sweep under {' or '.join(better)}, which covers depth" if better else ""
    why = (
        f"× {ratio:.3g}, which rule {proxy.rule} does not cover; seen to transfer for × {low:.2g} "
        f"to {high:.2g}; give the proxy the target's depth (its width alone can be small){other}"
    )
    return Criterion(axis.name, "no", axis.source, axis.target, why, CEREBRAS)


def _covers_depth(proxy: TrainConfig, target: TrainConfig) -> bool:
    return any(a.name == "depth" and a.status == "covered" for a in axes_between(proxy, target))


def _scale(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    """A size that must be large enough at the proxy, and whose change must be covered."""
    found, least = _by_rule(axis, proxy, target), LEAST[axis.name]
    assert isinstance(axis.source, int)
    source = f"{YANG}, section 6.1"
    if found.status == "no" or axis.source >= least:
        return replace(found, source=source)
    also = f"; {found.why}" if axis.differs else ""
    why = f"under {least:,}, from which on transfer was seen{also}"
    return replace(found, status="caution", why=why, source=source)


def _tokens(axis: Axis, proxy: TrainConfig, target: TrainConfig) -> Criterion:
    assert axis.ratio is not None
    alike = 1 / SAME_TOKENS <= axis.ratio <= SAME_TOKENS
    status: Status = "fine" if alike else "caution"
    why = f"{'within' if alike else 'beyond'} × {SAME_TOKENS:g}; the 40M proxy was given its "
    why += "targets' 20" + ("" if alike else ": change the proxy's steps")
    source = f"{CEREBRAS}; the factor is ours"
    return Criterion(axis.name, status, axis.source, axis.target, why, source)


JUDGES: Mapping[str, Callable[[Axis, TrainConfig, TrainConfig], Criterion]] = {
    "width": _width,
    "d_head": _d_head,
    "depth": _depth,
    "tokens/parameter": _tokens,
    **dict.fromkeys(("context", "batch", "steps"), _scale),
}
"""Axis → how it is judged, where that takes more than asking the rule."""


def _ratio(proxy: TrainConfig, target: TrainConfig) -> Criterion:
    m = target.model.d_model / proxy.model.d_model
    used = max(m, 1 / m) <= USED_RATIO
    where = f"{'at most' if used else 'over'} {USED_RATIO}, with which a 30B model was trained"
    remedy = "" if used else "; widen the proxy, or check sizes in between: mupgpt rungs"
    status: Status = "fine" if used else "caution"
    source = "Jais-30B's config in Cerebras' Model Zoo (7168 over 256)"
    return Criterion("width ratio", status, 1, m, where + remedy, source)


def _heads(proxy: TrainConfig, target: TrainConfig) -> Criterion:
    few = proxy.model.n_head < LEAST_HEADS
    remedy = ": widen the proxy, or make all heads narrower" if few else ""
    why = f"{'under' if few else 'at least'} {LEAST_HEADS}, those of the 40M proxy{remedy}"
    status: Status = "caution" if few else "fine"
    return Criterion("heads", status, proxy.model.n_head, target.model.n_head, why, CEREBRAS)


def _critical_batch(proxy: TrainConfig, target: TrainConfig, critical: float) -> Criterion:
    """On which side of the critical batch size the two are.

    Below it a larger batch saves steps and moves the best learning rate; far above it neither. It
    grows with the tokens of a run, so that the proxy's is a lower bound of the target's.
    """
    a, b = proxy.tokens_per_step, target.tokens_per_step
    name = "critical batch"
    source = "McCandlish et al. 2018 (arXiv 1812.06162); Power Lines (arXiv 2505.13738)"
    if not critical:
        why = (
            "not known; to measure it, train the proxy to one loss at three batch sizes or more: "
            "mupgpt fit runs.csv --law critical-batch (columns batch and tokens, both in tokens)"
        )
        return Criterion(name, "caution", a, b, why, source)
    status: Status = "fine" if max(a, b) <= critical else "no" if b <= critical else "caution"
    why = {
        "fine": f"no step is over {critical:,.0f} tokens",
        "caution": f"the target's step is over the proxy's {critical:,.0f} tokens, which grow with "
        "the run: measure it on a longer one, or make the step smaller",
        "no": f"the proxy's step is over {critical:,.0f} tokens, the target's is not, and only "
        "there the best learning rate follows the batch: make the proxy's step smaller",
    }[status]
    return Criterion(name, status, a, b, why, source)


def _warmup(proxy: TrainConfig, target: TrainConfig) -> Criterion:
    a, b = (warmup_steps(c.schedule, c.steps, c.tokens_per_step) for c in (proxy, target))
    least = least_warmup(proxy.hparams.beta2)
    status: Status = "fine" if a >= least else "caution" if proxy.steps >= least else "no"
    why = {
        "fine": f"at least 2/(1 − β₂) = {least}",
        "caution": f"under 2/(1 − β₂) = {least}, which a transfer gives the target; lengthen it",
        "no": f"the whole run of {proxy.steps} steps is under 2/(1 − β₂) = {least}: train longer",
    }[status]
    return Criterion("warm-up steps", status, a, b, why, "Ma & Yarats 2021 (arXiv 1910.04209)")


def _precision(proxy: TrainConfig, target: TrainConfig) -> Criterion:
    a, b = proxy.precision, target.precision
    why = "alike" if a != "auto" else "alike on devices of one kind"
    if a != b:
        why = "rounding differs, and with it which learning rates are stable; sweep in the target's"
    status: Status = "fine" if a == b else "caution"
    source = "docs/decisions.md, Model and training (bf16 is autocast over fp32 masters)"
    return Criterion("precision", status, a, b, why, source)


def _seeds(seeds: int | None) -> Criterion:
    many = (seeds or 0) >= LEAST_SEEDS
    why = f"at least {LEAST_SEEDS}: Student's t leaves an interval that decides"
    if seeds is None:
        why = "not known: name the sweep instead of a run"
    elif not many:
        why = f"under {LEAST_SEEDS}: a trial's lead may be luck; raise study.seeds"
    status: Status = "fine" if many else "caution"
    return Criterion("seeds", status, seeds, None, why, "docs/decisions.md, Sweeps")
