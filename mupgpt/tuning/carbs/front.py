"""The Pareto front of cost and loss, and the power laws along it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mupgpt.errors import require
from mupgpt.scaling.compute import ComputeFit, fit_compute
from mupgpt.scaling.linear import PowerFit, fit_loglog
from mupgpt.scaling.runs import Runs

__all__ = [
    "FrontLaws",
    "FrontPoint",
    "check_study",
    "cost_of",
    "front",
    "front_laws",
    "front_of",
    "healthy",
    "loss_of",
]


@dataclass(frozen=True)
class FrontPoint:
    """One set of values, with its mean cost and mean loss over the ``trials`` that had it."""

    params: dict[str, Any]
    cost: float
    loss: float
    trials: int


def front(study: optuna.Study, cost_key: str = "seconds") -> list[FrontPoint]:
    """Return the non-dominated points of a study, from the cheapest to the best.

    A point is dominated when another one costs no more and has no higher loss. Trials with the
    same values are one point; those that broke a constraint (diverged) are none. The cost of a
    trial is its user attribute ``cost_key``.

    >>> study = optuna.create_study()
    >>> for cost, loss in [(1, 3.0), (2, 3.5), (4, 2.0)]:
    ...     trial = study.ask()
    ...     _ = trial.suggest_float("x", 0, 9), trial.set_user_attr("flops", cost)
    ...     _ = study.tell(trial, loss)
    >>> [(p.cost, p.loss) for p in front(study, "flops")]
    [(1.0, 3.0), (4.0, 2.0)]
    """
    check_study(study)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    costly = [t for t in trials if cost_key in t.user_attrs]
    require(bool(costly) or not trials, "cost_key", cost_key, "be a user attribute of the trials")
    return front_of([t for t in costly if healthy(t)], cost_key)


@dataclass(frozen=True, eq=False)
class FrontLaws:
    """Power laws along a front: each hyperparameter ∝ cost^p, and loss = a·cost^−b + c."""

    points: list[FrontPoint]
    params: dict[str, PowerFit]
    loss: ComputeFit

    @property
    def exponents(self) -> dict[str, tuple[float, float]]:
        """The exponent of cost and its standard error, by hyperparameter, and for the loss."""
        laws = {
            name: (fit.exponents["cost"], math.sqrt(fit.logs.covariance[1, 1]))
            for name, fit in self.params.items()
        }
        return {**laws, "loss": (-self.loss.b, float(self.loss.draws.params[:, 1].std(ddof=1)))}

    def __str__(self) -> str:
        """One line per law: its exponent, and ± one standard error."""
        lines = [f"{k} ∝ cost^{p:.3f} ± {se:.3f}" for k, (p, se) in self.exponents.items()]
        lines[-1] = lines[-1].replace("loss", f"loss − {self.loss.c:.3g}")
        return "\n".join(lines)


def front_laws(
    study: optuna.Study, cost_key: str = "seconds", irreducible: bool | None = None
) -> FrontLaws:
    """Return the laws by which the best loss and its hyperparameters move with cost.

    Each numeric hyperparameter is regressed on cost, both in logarithms, over the points of the
    `front`; the loss by `fit_compute`, with or without a constant, or as the points decide. Those
    points are the best ones found, not the best there are: a hyperparameter to which the loss is
    nearly blind has an exponent nearer to 0 than its optimum's, since the search did not have to
    move it. Standard errors take the points for independent, which neighbours on a front are not:
    read them as too small (the slow test allows for it). Raises `ConfigError` for fewer than three
    points, and `ValueError` from the fits.

    >>> study, lr = optuna.create_study(), optuna.distributions.FloatDistribution(1e-3, 1, log=True)
    >>> for cost in (1.0, 4.0, 16.0, 64.0):
    ...     study.add_trial(optuna.trial.create_trial(
    ...         value=3 * cost**-0.1, params={"lr": 0.1 * cost**-0.5},
    ...         distributions={"lr": lr}, user_attrs={"flops": cost}))
    >>> laws = front_laws(study, "flops")
    >>> {name: round(exponent, 6) for name, (exponent, _) in laws.exponents.items()}
    {'lr': -0.5, 'loss': -0.1}
    """
    points = front(study, cost_key)
    require(len(points) >= 3, "front", len(points), "have at least 3 points; run more trials")
    cost, loss = np.array([[p.cost, p.loss] for p in points]).T
    names = [k for k in points[0].params if all(_positive(p.params.get(k)) for p in points)]
    return FrontLaws(
        points=points,
        params={k: fit_loglog([p.params[k] for p in points], cost=cost) for k in names},
        loss=fit_compute(Runs(flops=cost, loss=loss), irreducible=irreducible),
    )


def front_of(trials: Sequence[FrozenTrial], cost_key: str | None) -> list[FrontPoint]:
    """The non-dominated points of these trials, from the cheapest to the best."""
    groups: dict[tuple[Any, ...], list[FrozenTrial]] = {}
    for t in trials:
        groups.setdefault(tuple(sorted(t.params.items())), []).append(t)
    points = [
        FrontPoint(
            params=same[0].params,
            cost=float(np.mean([cost_of(t, cost_key) for t in same])),
            loss=float(np.mean([loss_of(t) for t in same])),
            trials=len(same),
        )
        for same in groups.values()
    ]
    lowest: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not lowest or point.loss < lowest[-1].loss:
            lowest.append(point)
    return lowest


def check_study(study: optuna.Study) -> None:
    """Refuse a study that does not minimize one loss."""
    alone = study.directions == [StudyDirection.MINIMIZE]
    names = [d.name.lower() for d in study.directions]
    require(alone, "directions", names, "be one loss to minimize; cost is a user attribute")


def healthy(trial: FrozenTrial) -> bool:
    """Whether a finished trial broke no constraint and has a loss."""
    kept = all(value <= 0 for value in trial.constraints.values())
    return kept and trial.value is not None and math.isfinite(trial.value)


def loss_of(trial: FrozenTrial) -> float:
    """The trial's loss, which must have a logarithm."""
    value = trial.value or 0.0
    require(value > 0, f"loss of trial {trial.number}", value, "be > 0: its logarithm is modelled")
    return value


def cost_of(trial: FrozenTrial, cost_key: str | None) -> float:
    """The trial's cost, which must have a logarithm; 1 when all cost the same."""
    if cost_key is None:
        return 1.0
    value = trial.user_attrs[cost_key]
    require(_positive(value), f"{cost_key} of trial {trial.number}", value, "be a number > 0")
    return float(value)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
