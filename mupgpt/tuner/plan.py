"""What `tune` will train for a budget: the proxy, the searches, and what is trained again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import Base, TrainConfig
from mupgpt.errors import ConfigError, require
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import run_flops
from mupgpt.resolve import train_config
from mupgpt.tuning.space import Dimension
from mupgpt.tuning.spaces import balanced_space
from mupgpt.tuning.spec import SweepSpec, parse_spec
from mupgpt.util.text import several, show

__all__ = ["CONFIGS", "LEAST", "TunePlan", "plan_tune"]


LEAST, MOST = 48, 240  # trials of all searches together
TWICE = 120  # trials from which there are two searches: with fewer a sampler learns too little
CONFIGS = 8  # that are trained again
FRESH = (1000, 1001)  # seeds of these runs: two where the budget has room for them
SHORT = 100  # steps below which a run says nothing of a longer one
GROUP = 4  # trials that train side by side: the sampler learns after each group
SEARCHED = ("model", "base", "rule", "hparams", "schedule", "batch_size", "steps", "phases",
            "grad_clip", "data", "precision")  # fmt: skip
"""What a proxy's run takes over from the target's: all that decides its losses."""

Seeds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What a call of `tune` will train, before it does; `plan_tune` makes it.

    >>> plan = plan_tune("proxy-256", budget=4.0)
    >>> 0 < plan.share <= 4.0
    True
    """

    name: str
    target: TrainConfig
    """The target as it stands: its shape, recipe, rule and base."""
    proxy: TrainConfig
    """What the searches vary."""
    wider: int
    """The width at which their best are trained again."""
    searches: int
    """Alike but for their sampler's seed: one, or two where there are trials enough."""
    trials: int
    """Of each search."""
    seeds: Seeds
    """Fresh ones, for what is trained again."""
    space: Mapping[str, Dimension]
    sampler_seed: int
    """Of the first search; the second's is the next."""

    @property
    def share(self) -> float:
        """Of the target's FLOPs that all runs together take."""
        search = self.searches * self.trials * _share(self.proxy, self.target)
        return search + _again(self.proxy, self.wider, self.target, len(self.seeds))

    @cached_property
    def specs(self) -> tuple[SweepSpec, ...]:
        """The searches: alike but for the seed of their sampler."""
        train = {k: v for k, v in to_dict(self.proxy).items() if k in SEARCHED}
        space = {key: to_dict(d) for key, d in self.space.items()}
        study = {"sampler": "gp", "trials": self.trials, "members": GROUP}
        return tuple(
            parse_spec(
                {
                    "name": f"{self.name}-{i + 1}",
                    "study": {**study, "sampler_seed": self.sampler_seed + i},
                    "train": train,
                    "space": space,
                },
                self.name,
            )
            for i in range(self.searches)
        )

    def __str__(self) -> str:
        width = self.proxy.model.d_model
        short = self.target.steps / self.proxy.steps
        cut = f" of {show(self.proxy.steps)} steps (1/{short:.3g})" if short > 1 else ""
        return (
            f"{self.name}: {several(self.searches, 'search', 'es')} of {self.trials} trials at "
            f"width {show(width)}{cut}, then {CONFIGS} configurations at width {show(self.wider)} "
            f"({several(len(self.seeds), 'fresh seed')}), for a target of width "
            f"{show(self.target.model.d_model)}: {100 * self.share:.3g} % of its FLOPs"
        )


