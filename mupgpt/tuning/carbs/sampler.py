"""Cost-aware search around the Pareto front of cost and loss, after CARBS (arXiv 2306.08055).

Where scale is searched too (sizes, steps), one best trial says little: what is wanted is the least
loss at every cost, and how its hyperparameters move with cost. `CarbsSampler` searches for that
front; `mupgpt.tuning.carbs.front` reads it and fits power laws along it.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState
from scipy.special import erfcx, log_ndtr

from mupgpt.errors import require
from mupgpt.tuning.carbs.front import FrontPoint, check_study, cost_of, front_of, healthy, loss_of
from mupgpt.tuning.carbs.gp import GP, Array, fit_gp

__all__ = ["CarbsSampler"]

CANDIDATES = 200  # per searched dimension
MOST = 1000  # trials that a surrogate is made of: the latest
NEAR = 0.1  # in ln cost: a point of the front that is dearer by less counts as had already
log = logging.getLogger("mupgpt.carbs")


class CarbsSampler(BaseSampler):
    """An Optuna sampler that looks for the least loss at every cost.

    Gaussian processes over the searched values predict log loss and log cost; one over log cost
    smooths the front of what was measured. Candidates are normal steps around the front's points,
    and the one taken has the highest

        expected improvement over the front at its own cost
        × density of its step × probability that it breaks no constraint.

    For a share ``upward`` of the suggestions a cost is drawn between the two ends of the front (in
    logarithms), and what counts there is to improve on the front at that cost: these go on toward
    the expensive end. Every ``resample_every``-th suggestion repeats a point of the front instead,
    so that a lucky loss does not stay there; 0 turns this off where a repeat can tell nothing new.
    Trials that still run stand in with their predicted losses, so any number can be asked for at
    once.

    In the paper the front between two points is the curve through them, ``upward`` is 1, and the
    cheapest fifth of the trials has one point. Here the front is a staircase, what one has at a
    cost is the best of what costs no more, so that gaps are filled and the cheap end counts too.

    A trial's cost is its user attribute ``cost_key``, set before it is told (None: all cost the
    same, and the front is the best trial). Until ``n_startup_trials`` have one, values are drawn
    around ``center`` where it names them, else uniformly. Where cost is searched over decades, name
    a cheap run as the center: the search stays near what it has seen, and uniform draws may begin
    at the dearest end. ``radius`` is the standard deviation of a step, in decades on a log scale
    (0.3: a factor of two), else as a share of the range. Candidates predicted to cost more than
    ``max_cost`` are dropped. Categorical values are drawn at random.

    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> def loss(trial):
    ...     size = trial.suggest_float("size", 1, 1e3, log=True)
    ...     lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    ...     trial.set_user_attr("flops", size)
    ...     return 2 + size**-0.3 + math.log(lr * size**0.5 / 0.3) ** 2
    >>> study = optuna.create_study(sampler=CarbsSampler(cost_key="flops", seed=0))
    >>> study.optimize(loss, n_trials=30)
    >>> from mupgpt.tuning.carbs.front import front_laws
    >>> abs(front_laws(study, "flops").exponents["lr"][0] + 0.5) < 0.1
    True
    """

    def __init__(
        self,
        *,
        cost_key: str | None = "seconds",
        seed: int | None = None,
        center: Mapping[str, float] | None = None,
        radius: float = 0.3,
        upward: float = 0.2,
        resample_every: int = 5,
        n_startup_trials: int = 4,
        max_cost: float = math.inf,
    ) -> None:
        require(radius > 0, "radius", radius, "be > 0")
        require(0 <= upward <= 1, "upward", upward, "lie between 0 and 1")
        require(resample_every >= 0, "resample_every", resample_every, "be >= 0 (0: never)")
        require(n_startup_trials >= 2, "n_startup_trials", n_startup_trials, "be >= 2")
        require(max_cost > 0, "max_cost", max_cost, "be > 0")
        self._cost_key, self._center, self._radius = cost_key, dict(center or {}), radius
        self._upward, self._resample_every = upward, resample_every
        self._n_startup, self._max_cost = n_startup_trials, max_cost
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._intersection = IntersectionSearchSpace()
        self._fitted: tuple[Any, _Surrogates] | None = None
        self._said: set[str] = set()

    def reseed_rng(self) -> None:
        """Draw other numbers than the copies of this sampler in other threads."""
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The numeric dimensions that all finished trials share."""
        shared = self._intersection.calculate(study)
        return {k: d for k, d in shared.items() if _numeric(d) and not d.single()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value drawn around the center, or uniformly where none is named."""
        if not _numeric(param_distribution) and param_name not in self._said:
            self._said.add(param_name)
            log.warning("%s is categorical: CARBS searches numbers, it is drawn at random",
                        param_name)  # fmt: skip
        elif param_name in self._center:
            axis, center = _Axis(param_distribution, self._radius), self._center[param_name]
            require(center > 0 or not axis.log, f"center.{param_name}", center, "be > 0 (log)")
            return axis.value(axis.unit(center) + axis.step * self._rng.normal())
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The best candidate, or the point of the front that is to be tried again."""
        check_study(study)
        names = search_space.keys()
        trials = [t for t in study.get_trials(deepcopy=False) if names <= t.params.keys()]
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        ended = [t for t in done if self._cost_key in (None, *t.user_attrs)]
        costed = bool(ended) or len(done) < self._n_startup
        require(costed, "cost_key", self._cost_key, "be a user attribute, set before each tell")
        sound = [t for t in ended if healthy(t)]
        if not search_space or len(sound) < self._n_startup:
            return {}
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number]
        points = front_of(sound, self._cost_key)
        if self._resample_every:
            seen = Counter(tuple(t.params[k] for k in names) for t in sound + running)
            if len(sound) // self._resample_every > seen.total() - len(seen):
                again = min(points, key=lambda p: seen[tuple(p.params[k] for k in names)])
                return {k: again.params[k] for k in names}
        space = _Space(search_space, self._radius)
        key = (study.study_name, [t.number for t in ended])
        if self._fitted is None or self._fitted[0] != key:
            self._fitted = key, _Surrogates.fit(space, ended[-MOST:], points, self._cost_key)
        origins = space.rows([p.params for p in points])
        candidates = self._candidates(space, origins)
        score = self._score(self._fitted[1], candidates, space.rows([t.params for t in running]))
        apart = (candidates[:, None] - origins) / space.steps  # (candidates, origins, d)
        score -= (apart**2).sum(-1).min(1) / 2
        tried = space.rows([t.params for t in ended + running])
        known = np.abs(candidates[:, None] - tried).max(-1).min(1) < 1e-9
        return space.params(candidates[np.where(known, -math.inf, score).argmax()])

    def _candidates(self, space: "_Space", origins: Array) -> Array:
        """Rows around the origins; a step past a bound ends on it."""
        count = CANDIDATES * len(space.axes)
        start = origins[self._rng.integers(len(origins), size=count)]
        return space.snap(start + space.steps * self._rng.normal(size=start.shape))

    def _score(self, surrogates: "_Surrogates", x: Array, running: Array) -> Array:
        """log(expected improvement × probability of success), −∞ beyond the cap on cost."""
        mean, deviation = surrogates.loss.given(running).predict(x)
        cost = surrogates.cost.predict(x)[0]
        bar = surrogates.bar(cost)
        if self._rng.random() < self._upward:
            bar = np.minimum(bar, surrogates.bar(self._rng.uniform(*surrogates.costs[[0, -1]])))
        score = _log_improvement((bar - mean) / deviation) + np.log(deviation)
        if surrogates.margin is not None:
            middle, width = surrogates.margin.predict(x)
            score += log_ndtr(middle / width)
        return np.where(cost <= math.log(self._max_cost), score, -math.inf)


