"""The queue of one study: what is tried before anything is sampled, and what its budget lacks.

Workers ask for what the budget lacks, count again, and drop what is too much, so that no number of
them overshoots. What was begun and not finished is queued for the next one: by the worker that is
stopped, or, when it died, by whoever misses its heartbeat.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from mupgpt.tuning.retry import queue_again, retry_after_death
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.storage import MISSED_BEATS, quiet
from mupgpt.tuning.study import DONE, Sweep, earlier_sweep, finished, trials_of
from mupgpt.tuning.trial_group import Point, has_outcome, point_of
from mupgpt.tuning.urls import sqlite_file

__all__ = ["TrialQueue", "fill"]

POLL_S = 0.01  # between two looks at a lock


def fill(sweep: Sweep) -> None:
    """Queue in every study what is known before anything is sampled."""
    for cell in sweep.spec.cells:
        TrialQueue(sweep, cell).fill()


class TrialQueue:
    """The trials of one cell that wait for a worker; ``salt`` sets this worker's sampler apart."""

    def __init__(self, sweep: Sweep, cell: Cell, salt: str = "") -> None:
        self.cell, self.study = cell, sweep.study(cell, salt)
        self._sweep, self._search = sweep, sweep.spec.study
        self._is_grid = self._search.sampler == "grid"

    @property
    def left(self) -> int:
        """Trials that wait for a worker: those queued, and what the budget lacks."""
        return self._sweep.to_begin(self.cell)

    def is_busy(self) -> bool:
        """Whether any trial is running or waiting, after those of dead workers came back."""
        self.reclaim()
        states = {t.state for t in self._trials()}
        return bool(states & {TrialState.RUNNING, TrialState.WAITING})

    def finished(self) -> dict[Point, FrozenTrial]:
        """Trials whose outcome stands, by their values; of several, the first."""
        ended = [t for t in reversed(self._trials()) if t.state in DONE and has_outcome(t)]
        return {point_of(t): t for t in ended}

    def _trials(self) -> list[FrozenTrial]:
        return trials_of(self._sweep.storage, self.cell.name)

    def fill(self) -> None:
        """Queue a grid's points; else the run as it stands, so that a sweep cannot end up worse
        than what it began with, and an earlier sweep's best."""
        self.reclaim()
        if self._is_grid:
            self._queue_points(self.cell.search_space.grid(self.cell.center()))
        elif not self._trials():
            for params in (_inside(self.cell, self.cell.center()), *self._earlier()):
                if params:
                    with quiet():
                        self.study.enqueue_trial(params, skip_if_exists=True)
        self._drop_doubles()

    def _earlier(self) -> list[dict[str, float]]:
        """The best of each study of the sweep that this one starts from."""
        if not self._search.warm_start:
            return []
        studies = earlier_sweep(self._sweep.spec, self._sweep.url).studies().values()
        best = [t.params for s in studies for t in finished(s)[: self._search.warm_top]]
        return [_inside(self.cell, params) for params in best]

    def _queue_points(self, points: Sequence[dict[str, float]]) -> None:
        """Queue those points of a grid that it lacks."""
        known = [{**_fixed(t), **t.params} for t in self._trials()]
        for point in points:
            if point not in known:
                self.study.enqueue_trial(point, user_attrs={"queued": True})

    def _drop_doubles(self) -> None:
        """Of what two machines queued at the same moment, leave the first by number."""
        seen: list[dict[str, Any]] = []
        for trial in self._trials():
            if fixed := _fixed(trial):
                if fixed in seen and trial.state == TrialState.WAITING:
                    self._give_up(trial)
                seen.append(fixed)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one worker of this machine take trials at a time.

        SQLite has no row locks, so that two workers could pop the same trial; a server has them,
        and the journal orders its entries.
        """
        file = sqlite_file(self._sweep.url)
        if file is None:
            yield
            return
        with FileLock(f"{file}.lock", poll_interval=POLL_S):
            yield

    def ask(self) -> optuna.Trial | None:
        """A new trial; None if it was over budget."""
        with quiet():
            trial = self.study.ask(self.cell.search_space.distributions)
        if not self._is_surplus(trial):
            return trial
        self.study.tell(trial, state=TrialState.FAIL)
        return None

    def _is_surplus(self, trial: optuna.Trial) -> bool:
        """Whether another worker began the last trial between our look and our ask (for a grid:
        took its last point, so that this one is none of them)."""
        if self._is_grid and "queued" not in trial.user_attrs:
            return True
        budget = self._search.trials
        if trial.number < budget:  # then it is within it, and reading all trials can be spared
            return False
        return sum(t.number < trial.number for t in self._trials()) >= budget

    def sign(self, trial: optuna.Trial) -> None:
        """Say who has the trial, after its first heartbeat: what dies in between is told apart."""
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")

    def extend(self) -> bool:
        """Queue what a grid lacks beside its lowest points; True when there is more to do."""
        if not self._is_grid:
            return False
        with self.turn():
            trials = self._trials()
            lacking = self._search.trials - len(trials)
            if any(t.state not in DONE for t in trials) or lacking <= 0:
                return False
            key = next(iter(self.cell.search_space.dimensions))
            points = {t.params[key]: t.user_attrs["losses"] for t in trials}
            more = self.cell.search_space.extension(points)
            self._queue_points(more[:lacking])
            self._drop_doubles()
            return bool(more)

    def give_back(self, trials: Iterable[optuna.Trial]) -> None:
        """Queue those of the trials that still run again."""
        for trial in trials:
            frozen = self._sweep.storage.get_trial(trial._trial_id)
            if frozen.state == TrialState.RUNNING and self._give_up(frozen):
                queue_again(self.study, frozen, frozen.user_attrs.get("deaths", 0))

    def reclaim(self) -> None:
        """Put the trials of dead workers back into the queue.

        A worker of this machine is dead when its process is gone; one of another machine when its
        heartbeat has been missing for long enough, which Optuna itself sees to.
        """
        grace = timedelta(seconds=MISSED_BEATS * self._search.heartbeat)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _is_dead(trial, grace) and self._give_up(trial):
                retry_after_death(self.study, trial)
        with quiet():
            fail_stale_trials(self.study)

    def _give_up(self, trial: FrozenTrial) -> bool:
        """Whether it was this call that ended the trial; another worker may be quicker."""
        with suppress(UpdateFinishedTrialError):
            return self._sweep.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return False


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """The values with which a trial was queued."""
    return trial.system_attrs.get("fixed_params", {})


def _is_dead(trial: FrozenTrial, grace: timedelta) -> bool:
    """Whether a running trial's worker is gone, or it died before it could say who it is."""
    host, _, pid = trial.user_attrs.get("worker", "").rpartition(":")
    if not pid:
        started = trial.datetime_start
        return started is not None and datetime.now() - started > grace
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the number is another user's by now; the heartbeat will tell
        return False
    return False


def _inside(cell: Cell, params: Mapping[str, float]) -> dict[str, float]:
    """Those values that are searched and lie in the space; what it lacks is sampled."""
    space = cell.search_space.dimensions
    return {
        key: params[key]
        for key, d in space.items()
        if key in params
        and (params[key] in d.values if d.values else d.low <= params[key] <= d.high)
    }