def plan_tune(
    to: str | Mapping[str, Any] | TrainConfig,
    budget: float = 0.1,
    *,
    name: str = "",
    space: Mapping[str, Dimension] | None = None,
    sampler_seed: int = 0,
) -> TunePlan:
    """What `tune` will do for the target ``to`` within ``budget``, a share of its training FLOPs.

    A proxy is the target at a smaller width: depth, context, batch and text are its own. It is the
    widest one for which the budget pays for a search of 48 trials, and for training 8 of them again
    at the next width; from 120 trials on there are two independent searches. Where no width is
    narrow enough for that, proxies also get fewer steps, down to as many tokens per parameter as
    the target's: an axis that is no rule's, and that the transfer then names. Raises ConfigError
    where the budget does not pay for that either.

    >>> plan = plan_tune("proxy-256", budget=4.0)
    >>> plan.proxy.model.d_model < plan.wider < plan.target.model.d_model
    True
    """
    require(budget > 0, "budget", budget, "be > 0 (a share of the target's training FLOPs)")
    target = to if isinstance(to, TrainConfig) else train_config(_raw(to))
    proxy, wider, trials, seeds = _affordable(target, budget)
    searches = 2 if trials >= TWICE else 1
    if target.base == Base.of(target.model):  # nobody said where its values hold: at the proxy
        base = Base.of(proxy.model)
        target, proxy = replace(target, base=base), replace(proxy, base=base)
    return TunePlan(
        name=name or f"tune-{to if isinstance(to, str) else f'd{target.model.d_model}'}",
        target=target,
        proxy=proxy,
        wider=wider,
        searches=searches,
        trials=trials // searches,
        seeds=seeds,
        space=space or balanced_space(target.base),
        sampler_seed=sampler_seed,
    )


def _affordable(target: TrainConfig, budget: float) -> tuple[TrainConfig, int, int, Seeds]:
    """The best proxy for the budget, the width above it, trials of all searches, fresh seeds."""
    widths = _narrower(target)
    short = (_shorter(target, w) for w in widths)
    proxies = [*(_at(target, w) for w in widths), *(run for run in short if run.steps >= SHORT)]
    for proxy in proxies:
        wider = min(w for w in (target.model.d_model, *widths) if w > proxy.model.d_model)
        for seeds in (FRESH, FRESH[:1]):
            left = budget - _again(proxy, wider, target, len(seeds))
            trials = int(left / _share(proxy, target))
            if trials >= LEAST:
                return proxy, wider, min(trials, MOST), seeds
    cheapest = min(proxies, key=lambda run: _share(run, target))
    need = LEAST * _share(cheapest, target)
    raise ConfigError(
        f"budget = {budget}: {LEAST} trials of the cheapest proxy, width {cheapest.model.d_model}, "
        f"take {need:.2g} of the target's FLOPs, and what follows them as much again; allow more"
    )


def _raw(to: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"model": to} if isinstance(to, str) else to


def _narrower(target: TrainConfig) -> list[int]:
    """Widths below the target's with whole heads and the target's shape, widest first, each at most
    half of the one before."""
    model = target.model
    parts = (model.n_head, model.n_kv_head)
    widths: list[int] = []
    for width in range(model.d_model // 2, 0, -1):
        whole = all((part * width) % model.d_model == 0 for part in parts)
        if whole and 2 * width <= (widths or [model.d_model])[-1]:
            widths.append(width)
    if not widths:
        raise ConfigError(
            f"model.d_model = {model.d_model}: no smaller width has whole heads of the target's "
            f"shape (n_head = {model.n_head}, n_kv_head = {model.n_kv_head}); tune another target"
        )
    return widths


def _at(run: TrainConfig, width: int) -> TrainConfig:
    return replace(run, model=run.model.widen(width))


def _shorter(target: TrainConfig, width: int) -> TrainConfig:
    """The target at that width, with as many steps as keep its tokens per parameter."""
    run = _at(target, width)
    factor = count_params(run.model) / count_params(target.model)
    phases = tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in run.phases)
    steps = sum(p.steps for p in phases) or max(1, round(run.steps * factor))
    s = run.schedule
    warmup = s.warmup_tokens / target.tokens if s.warmup_tokens else s.warmup
    schedule = replace(s, warmup=warmup, warmup_tokens=0)
    return replace(run, steps=steps, phases=phases, schedule=schedule)


def _share(run: TrainConfig, target: TrainConfig) -> float:
    """FLOPs of a run over the target's."""
    return run_flops(run, run.steps) / run_flops(target, target.steps)


def _again(proxy: TrainConfig, wider: int, target: TrainConfig, seeds: int) -> float:
    """What training the chosen again, wider, takes of the target's FLOPs."""
    return CONFIGS * seeds * _share(_at(proxy, wider), target)