@dataclass(frozen=True)
class _Surrogates:
    """What is predicted at a row of the unit cube, and along the front."""

    loss: GP  # ln loss
    cost: GP  # ln cost
    margin: GP | None  # ±1: broke no constraint, broke one; None when none was ever broken
    costs: Array  # ln cost of the front's points, rising
    losses: Array  # ln loss of the front there, by a Gaussian process through its points

    @classmethod
    def fit(
        cls,
        space: "_Space",
        trials: Sequence[FrozenTrial],
        points: Sequence[FrontPoint],
        cost_key: str | None,
    ) -> "_Surrogates":
        sound = [t for t in trials if healthy(t)]
        x = space.rows([t.params for t in sound])
        signs = [1.0 if healthy(t) else -1.0 for t in trials]
        broken = len(sound) < len(trials)
        costs = np.log([p.cost for p in points])
        share = (costs - costs[0]) / max(costs[-1] - costs[0], 1e-9)
        along = fit_gp(share[:, None], np.log([p.loss for p in points]))
        return cls(
            loss=fit_gp(x, np.log([loss_of(t) for t in sound])),
            cost=fit_gp(x, np.log([cost_of(t, cost_key) for t in sound])),
            margin=fit_gp(space.rows([t.params for t in trials]), signs) if broken else None,
            costs=costs,
            losses=np.minimum.accumulate(along.predict(share[:, None])[0]),
        )

    def bar(self, cost: Array | float) -> Array:
        """ln loss of the front at ln cost: of its last point that costs no more (beyond `NEAR`)."""
        place = np.searchsorted(self.costs, np.atleast_1d(cost) + NEAR, side="right") - 1
        return self.losses[np.maximum(place, 0)]


