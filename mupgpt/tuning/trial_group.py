"""Trials in training together: each is one member a seed of a population, at a clock of its own."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import Corpus
from mupgpt.training.population import Population
from mupgpt.tuning.pruning import passing, rung_steps
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.study import penalized

__all__ = ["Point", "TrialGroup", "has_outcome", "outcome", "point_of", "tell_again"]

Point = tuple[tuple[str, Any], ...]
"""A trial's searched values, as a key."""

FACTS = ("diverged", "losses", "seconds")

log = logging.getLogger("mupgpt.worker")


class TrialGroup:
    """A worker's trials of one cell, from their first step to what the study is told.

    ``trials`` are those in hand: who is stopped at a rung or has finished leaves it, and `begin`
    puts others in the free places.
    """

    def __init__(self, study: optuna.Study, cell: Cell, corpus: Corpus) -> None:
        self.trials: list[optuna.Trial] = []
        self._study, self._cell, self._corpus = study, cell, corpus
        self._config, self._search = cell.config(), cell.spec.study
        self._ends = [*rung_steps(self._search, self._config.steps), self._config.steps]
        self._members: dict[int, list[int]] = {}  # trial number → its members
        self._points: dict[int, Point] = {}
        self._seconds: dict[int, float] = {}
        self._population: Population | None = None

    @property
    def free(self) -> int:
        """How many more trials have a place."""
        if self._population is None or len(self._config.course) > 1:
            return 0
        seeds = len(self._search.seeds)
        return len(self._population.members) // seeds - len(self.trials)

    @property
    def points(self) -> set[Point]:
        """The values of the trials in hand."""
        return {self._points[t.number] for t in self.trials}

    def begin(self, trials: Sequence[optuna.Trial]) -> list[optuna.Trial]:
        """Start these trials, the first ones or in free places; places left over are given up.

        Returns those for which there was no place.
        """
        fit = len(trials) if self._population is None else self.free
        started, rest = list(trials[:fit]), list(trials[fit:])
        seeds = self._search.seeds
        points = [point_of(t) for t in started]
        members = self._place([self._cell.config(dict(p), s) for p in points for s in seeds])
        for i, (trial, point) in enumerate(zip(started, points, strict=True)):
            self._members[trial.number] = members[i * len(seeds) : (i + 1) * len(seeds)]
            self._points[trial.number] = point
            self._seconds[trial.number] = 0.0
        self.trials += started
        return rest

    def _place(self, configs: Sequence[TrainConfig]) -> list[int]:
        """The members that these runs are from now on."""
        kept = [m for t in self.trials for m in self._members[t.number]]
        if self._population is None:
            if configs:
                self._population = Population(configs, self._corpus)
            return list(self._population.members) if self._population else []
        in_hand = set(kept)
        places = [m for m in self._population.members if m not in in_hand][: len(configs)]
        members = self._population.replace(places, configs) if configs else []
        if kept or members:
            self._population.keep([*kept, *members])
        return members

    def advance(self, check: Callable[[], None]) -> None:
        """Train until the first trial stands at a rung or at its end; ``check()`` at every step."""
        population = self._population
        assert population is not None
        started = time.monotonic()
        clocks = set(self._clocks().values())
        left = min(end - clock for clock in clocks for end in self._ends if end > clock)
        for _ in range(left):
            check()
            population.train(population.step + 1)
        share = (time.monotonic() - started) / len(self.trials)
        for trial in self.trials:
            self._seconds[trial.number] += share

    def settle(self) -> None:
        """Report and judge who stands at a rung, tell who has finished; both may leave."""
        assert self._population is not None
        clocks = self._clocks()
        standing = [t for t in self.trials if clocks[t.number] in self._ends]
        losses = self._population.evaluate([m for t in standing for m in self._members[t.number]])
        found = {t.number: [losses[m] for m in self._members[t.number]] for t in standing}
        for end in sorted({clocks[t.number] for t in standing}):
            here = [t for t in standing if clocks[t.number] == end]
            if end == self._config.steps:
                for trial in here:
                    self._tell(trial, found[trial.number])
            else:
                self._judge(here, end, found)

    def _judge(self, here: list[optuna.Trial], rung: int, losses: dict[int, list[float]]) -> None:
        for trial in here:
            with _unless_taken(trial):
                trial.report(_value(losses[trial.number], self._config.model.vocab_size), rung)
        seen = self._study.get_trials(deepcopy=False)
        passed = passing(self._search, seen, self._ends[:-1], rung, {t.number for t in here})
        for trial in here:
            if trial.number not in passed:
                with _unless_taken(trial):
                    self._study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
                self.trials.remove(trial)

    def _tell(self, trial: optuna.Trial, losses: list[float]) -> None:
        value, facts = outcome(losses, self._config.model.vocab_size)
        seconds = self._seconds[trial.number]
        with _unless_taken(trial):
            trial.set_constraint("diverged", float(facts["diverged"]))
            for key, fact in {**facts, "seconds": round(seconds, 3)}.items():
                trial.set_user_attr(key, fact)
            self._study.tell(trial, value)
        self.trials.remove(trial)
        log.info("%s trial %d: %.4f nats, its share %.1f s",
                 self._study.study_name, trial.number, value, seconds)  # fmt: skip

    def _clocks(self) -> dict[int, int]:
        """The steps that each trial in hand has taken, by number."""
        assert self._population is not None
        clocks = self._population.clocks
        return {t.number: clocks[self._members[t.number][0]] for t in self.trials}


def _value(losses: Sequence[float], vocab_size: int) -> float:
    """Mean over seeds; a diverged seed makes it the penalty."""
    counted = [penalized(loss, vocab_size) for loss in losses]
    worst = penalized(math.nan, vocab_size)
    return worst if worst in counted else statistics.fmean(counted)


def outcome(losses: Sequence[float], vocab_size: int) -> tuple[float, dict[str, Any]]:
    """A finished trial's value, and the attributes by which everything reads it."""
    value = _value(losses, vocab_size)
    return value, {
        "diverged": value == penalized(math.nan, vocab_size),
        "losses": [penalized(loss, vocab_size) for loss in losses],
    }


def point_of(trial: optuna.Trial | FrozenTrial) -> Point:
    """The values that make a trial what it is: seeds and data are those of all its study."""
    return tuple(sorted(trial.params.items()))


def has_outcome(trial: FrozenTrial) -> bool:
    """Whether a finished trial says all that `tell_again` tells."""
    return "losses" in trial.user_attrs or bool(trial.intermediate_values)


def tell_again(study: optuna.Study, trial: optuna.Trial, twin: FrozenTrial) -> None:
    """Tell of ``trial`` what a finished one with the same values came to.

    Trained again it would come to the same, bit for bit. Its user attribute ``copied_from`` is the
    number of the one that was trained.
    """
    facts = {key: twin.user_attrs[key] for key in FACTS if key in twin.user_attrs}
    with _unless_taken(trial):
        for step, loss in twin.intermediate_values.items():
            trial.report(loss, step)
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        for key, fact in {**facts, "copied_from": twin.number}.items():
            trial.set_user_attr(key, fact)
        value = twin.value if twin.state == TrialState.COMPLETE else None
        study.tell(trial, value, state=twin.state)


@contextmanager
def _unless_taken(trial: optuna.Trial) -> Iterator[None]:
    """A trial whose heartbeats came too late was queued again: its result is left to the retry."""
    try:
        yield
    except UpdateFinishedTrialError:
        log.warning("trial %d was given to another worker meanwhile", trial.number)
