"""The main job in one call: search on proxies, keep what holds as the width grows, transfer.

A part of the target's FLOPs is the budget. Two independent searches of the target's own recipe run on
a narrow proxy; the best of both, and some of the rest, are trained again at larger widths on fresh
seeds. What wins there goes to the target. How far the two searches differ is how much chance decides;
how far ranks change with width is the proxy's fidelity.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import Base, TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError, require
from mupgpt.evidence.fidelity import Fidelity
from mupgpt.evidence.fidelity_runs import FidelityPlan, run_fidelity
from mupgpt.mutransfer.transfer import TransferPlan, transfer
from mupgpt.mutransfer.tuned import Tuned
from mupgpt.planning.flops import run_flops
from mupgpt.resolve import train_config
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.space import Dimension
from mupgpt.tuning.spaces import balanced_space
from mupgpt.tuning.spec import SweepSpec, parse_spec
from mupgpt.tuning.study import finished
from mupgpt.util.text import show

__all__ = ["TunePlan", "Tuning", "plan_tune", "tune"]

SEARCH = 0.6  # of the budget; the rest trains again what was found, at larger widths
LEAST, MOST = 40, 240  # trials of both searches together
CONFIGS = (8, 16)  # that are trained again: at least and at most
FRESH = (1000, 1001)
RESTARTS = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What a call of `tune` will train, before it does."""

    name: str
    target: TrainConfig
    """The target as it stands: its shape, recipe, rule and base."""
    budget: float
    """Share of the target's training FLOPs."""
    widths: tuple[int, ...]
    """The proxy's, then those at which its best are trained again."""
    trials: int
    """Of each of the two searches."""
    configs: int
    """That are trained again."""
    space: Mapping[str, Dimension]

    def cost(self, width: int) -> float:
        """One run at ``width`` as a share of the target's."""
        return _cost(self.target, width)

    @property
    def share(self) -> float:
        """Of the target's FLOPs that all runs together take."""
        search = len(RESTARTS) * self.trials * self.cost(self.widths[0])
        again = sum(self.configs * len(FRESH) * self.cost(w) for w in self.widths)
        return search + again

    @cached_property
    def specs(self) -> tuple[SweepSpec, ...]:
        """The two searches: alike but for the seed of their sampler."""
        proxy = replace(self.target, model=self.target.model.widen(self.widths[0]))
        train = {k: v for k, v in to_dict(proxy).items() if k in SEARCHED}
        space = {key: to_dict(d) for key, d in self.space.items()}
        return tuple(
            parse_spec(
                {
                    "name": f"{self.name}-{label}",
                    "study": {"trials": self.trials, "sampler_seed": i, "columns": GROUP},
                    "train": train,
                    "space": space,
                },
                self.name,
            )
            for i, label in enumerate(RESTARTS)
        )

    def __str__(self) -> str:
        wider = ", ".join(show(w) for w in self.widths[1:])
        return (
            f"{self.name}: {len(RESTARTS)} searches of {self.trials} trials at width "
            f"{show(self.widths[0])}, then {self.configs} configurations on {len(FRESH)} fresh "
            f"seeds at width {wider}, for a target of width {show(self.target.model.d_model)}: "
            f"{100 * self.share:.3g} % of its FLOPs"
        )


SEARCHED = ("model", "base", "rule", "hparams", "schedule", "batch_size", "steps", "phases",
            "grad_clip", "data", "precision")  # fmt: skip
"""What a proxy's run takes over from the target's: all that decides its losses."""
GROUP = 4  # trials that train side by side: the sampler learns after each group


def _cost(target: TrainConfig, width: int) -> float:
    run = replace(target, model=target.model.widen(width))
    return run_flops(run, run.steps) / run_flops(target, target.steps)


