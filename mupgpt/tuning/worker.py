"""A worker: an independent process that takes queued trials, trains them together, and tells.

A worker asks for what the budget lacks, counts again, and drops what it has too much, so no number
of workers overshoots. What was begun and not finished is queued for the next one: by a worker that
is stopped, or, when it died, by whoever misses its heartbeat.
"""

import fcntl
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mupgpt.data.corpus import load_corpus
from mupgpt.training.device import settle_cpu
from mupgpt.tuning.group_size import columns_for
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.storage import MISSED_BEATS, queue_again, quiet, retry_after_death
from mupgpt.tuning.study import DONE, Sweep, earlier_sweep, finished, trials_of
from mupgpt.tuning.trial_group import Chunk
from mupgpt.util.stopping import stop_flag

__all__ = ["fill", "work"]

POLL_S = 1.0
log = logging.getLogger("mupgpt.worker")


def fill(sweep: Sweep) -> None:
    """Queue what is known before anything is sampled: a grid's points; else the run as it stands,
    so that a sweep cannot end up worse than what it began with, and an earlier sweep's best."""
    for cell in sweep.spec.cells:
        study = sweep.study(cell)
        reclaim(sweep, study)
        if sweep.spec.study.sampler == "grid":
            _queue_points(sweep, study, cell, cell.search_space.grid(cell.center()))
        elif not trials_of(sweep.storage, cell.name):
            for params in (_default(sweep, cell), *_earlier(sweep, cell)):
                if params:
                    study.enqueue_trial(params, skip_if_exists=True)
        _drop_doubles(sweep, study)


def _queue_points(
    sweep: Sweep, study: optuna.Study, cell: Cell, points: Sequence[dict[str, float]]
) -> None:
    """Queue those points of a grid that it lacks."""
    trials = trials_of(sweep.storage, cell.name)
    known = [{**t.system_attrs.get("fixed_params", {}), **t.params} for t in trials]
    for point in points:
        if point not in known:
            study.enqueue_trial(point, user_attrs={"queued": True})


def _drop_doubles(sweep: Sweep, study: optuna.Study) -> None:
    """Of what two machines queued at the same moment, leave the first by number."""
    seen: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False):
        fixed = trial.system_attrs.get("fixed_params")
        if not fixed or trial.state == TrialState.FAIL:
            continue
        if fixed in seen and trial.state == TrialState.WAITING:
            _give_up(sweep, trial)
        seen.append(fixed)


def _give_up(sweep: Sweep, trial: FrozenTrial) -> bool:
    """Whether it was this call that ended the trial; another worker may be quicker."""
    try:
        return sweep.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def reclaim(sweep: Sweep, study: optuna.Study) -> None:
    """Put the trials of dead workers back into the queue.

    A worker of this machine is dead when its process is gone; one of another machine when its
    heartbeat has been missing for long enough, which Optuna itself sees to.
    """
    grace = timedelta(seconds=MISSED_BEATS * sweep.spec.study.heartbeat)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial, grace) and _give_up(sweep, trial):
            retry_after_death(study, trial)
    with quiet():
        fail_stale_trials(study)


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


def _default(sweep: Sweep, cell: Cell) -> dict[str, float]:
    """The run's own values, where they lie inside the space."""
    return _inside(cell, cell.center())


def _earlier(sweep: Sweep, cell: Cell) -> list[dict[str, float]]:
    """The best of each study of the sweep that this one starts from."""
    config = sweep.spec.study
    if not config.warm_start:
        return []
    studies = earlier_sweep(sweep.spec, sweep.url).studies().values()
    return [_inside(cell, t.params) for s in studies for t in finished(s)[: config.warm_top]]


def _inside(cell: Cell, params: Mapping[str, float]) -> dict[str, float]:
    """Those values that are searched and lie in the space; what it lacks is sampled."""
    space = cell.search_space.dimensions
    return {
        key: params[key]
        for key, d in space.items()
        if key in params
        and (params[key] in d.values if d.values else d.low <= params[key] <= d.high)
    }


