"""Between proxy and target: small runs with half, once and twice the transferred learning rate.

Each rung is the target at a smaller width, with the target's depth, batch, context and text, and as
many steps as a stated share of its training FLOPs allows. Where the tuned learning rate is right
for the target it is the best of the three on every rung.
"""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mupgpt.config.phases import lasting
from mupgpt.config.plain import to_dict
from mupgpt.config.schedules import least_warmup, warmup_steps
from mupgpt.config.schema import GPTConfig, Prediction, TrainConfig
from mupgpt.errors import ConfigError, require
from mupgpt.mutransfer.transfer import transfer
from mupgpt.mutransfer.tuned import Tuned
from mupgpt.parametrization.axes import AXES
from mupgpt.planning.flops import run_flops
from mupgpt.util.text import align, number, show

__all__ = ["LR_FACTORS", "MAX_SHARE", "BridgePlan", "plan_bridge", "train_flops", "with_lr"]

LR_FACTORS = (0.5, 1.0, 2.0)
MAX_SHARE = 0.01
MANY = 16  # from this ratio of widths on three rungs, else two


@dataclass(frozen=True, kw_only=True)
class BridgePlan:
    """The rungs between a proxy and its target, and what they cost."""

    source: TrainConfig
    """The tuned run."""
    target: TrainConfig
    """What `transfer` makes of it at the target."""
    rungs: tuple[TrainConfig, ...]
    """One run a rung, narrowest first, with the transferred learning rate."""
    seeds: tuple[int, ...]
    """Each rung trains every learning rate once per seed, on common random numbers."""
    max_share: float
    """Share of the target's training FLOPs that all runs may take together."""
    shrunk: tuple[str, ...]
    """What was made smaller than the target's to stay within that share."""

    @property
    def runs(self) -> int:
        """Runs of one rung."""
        return len(LR_FACTORS) * len(self.seeds)

    @property
    def flops(self) -> float:
        """Training FLOPs of all runs, convention ``palm``."""
        return sum(self.runs * train_flops(rung) for rung in self.rungs)

    @property
    def share(self) -> float:
        """All runs' FLOPs over the target's."""
        return self.flops / train_flops(self.target)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; each config is what `train_config` accepts."""
        return {
            "rungs": [
                {"flops": self.runs * train_flops(c), "config": to_dict(c)} for c in self.rungs
            ],
            "lr_factors": list(LR_FACTORS),
            "seeds": list(self.seeds),
            "runs": self.runs * len(self.rungs),
            "flops": self.flops,
            "flops_convention": "palm",
            "share": self.share,
            "max_share": self.max_share,
            "shrunk": list(self.shrunk),
            "target": to_dict(self.target),
        }

    def to_toml(self) -> dict[str, str]:
        """File name → the config of one rung and learning rate, as ``mupgpt train`` takes it."""
        import tomli_w

        return {
            f"w{c.model.d_model}-lr{factor:g}.toml": tomli_w.dumps(to_dict(with_lr(c, factor)))
            for c in self.rungs
            for factor in LR_FACTORS
        }

    def __str__(self) -> str:
        whole = train_flops(self.target)
        rows = [
            ("width", "over proxy", "layers", "batch", "steps", "runs", "FLOPs (palm)", "share")
        ]
        rows += [
            (show(c.model.d_model), f"× {c.model.d_model / self.source.model.d_model:.3g}",
             show(c.model.n_layer), f"{c.batch_size} × {c.model.seq_len}", show(c.steps),
             show(self.runs), number(self.runs * train_flops(c)),
             percent(self.runs * train_flops(c) / whole))
            for c in self.rungs
        ]  # fmt: skip
        rows.append(("together", "", "", "", "", show(self.runs * len(self.rungs)),
                     number(self.flops), percent(self.share)))  # fmt: skip
        t = self.target
        return "\n".join([
            f"rungs from width {self.source.model.d_model:,} to {t.model.d_model:,} under rule "
            f"{t.rule}: lr {t.hparams.lr:.4g} × {', '.join(f'{f:g}' for f in LR_FACTORS)}; seeds "
            f"{', '.join(map(str, self.seeds))}",
            "",
            *align(rows, set(range(len(rows[0])))),
            "",
            f"as in the target: {t.model.n_layer} layers, batch {t.batch_size} × "
            f"{t.model.seq_len}, {t.data.source} ({t.data.tokenizer})",
            *([f"shrunk to stay within {percent(self.max_share)} of the target's FLOPs: "
               f"{'; '.join(self.shrunk)}"] if self.shrunk else []),
        ])  # fmt: skip


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.00734)
    '0.73 %'
    """
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def train_flops(config: TrainConfig) -> float:
    """Training FLOPs of one run, convention ``palm``."""
    return run_flops(config)


def with_lr(config: TrainConfig, factor: float) -> TrainConfig:
    """The run with its learning rate times ``factor``."""
    hparams = dataclasses.replace(config.hparams, lr=config.hparams.lr * factor)
    return dataclasses.replace(config, hparams=hparams)


