"""A worker: an independent process that takes queued trials, trains them together, and tells."""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from mupgpt.data.corpus import load_corpus
from mupgpt.training.device import settle_cpu
from mupgpt.tuning.group_size import members_for
from mupgpt.tuning.samplers import find_sampler
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.storage import PatientStorage
from mupgpt.tuning.study import Sweep
from mupgpt.tuning.trial_group import TrialGroup, point_of, tell_again
from mupgpt.tuning.trial_queue import TrialQueue
from mupgpt.util.stopping import STOPPED, Stop, stop_flag

__all__ = ["Seat", "Worker", "work"]

POLL_S = 1.0


@dataclass(frozen=True)
class Seat:
    """Which one a worker is of those that were started together."""

    number: int = 0
    workers: int = 1
    sharing: int = 1
    """So many of them train on the same device and share its memory."""


ALONE = Seat()


def work(
    sweep: Sweep, when: Callable[[], bool] = lambda: False, tell: Callable[[], None] = lambda: None
) -> None:
    """Be the one worker, in this process: until nothing is left anywhere, or ``when()`` holds."""
    settle_cpu()
    with stop_flag(when) as stop:
        Worker(sweep, stop, ALONE, tell).run()


class Worker:
    """Takes trials of a sweep, trains those of one study together, and tells what came out.

    It looks at ``stop`` between steps alone, so that no trial is lost halfway through a
    transaction: then the trials in hand go back into the queue. ``tell()`` is called there too, to
    say how far the sweep is.
    """

    def __init__(
        self, sweep: Sweep, stop: Stop, seat: Seat = ALONE, tell: Callable[[], None] = lambda: None
    ) -> None:
        self._sweep, self._stop, self._seat, self._tell = sweep, stop, seat, tell
        first = seat.number % len(sweep.spec.cells)
        cells = sweep.spec.cells[first:] + sweep.spec.cells[:first]
        self._queues = [TrialQueue(sweep, cell, _salt(sweep, cell, seat)) for cell in cells]
        self._rooms: dict[str, int] = {}  # study → trials that train together
        self._taken: list[optuna.Trial] = []  # and not in training
        self._group: TrialGroup | None = None

    def run(self) -> None:
        """Train until no trial is left anywhere; raise KeyboardInterrupt when asked to stop."""
        while True:
            served = [self._serve(queue) for queue in self._queues]
            if not any(served):
                busy = [queue.is_busy() for queue in self._queues]
                if not any(busy):
                    return
                self._pause()
                time.sleep(POLL_S)

    def _serve(self, queue: TrialQueue) -> bool:
        """Train trials of one study to their ends; False when there was nothing to take."""
        self._pause()
        room = self._room(queue)
        if not room:
            return queue.extend()
        self._group = TrialGroup(queue.study, queue.cell, load_corpus(queue.cell.config().data))
        try:
            with _heartbeat(self._sweep.storage, self._in_hand):
                self._take(queue, room)
                if not self._taken:  # others were quicker
                    return False
                self._train(queue, self._group)
        except BaseException:
            queue.give_back(self._in_hand())
            raise
        finally:
            self._taken, self._group = [], None
        return True

    def _room(self, queue: TrialQueue) -> int:
        """Trials of a study that train together in this process; 0 when none is left to begin."""
        left, name = queue.left, queue.cell.name
        if left and name not in self._rooms:
            seeds, steps = len(self._sweep.spec.study.seeds), queue.cell.config().steps
            steps_here = left * seeds * steps / self._seat.workers
            members = members_for(queue.cell, steps_here, self._seat.sharing, self._pause)
            self._rooms[name] = max(1, members // seeds)
        return self._rooms[name] if left else 0

    def _take(self, queue: TrialQueue, room: int) -> None:
        """Ask for this worker's part of what is left, as far as there is room."""
        with queue.turn():
            for _ in range(min(room, -(-queue.left // self._seat.workers))):
                self._pause()
                if trial := queue.ask():
                    self._taken.append(trial)
                    _beat(self._sweep.storage, [trial])
                    queue.sign(trial)

    def _train(self, queue: TrialQueue, group: TrialGroup) -> None:
        """Train to the last trial's end; others take the places of those that are stopped early."""
        self._begin(queue, group)
        while group.trials:
            group.advance(self._pause)
            group.settle()
            if group.trials and group.free:
                self._take(queue, group.free)
            self._begin(queue, group)
        queue.give_back(self._taken)  # they waited for trials that another worker has by now

    def _begin(self, queue: TrialQueue, group: TrialGroup) -> None:
        """Start what is new. What repeats a finished trial is told its value; what repeats one in
        training waits for it."""
        finished, training = queue.finished(), group.points
        new: list[optuna.Trial] = []
        waiting: list[optuna.Trial] = []
        for trial in self._taken:
            point = point_of(trial)
            if point in finished:
                tell_again(queue.study, trial, finished[point])
            elif point in training:
                waiting.append(trial)
            else:
                training.add(point)
                new.append(trial)
        self._taken = waiting + group.begin(new)

    def _in_hand(self) -> list[optuna.Trial]:
        return [*(self._group.trials if self._group else ()), *self._taken]

    def _pause(self) -> None:
        """Where nothing is lost: show how far the sweep is, and stop if asked to."""
        self._tell()
        self._stop.check()


def _salt(sweep: Sweep, cell: Cell, seat: Seat) -> str:
    """What tells this session's sampler from earlier ones and from its neighbours'.

    Alone on a local database it is the number of trials that were begun: a session is repeatable.
    """
    trials = sweep.study(cell).get_trials(deepcopy=False)
    begun = sum(t.state != TrialState.WAITING for t in trials)
    alone = seat.workers == 1 and sweep.is_local
    return str(begun) if alone else f"{begun}/{socket.gethostname()}/{os.getpid()}"


@contextmanager
def _heartbeat(storage: BaseStorage, in_hand: Callable[[], list[optuna.Trial]]) -> Iterator[None]:
    """Signs of life for every trial in hand: Optuna's own cover only Study.optimize."""
    if not isinstance(storage, PatientStorage):
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
    if isinstance(storage, PatientStorage):
        # A busy database: the next beat is soon enough.
        with suppress(SQLAlchemyError, StorageInternalError):
            for trial in trials:
                storage.record_heartbeat(trial._trial_id)


def main() -> None:
    """``python -m mupgpt.tuning.worker NAME NUMBER WORKERS SHARING [SAMPLER]``: one of several
    beside a parent, with which it ends; the storage is named in the environment."""
    name, *numbers = sys.argv[1:5]
    sampler = find_sampler(sys.argv[5]) if len(sys.argv) > 5 else None
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    parent = os.getppid()
    settle_cpu()
    try:
        sweep = replace(Sweep.open(name), sampler=sampler)
        with stop_flag(lambda: os.getppid() != parent) as stop:
            Worker(sweep, stop, Seat(*map(int, numbers))).run()
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