class _Axis:
    """A numeric distribution as the unit interval."""

    def __init__(self, distribution: Any, radius: float) -> None:
        self.low, self.high = distribution.low, distribution.high
        self.grid, self.whole = distribution.step, isinstance(distribution, IntDistribution)
        forward: Callable[[float], float] = math.log10 if distribution.log else float
        half = self.grid / 2 if self.whole else 0.0  # an end of a range of ints is worth a whole
        self.forward, self.log = forward, distribution.log
        self.start = forward(self.low - half)
        self.width = forward(self.high + half) - self.start
        self.step = min(radius / self.width, 0.3) if self.log else radius

    def unit(self, value: float) -> float:
        return (self.forward(value) - self.start) / self.width

    def value(self, unit: float) -> float:
        """The value that the distribution allows nearest to a place, inside or outside of it."""
        place = self.start + min(max(unit, 0.0), 1.0) * self.width
        value = 10**place if self.log else place
        if self.grid is not None:
            value = self.low + round((value - self.low) / self.grid) * self.grid
        value = min(max(value, self.low), self.high)
        return int(value) if self.whole else float(value)


class _Space:
    """Numeric distributions as the unit cube."""

    def __init__(self, distributions: Mapping[str, BaseDistribution], radius: float) -> None:
        self.axes = {k: _Axis(d, radius) for k, d in distributions.items()}
        self.steps = np.array([axis.step for axis in self.axes.values()])

    def rows(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """(len(params), d)"""
        rows = [[axis.unit(p[k]) for k, axis in self.axes.items()] for p in params]
        return np.array(rows, float).reshape(-1, len(self.axes))

    def params(self, row: Array) -> dict[str, float]:
        return {
            k: axis.value(float(u)) for (k, axis), u in zip(self.axes.items(), row, strict=True)
        }

    def snap(self, x: Array) -> Array:
        """Rows moved to the nearest place that the distributions allow."""
        x = np.clip(x, 0, 1)
        for column, axis in zip(x.T, self.axes.values(), strict=True):
            if axis.grid is not None:
                column[:] = [axis.unit(axis.value(u)) for u in column]
        return x


def _log_improvement(z: Array) -> Array:
    """ln of φ(z) + z·Φ(z): the expected improvement of a standard normal, also far below zero.

    >>> np.round(_log_improvement(np.array([0.0, -40.0])), 4).tolist()
    [-0.9189, -808.2986]
    """
    with np.errstate(over="ignore"):  # erfcx of a large gain, where the sum is z itself
        inner = 1 + z * math.sqrt(math.pi / 2) * erfcx(-z / math.sqrt(2))
    near = np.log(np.clip(inner, 1e-300, 1e300)) - z**2 / 2
    far = -(z**2) / 2 - 2 * np.log(np.maximum(-z, 1.0))
    tail = np.where(z < -100, far, near)
    return np.where(z > 20, np.log(np.maximum(z, 1.0)), tail - math.log(2 * math.pi) / 2)


def _numeric(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, FloatDistribution | IntDistribution)