def plan_bridge(
    source: Tuned | TrainConfig,
    to: str | Mapping[str, Any],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    max_share: float = MAX_SHARE,
) -> BridgePlan:
    """The rungs between tuned hyperparameters and the target ``to`` (as `transfer` takes them).

    Widths are spread evenly in the logarithm; steps are equal on all rungs, at most the target's
    and at least the proxy's, since a shorter horizon moves the best learning rate by itself. When
    ``max_share`` of the target's FLOPs does not reach that far, the rungs become narrower. Raises
    ConfigError when not even the narrowest fits, or no width lies in between.

    >>> from mupgpt.resolve import train_config
    >>> plan = plan_bridge(train_config({"model": "cerebras-gpt-40m"}), "cerebras-gpt-13b")
    >>> [(c.model.d_model, c.model.n_layer, c.steps) for c in plan.rungs]
    [(384, 40, 1590), (768, 40, 1590), (1280, 40, 1590)]
    """
    distinct = len(set(seeds)) == len(seeds) >= 2
    require(distinct, "seeds", list(seeds), "be two or more, none twice: noise is seen over seeds")
    require(max_share > 0, "max_share", max_share, "be > 0 (a share of the target's FLOPs)")
    source = source.config if isinstance(source, Tuned) else source
    target = transfer(source, to, AXES).config
    ladders = _ladders(source.model.d_model, target.model)
    widths, steps = _fit(source, target, ladders, len(LR_FACTORS) * len(seeds), max_share)
    changes = [
        ("widths", _list(ladders[0]), _list(widths)),
        ("steps", show(target.steps), show(steps)),
    ]
    return BridgePlan(
        source=source,
        target=target,
        rungs=tuple(_rung(source, target, width, steps) for width in widths),
        seeds=tuple(seeds),
        max_share=max_share,
        shrunk=tuple(f"{name} {old} → {new}" for name, old, new in changes if old != new),
    )


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(show, widths))


def _ladders(low: int, target: GPTConfig) -> list[tuple[int, ...]]:
    """What the rungs' widths may be, best first: evenly spread in log width, ever less far."""
    candidates, m = _candidates(low, target), target.d_model / low
    count = 3 if m >= MANY else 2
    best = _nearest(candidates, low * m ** (count / (count + 1)))
    return [
        tuple(sorted({
            _nearest(candidates, low * (top / low) ** (i / count)) for i in range(1, count + 1)
        }))
        for top in reversed(candidates) if top <= best
    ]  # fmt: skip


def _nearest(candidates: Sequence[int], aim: float) -> int:
    return min(candidates, key=lambda width: abs(math.log(width / aim)))


def _candidates(low: int, target: GPTConfig) -> list[int]:
    """Widths between ``low`` and the target's at which it keeps its d_head and its ratios."""
    steps = range(low + 1, target.d_model)
    found = [w for w in steps if w % target.d_head == 0 and _keeps_ratios(target, w)]
    if not found:
        raise ConfigError(
            f"no width between the proxy's {low:,} and the target's {target.d_model:,} keeps "
            f"d_head = {target.d_head}: there is nothing to check in between; make the proxy "
            "narrower, or train the target itself for some steps at half and twice the rate"
        )
    return found


def _keeps_ratios(model: GPTConfig, width: int) -> bool:
    try:
        small = model.widen(width)
    except ConfigError:
        return False
    ratios = [(m.n_head / m.n_kv_head, m.n_head * m.d_head / m.d_model) for m in (model, small)]
    return ratios[0] == ratios[1]


def _fit(
    source: TrainConfig,
    target: TrainConfig,
    ladders: Sequence[tuple[int, ...]],
    runs: int,
    max_share: float,
) -> tuple[tuple[int, ...], int]:
    """The widest rungs, and their steps, that ``max_share`` allows."""
    warm = 2 * least_warmup(target.hparams.beta2)  # a warm-up is at most half of a run
    least = min(target.steps, max(source.steps, warm))
    whole, needed = train_flops(target), math.inf
    for widths in ladders:
        cost = _cost(source, target, widths, runs)
        steps = bisect_right(range(1, target.steps + 1), max_share * whole, key=cost)
        if steps >= least:
            return widths, steps
        needed = min(needed, cost(least) / whole)
    raise ConfigError(
        f"max_share = {max_share:g}: {runs} runs of {least:,} steps (as long as the proxy, and "
        f"twice 2/(1 − β₂)) at width {ladders[-1][0]:,} alone take {percent(needed)} of the "
        f"target's FLOPs; allow that much: --max-share {math.ceil(1000 * needed) / 1000:g}"
    )


def _cost(
    source: TrainConfig, target: TrainConfig, widths: Sequence[int], runs: int
) -> Callable[[int], float]:
    """Steps → training FLOPs of that many of the target's, ``runs`` times at each of ``widths``."""
    narrow = [
        dataclasses.replace(target, model=target.model.widen(width), parallel=source.parallel)
        for width in widths
    ]
    return lambda steps: runs * sum(run_flops(config, steps) for config in narrow)


def _rung(source: TrainConfig, target: TrainConfig, width: int, steps: int) -> TrainConfig:
    """The target at another width and horizon, as `transfer` takes the source there.

    The warm-up is the target's fraction of the run.
    """
    warm = warmup_steps(target.schedule, target.steps, target.tokens_per_step)
    rung = dataclasses.replace(
        target,
        model=target.model.widen(width),
        steps=steps,
        phases=lasting(target.phases, steps),
        schedule=dataclasses.replace(target.schedule, warmup=warm / target.steps, warmup_tokens=0),
        parallel=source.parallel,  # a rung may have fewer heads than the target has processes
        prediction=Prediction(),
    )
    return transfer(source, to_dict(rung), AXES).config