def plan_tune(
    to: str | Mapping[str, Any] | TrainConfig,
    budget: float = 0.1,
    *,
    name: str = "",
    space: Mapping[str, Dimension] | None = None,
) -> TunePlan:
    """What `tune` will do for the target ``to`` within ``budget``, a share of its training FLOPs.

    Proxies are the target at smaller widths: depth, context, batch, steps and text are its own, so
    that width is all that a transfer has to cover. The proxy is the widest one (the target's width
    halved again and again) at which 60 % of the budget pays for 40 trials. Raises ConfigError where
    the budget pays for none.
    """
    require(budget > 0, "budget", budget, "be > 0 (a share of the target's training FLOPs)")
    target = to if isinstance(to, TrainConfig) else train_config(_raw(to))
    widths = _halved(target)
    affordable = [w for w in widths if SEARCH * budget / _cost(target, w) >= LEAST]
    if not affordable:
        need = LEAST * _cost(target, widths[-1]) / SEARCH
        raise ConfigError(
            f"budget = {budget}: {LEAST} trials at width {widths[-1]}, the narrowest of "
            f"{target.model.d_model} with whole heads, take {need:.3g} of the target's FLOPs; allow "
            "that much, or give the target narrower heads (model.d_head)"
        )
    proxy = affordable[0]
    trials = min(MOST, int(SEARCH * budget / _cost(target, proxy)))
    base = Base.of(target.model.widen(proxy)) if target.base == Base.of(target.model) else None
    target = replace(target, base=base) if base else target
    wider = [w for w in reversed(widths) if w > proxy] or [target.model.d_model]
    left = budget - trials * _cost(target, proxy)
    each = len(FRESH) * (_cost(target, proxy) + _cost(target, wider[0]))
    return TunePlan(
        name=name or f"tune-{_label(to)}",
        target=target,
        budget=budget,
        widths=(proxy, wider[0]),
        trials=trials // len(RESTARTS),
        configs=int(np.clip(left / each, *CONFIGS)),
        space=space or balanced_space(target.base),
    )


def _raw(to: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"model": to} if isinstance(to, str) else to


def _label(to: str | Mapping[str, Any] | TrainConfig) -> str:
    return to if isinstance(to, str) else "target"


def _halved(target: TrainConfig) -> list[int]:
    """The target's width halved as long as heads stay whole, widest first."""
    widths, model = [], target.model
    width = model.d_model // 2
    while width * 2 <= model.d_model and width and not _odd(target, width):
        widths.append(width)
        width //= 2
    if not widths:
        raise ConfigError(
            f"model.d_model = {model.d_model}: half of it has no whole heads of "
            f"model.d_head = {model.d_head}; tune a target whose width is an even number of heads"
        )
    return widths


def _odd(target: TrainConfig, width: int) -> bool:
    """Whether a model of that width would not be the target's shape at a smaller size."""
    model = target.model
    parts = (model.n_head, model.n_kv_head, model.d_ffn)
    return any((part * width) % model.d_model for part in parts)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a call of `tune` found."""

    plan: TunePlan
    tuned: Tuned
    fidelity: Fidelity
    chance: float
    """Relative difference of the two searches' own winners at the largest width: what another
    search of the same budget might have cost or gained."""

    @property
    def transfer(self) -> TransferPlan:
        """The target's config with the values found, and how it came about."""
        return transfer(self.tuned, to_dict(self.plan.target))

    @property
    def warnings(self) -> list[str]:
        """What a reader must not overlook."""
        notes = list(self.fidelity.warnings)
        if self.chance > 0.01:
            notes.append(
                f"the two searches differ by {100 * self.chance:.1f} % at width "
                f"{self.plan.widths[-1]}: they have not converged; a larger budget would help"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "target": to_dict(self.plan.target),
            "widths": list(self.plan.widths),
            "trials": len(RESTARTS) * self.plan.trials,
            "spent": self.plan.share,
            "chance": self.chance,
            "warnings": self.warnings,
            "tuned": to_dict(self.tuned),
            "fidelity": self.fidelity.to_dict(),
        }

    def __str__(self) -> str:
        spent = f"spent {100 * self.plan.share:.3g} % of the target's FLOPs; "
        lines = [
            str(self.tuned),
            "",
            str(self.fidelity).split("\nwarning")[0],
            f"{spent}the two searches' winners differ by {100 * self.chance:.2f} % at width "
            f"{self.plan.widths[-1]}",
        ]
        return "\n".join(lines + [f"warning: {note}" for note in self.warnings])


