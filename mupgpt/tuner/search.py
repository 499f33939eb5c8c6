"""The main job in one call: search on proxies, keep what holds as the width grows, transfer.

A part of the target's FLOPs is the budget. A search of the target's own recipe runs on a narrow
proxy (two, where there are trials enough: how far they differ is how much chance decides); the
best, and some of the rest, are trained again at a larger width on fresh seeds. What wins there goes
to the target. How far ranks change with width is the proxy's fidelity.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError
from mupgpt.evidence.fidelity import Fidelity
from mupgpt.evidence.fidelity_runs import FidelityPlan, run_fidelity
from mupgpt.mutransfer.transfer import TransferPlan, transfer
from mupgpt.mutransfer.tuned import Tuned
from mupgpt.tuner.plan import CONFIGS, TunePlan, plan_tune
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.study import finished

__all__ = ["Tuning", "tune"]


CONVERGED = 0.01  # relative difference of two searches up to which they agree
MOVED = ("rule", "base", "hparams")  # what a transfer brings along


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a call of `tune` found; it is what `tune` returns.

    >>> plan = plan_tune("proxy-256", budget=4.0)
    >>> tuned = Tuned(config=plan.proxy, study="mine", trial=7, loss=2.3, spread=0.01,
    ...               swept_loss=2.29, edges={}, corpus={})
    >>> found = Tuning(plan=plan, tuned=tuned, fidelity=None, chance=0.001)
    >>> found.transfer_to().config.model.d_model
    256
    """

    plan: TunePlan
    tuned: Tuned
    fidelity: Fidelity
    chance: float | None
    """Relative difference of two searches' own winners at the largest width: what another search of
    the same budget might have cost or gained. None: there was one search."""

    def transfer_to(self, accept: Iterable[str] = ()) -> TransferPlan:
        """The target's config with the values found, and how it came about (as `transfer`)."""
        target = {k: v for k, v in to_dict(self.plan.target).items() if k not in MOVED}
        return transfer(self.tuned, target, accept)

    @property
    def warnings(self) -> list[str]:
        """What a reader must not overlook."""
        notes = list(self.fidelity.warnings)
        if self.chance is None:
            notes.append(
                "one search: how much of it is chance is not known; a larger budget has two"
            )
        elif self.chance > CONVERGED:
            notes.append(
                f"the two searches differ by {100 * self.chance:.1f} % at width "
                f"{self.plan.wider}: they have not converged; a larger budget would help"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "target": to_dict(self.plan.target),
            "proxy": to_dict(self.plan.proxy),
            "wider": self.plan.wider,
            "trials": self.plan.searches * self.plan.trials,
            "spent": self.plan.share,
            "chance": self.chance,
            "warnings": self.warnings,
            "tuned": to_dict(self.tuned),
            "fidelity": self.fidelity.to_dict(),
        }

    def __str__(self) -> str:
        spent = f"spent {100 * self.plan.share:.3g} % of the target's FLOPs"
        if self.chance is not None:
            spent += (
                f"; the two searches' winners differ by {100 * self.chance:.2f} % at width "
                f"{self.plan.wider}"
            )
        lines = [str(self.tuned), "", str(self.fidelity).split("\nwarning")[0], spent]
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
    >>> plan.proxy.model.d_model, plan.wider, plan.searches * plan.trials, plan.share <= 2.0
    (32, 64, 53, True)
    """
    plan = to if isinstance(to, TunePlan) else plan_tune(to, budget)
    studies = [run_sweep(spec, workers=workers, storage=storage) for spec in plan.specs]
    tops = [finished(study) for study in studies if isinstance(study, optuna.Study)]
    taken = _taken(tops)
    cell = plan.specs[0].cells[0]
    again = FidelityPlan(
        cell=cell,
        target=plan.target,
        params=tuple(t.params for _, t in taken),
        swept=tuple(t.value or math.nan for _, t in taken),
        widths=(plan.proxy.model.d_model, plan.wider),
        seeds=plan.seeds,
    )
    found = run_fidelity(again, Path("runs") / "fidelity" / plan.name, proxy_again=False)
    at_end = found.means[-1]
    winner = int(at_end.argmin())
    search, trial = taken[winner]
    return Tuning(
        plan=plan,
        tuned=_tuned(plan, search, trial, found.losses[-1, winner]),
        fidelity=found,
        chance=_chance(taken, at_end) if plan.searches > 1 else None,
    )


def _taken(tops: list[list[FrozenTrial]]) -> list[tuple[int, FrozenTrial]]:
    """Which trials are trained again: (search, trial), the best of all first.

    Three quarters are the best of each search, the rest are spread evenly over what is left: what
    is third or tenth at the proxy is often the best above it.
    """
    each = 3 * CONFIGS // 4 // len(tops)
    best = [(i, t) for i, top in enumerate(tops) for t in top[:each]]
    left = _by_loss((i, t) for i, top in enumerate(tops) for t in top[each:])
    rest = CONFIGS - len(best)
    if len(left) < rest:
        raise ConfigError(
            f"the searches have {sum(map(len, tops))} finished trials that did not diverge, and "
            f"{CONFIGS} are to be trained again; lower the learning rates of the space"
        )
    spread = [left[round(j)] for j in np.linspace(0, len(left) // 2, rest)]
    return _by_loss([*best, *spread])


def _chance(taken: list[tuple[int, FrozenTrial]], losses: np.ndarray) -> float:
    """How far the searches' own best differ, relative to the better one."""
    own = [
        min(loss for (k, _), loss in zip(taken, losses, strict=True) if k == i) for i in range(2)
    ]
    return abs(own[0] - own[1]) / min(own)


def _by_loss(trials: Iterable[tuple[int, FrozenTrial]]) -> list[tuple[int, FrozenTrial]]:
    return sorted(trials, key=lambda pair: pair[1].value or math.inf)


def _tuned(plan: TunePlan, search: int, trial: FrozenTrial, losses: np.ndarray) -> Tuned:
    spec = plan.specs[search]
    config = spec.cells[0].config(trial.params)
    return Tuned(
        config=config,
        study=spec.name,
        trial=trial.number,
        loss=float(losses.mean()),
        spread=float(losses.std(ddof=1)) if len(losses) > 1 else 0.0,
        swept_loss=trial.value or math.nan,
        edges={k: e for k, d in plan.space.items() if (e := d.at_edge(trial.params[k]))},
        corpus=load_corpus(config.data).fingerprint,
    )