def work(
    sweep: Sweep,
    worker: int = 0,
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take and train queued trials until none is left anywhere, or until ``stop()``.

    This is worker number ``worker`` of ``workers`` beside each other. When it is stopped it puts
    the trials in hand back into the queue and raises `KeyboardInterrupt`; a signal asks for that,
    and is heard between steps alone, so that no trial is lost halfway through a transaction.
    """
    settle_cpu()
    with stop_flag() as asked:
        _work(sweep, worker, workers, lambda: asked.is_set() or stop())


def _work(sweep: Sweep, worker: int, workers: int, stop: Callable[[], bool]) -> None:
    first = worker % len(sweep.spec.cells)
    cells = sweep.spec.cells[first:] + sweep.spec.cells[:first]
    studies = {cell.name: sweep.study(cell, _salt(sweep, cell, workers)) for cell in cells}
    rooms: dict[str, int] = {}
    while True:
        took = 0
        for cell in cells:
            room = _room(sweep, cell, workers, stop, rooms)
            took += _work_cell(sweep, studies[cell.name], cell, workers, room, stop)
        if not took:
            if not _anyone_running(sweep):
                return
            _check(stop)
            time.sleep(POLL_S)


def _salt(sweep: Sweep, cell: Cell, workers: int) -> str:
    """What tells this session's sampler from earlier ones and from its neighbours'.

    Alone on a local database it is the number of trials that were begun: a session is repeatable.
    """
    trials = sweep.study(cell).get_trials(deepcopy=False)
    begun = sum(t.state != TrialState.WAITING for t in trials)
    alone = workers == 1 and sweep.url.startswith("sqlite")
    return str(begun) if alone else f"{begun}/{socket.gethostname()}/{os.getpid()}"


def _anyone_running(sweep: Sweep) -> bool:
    busy = False
    for cell in sweep.spec.cells:
        reclaim(sweep, sweep.study(cell))
        states = {t.state for t in trials_of(sweep.storage, cell.name)}
        busy |= bool(states & {TrialState.RUNNING, TrialState.WAITING})
    return busy


def _work_cell(
    sweep: Sweep,
    study: optuna.Study,
    cell: Cell,
    workers: int,
    room: int,
    stop: Callable[[], bool],
) -> bool:
    """Train trials of the cell to their ends, others in the places of those that are stopped early;
    False when there was nothing to take."""
    _check(stop)
    if not room:
        if sweep.spec.study.sampler != "grid":
            return False
        with _turn(sweep.url):
            return _extend(sweep, study, cell)
    chunk = Chunk(study, cell, load_corpus(cell.config().data))
    taken: list[optuna.Trial] = []

    def in_hand() -> list[optuna.Trial]:
        return [*chunk.trials, *taken]

    try:
        with _heartbeat(sweep.backend, in_hand):
            with _turn(sweep.url):
                _take(sweep, study, cell, _share(sweep, cell, workers, room), taken, stop)
            if not taken:  # others were quicker
                return False
            while taken or chunk.trials:
                chunk.begin(taken)
                taken.clear()
                chunk.advance(lambda: _check(stop))
                chunk.settle()
                if chunk.trials and chunk.free:
                    with _turn(sweep.url):
                        count = _share(sweep, cell, workers, chunk.free)
                        _take(sweep, study, cell, count, taken, stop)
    except BaseException:
        running = [t for t in in_hand() if _state(study, t) == TrialState.RUNNING]
        _give_back(sweep, study, running)
        raise
    return True


def _room(
    sweep: Sweep, cell: Cell, workers: int, stop: Callable[[], bool], known: dict[str, int]
) -> int:
    """Trials of the cell that train together in this process; 0 when none is left to begin."""
    left = sweep.to_begin(cell)
    if left and cell.name not in known:
        seeds, steps = len(sweep.spec.study.seeds), cell.config().steps
        work = left * seeds * steps / workers
        columns = columns_for(cell, work, workers, lambda: _check(stop))
        known[cell.name] = max(1, columns // seeds)
    return known[cell.name] if left else 0


def _share(sweep: Sweep, cell: Cell, workers: int, room: int) -> int:
    """How many trials a worker takes of what is left, with room for so many."""
    return min(room, -(-sweep.to_begin(cell) // workers))


def _take(
    sweep: Sweep,
    study: optuna.Study,
    cell: Cell,
    count: int,
    trials: list[optuna.Trial],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Add up to ``count`` new trials, as long as they are within the budget.

    Each is signed by a heartbeat, then by name: whatever dies in between can be told apart.
    """
    for _ in range(count):
        _check(stop)
        with quiet():
            trial = study.ask(cell.search_space.distributions)
        if _surplus(sweep, cell, trial):
            study.tell(trial, state=TrialState.FAIL)
            continue
        trials.append(trial)
        _beat(sweep.backend, [trial])
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")


@contextmanager
def _turn(url: str) -> Iterator[None]:
    """Let one worker of this machine take trials at a time.

    SQLite has no row locks, so that two workers could pop the same trial; a server has them, and
    the journal orders its entries.
    """
    if not url.startswith("sqlite:///"):
        yield
        return
    with Path(f"{url.removeprefix('sqlite:///')}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _surplus(sweep: Sweep, cell: Cell, trial: optuna.Trial) -> bool:
    """Whether the trial is over budget: another worker began the last one between our look and our
    ask (for a grid: took its last point, so that this one is none of them)."""
    if sweep.spec.study.sampler == "grid" and "queued" not in trial.user_attrs:
        return True
    budget = sweep.spec.study.trials
    if trial.number < budget:  # then it is within it, and reading all trials can be spared
        return False
    return sum(t.number < trial.number for t in trials_of(sweep.storage, cell.name)) >= budget


def _extend(sweep: Sweep, study: optuna.Study, cell: Cell) -> bool:
    """Queue what the grid lacks beside its lowest points; True when there is more to do."""
    trials = trials_of(sweep.storage, cell.name)
    if any(t.state not in DONE for t in trials) or len(trials) >= sweep.spec.study.trials:
        return False
    key = next(iter(cell.search_space.dimensions))
    points = {t.params[key]: t.user_attrs["losses"] for t in trials}
    more = cell.search_space.extension(points)
    _queue_points(sweep, study, cell, more[: sweep.spec.study.trials - len(trials)])
    _drop_doubles(sweep, study)
    return bool(more)


def _state(study: optuna.Study, trial: optuna.Trial) -> TrialState:
    return study.get_trials(deepcopy=False)[trial.number].state


def _give_back(sweep: Sweep, study: optuna.Study, trials: Sequence[optuna.Trial]) -> None:
    for trial in trials:
        frozen = sweep.backend.get_trial(trial._trial_id)
        if _give_up(sweep, frozen):
            queue_again(study, frozen, frozen.user_attrs.get("deaths", 0))


@contextmanager
def _heartbeat(storage: BaseStorage, in_hand: Callable[[], list[optuna.Trial]]) -> Iterator[None]:
    """Signs of life for every trial in hand: Optuna's own cover only Study.optimize."""
    if not isinstance(storage, RDBStorage):
        yield
        return
    interval, done = storage.get_heartbeat_interval(), threading.Event()

    def beat() -> None:
        while not done.wait(interval):
            _beat(storage, in_hand())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(storage: BaseStorage, trials: Sequence[optuna.Trial]) -> None:
    if isinstance(storage, RDBStorage):
        # A busy database: the next beat is soon enough.
        with suppress(SQLAlchemyError, StorageInternalError):
            for trial in trials:
                storage.record_heartbeat(trial._trial_id)


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise KeyboardInterrupt


def main() -> None:
    """``python -m mupgpt.tuning.worker NAME URL NUMBER OF``: one of several beside a parent."""
    name, url, number, workers = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    parent = os.getppid()
    try:
        sweep = Sweep.open(name, url)
        work(sweep, int(number), int(workers), stop=lambda: os.getppid() != parent)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