def tune(
    to: str | Mapping[str, Any] | TrainConfig | TunePlan,
    budget: float = 0.1,
    *,
    workers: int | None = None,
    storage: str | None = None,
) -> Tuning:
    """Tune a target on narrow models of its own recipe; returns what was found, and how surely.

    ``to`` is a preset's name, plain config data, a config, or what `plan_tune` made of them;
    ``budget`` is a share of the target's training FLOPs. Everything that finished is kept under
    ``runs/``: the same call goes on after an interrupt, and on any number of workers.

    >>> plan = plan_tune("proxy-256", budget=2.0)
    >>> plan.widths, 2 * plan.trials, plan.share <= 2.0
    ((32, 64), 59, True)
    """
    plan = to if isinstance(to, TunePlan) else plan_tune(to, budget)
    studies = [run_sweep(spec, workers=workers, storage=storage) for spec in plan.specs]
    tops = [finished(study) for study in studies if isinstance(study, optuna.Study)]
    taken = _taken(tops, plan.configs)
    cell = plan.specs[0].cells[0]
    again = FidelityPlan(
        cell=cell,
        target=plan.target,
        params=tuple(t.params for _, t in taken),
        swept=tuple(t.value or math.nan for _, t in taken),
        widths=plan.widths,
        seeds=FRESH,
    )
    found = run_fidelity(again, Path("runs") / "fidelity" / plan.name)
    at_end = found.means[-1]
    winner = int(at_end.argmin())
    own = [min(m for (k, _), m in zip(taken, at_end, strict=True) if k == i) for i in range(2)]
    search, trial = taken[winner]
    return Tuning(
        plan=plan,
        tuned=_tuned(plan, search, trial, found.losses[-1, winner]),
        fidelity=found,
        chance=abs(own[0] - own[1]) / min(own),
    )


def _taken(tops: list[list[FrozenTrial]], count: int) -> list[tuple[int, FrozenTrial]]:
    """Which trials are trained again: (search, trial), the best of all first.

    Half of them are the best of both searches in turn, the rest are spread evenly over what is left.
    """
    best = [(i, t) for t_i in zip(*(top[: count // 4] for top in tops), strict=False)
            for i, t in enumerate(t_i)]  # fmt: skip
    left = sorted(
        ((i, t) for i, top in enumerate(tops) for t in top[count // 4 :]),
        key=lambda pair: pair[1].value or math.inf,
    )
    rest = count - len(best)
    if len(left) < rest or len(best) < 2:
        raise ConfigError(
            f"the searches have {sum(map(len, tops))} finished trials that did not diverge, and "
            f"{count} are to be trained again; lower the learning rates of the space"
        )
    spread = [left[round(j)] for j in np.linspace(0, len(left) - 1, rest)]
    return sorted([*best, *spread], key=lambda pair: pair[1].value or math.inf)


def _tuned(plan: TunePlan, search: int, trial: FrozenTrial, losses: np.ndarray) -> Tuned:
    spec = plan.specs[search]
    config = spec.cells[0].config(trial.params)
    return Tuned(
        config=config,
        study=spec.name,
        trial=trial.number,
        loss=float(losses.mean()),
        spread=float(losses.std(ddof=1)),
        swept_loss=trial.value or math.nan,
        edges={k: e for k, d in plan.space.items() if (e := d.at_edge(trial.params[k]))},
        corpus=load_corpus(config.data).fingerprint,
    )
