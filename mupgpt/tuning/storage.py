"""Optuna's own storages, opened for sweeps: with heartbeats, and patient with their database."""

import functools
import logging
import random
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import event
from sqlalchemy.exc import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)

from mupgpt.errors import ConfigError

__all__ = [
    "MAX_RETRY",
    "MISSED_BEATS",
    "PatientStorage",
    "close_storage",
    "default_url",
    "open_storage",
    "queue_again",
    "quiet",
    "retry_after_death",
    "study_attrs",
]

MAX_RETRY = 2  # times that a trial is queued again after its worker died
MISSED_BEATS = 6  # so many heartbeats late, a trial is given to another worker
PATIENCE_S = 60.0  # how long a database may be away
# The last: a query in a transaction that an earlier one has lost, as Optuna's second way to read
# trials is.
_AWAY = (OperationalError, InterfaceError, PendingRollbackError)

log = logging.getLogger("mupgpt.worker")
optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about heartbeats outside ``Study.optimize``: the worker sends them itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Hh]eartbeat.*")
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield


def default_url(folder: Path) -> str:
    """The SQLite database of a sweep's folder."""
    return f"sqlite:///{folder / 'study.db'}"


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, made again while the database is away, for up to a minute.

    Every call may be repeated, even if it was its answer that got lost: a trial that was created
    or popped twice is found to be surplus by its worker, or has no heartbeat and is taken back.
    """

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pause, deadline = 0.1, time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(*args, **kwargs)
            except (*_AWAY, StorageInternalError) as error:
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                if not isinstance(cause, _AWAY) or time.monotonic() + pause > deadline:
                    raise
                if pause > 1:
                    print("the sweep's database does not answer; waiting", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    return wrapped


class PatientStorage(RDBStorage):
    """Optuna's database storage whose calls outlast a minute without the database."""


_BEHIND_THE_CACHE = ("_create_new_trial", "_get_best_trial_id", "_get_stale_trial_ids",
                     "_get_trials", "_set_trial_param", "record_heartbeat")  # fmt: skip
for _name in (*BaseStorage.__abstractmethods__, *_BEHIND_THE_CACHE):
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def open_storage(url: str, heartbeat: int = 10) -> BaseStorage:
    """Optuna's storage at ``url``, with heartbeats where a database gives them.

    ``journal:PATH`` opens Optuna's journal file: accepted, but it has no heartbeat (the trials of a
    killed worker stay RUNNING), and a torn append can make the study unreadable.
    """
    if url.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        try:
            return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"cannot read journal {url!r}: {error}") from error
    sqlite = url.startswith("sqlite:///")
    options = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    try:
        if sqlite:
            # Readers and the writer do not wait for each other; kept in the file.
            with sqlite3.connect(url.removeprefix("sqlite:///"), timeout=60) as database:
                database.execute("PRAGMA journal_mode=WAL")
            database.close()
        with quiet():
            storage = _connect(url, options, heartbeat)
        if sqlite:
            event.listen(storage.engine, "connect", _no_waiting_for_the_disk)
            storage.engine.dispose()
        return storage
    except Exception as error:
        raise ConfigError(f"cannot open storage {url!r}: {_reason(error)}") from error


def queue_again(study: optuna.Study, trial: FrozenTrial, deaths: int) -> None:
    """Queue what was begun and given up, with its values as far as they were chosen."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(params, user_attrs={"queued": True, "deaths": deaths})


def retry_after_death(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the trial of a dead worker again, unless too many have died on it."""
    deaths = 1 + trial.user_attrs.get("deaths", 0)
    if deaths <= MAX_RETRY:
        queue_again(study, trial, deaths)
    else:
        log.warning("%s trial %d: %d workers died on it; it is given up",
                    study.study_name, trial.number, deaths)  # fmt: skip


def _connect(url: str, options: dict[str, Any], heartbeat: int) -> PatientStorage:
    """The storage; tried again where another process makes the same tables at the same moment."""
    connect = functools.partial(
        PatientStorage,
        url,
        engine_kwargs=options,
        heartbeat_interval=heartbeat,
        grace_period=MISSED_BEATS * heartbeat,
        heartbeat_stale_trial_callback=retry_after_death,
    )
    for attempt in range(4):
        try:
            return connect()
        except (IntegrityError, ProgrammingError, StorageInternalError):
            pass
        except OperationalError as error:  # what SQLite calls it
            if "already exists" not in str(error):
                raise
        time.sleep(0.2 * 2**attempt * (1 + random.random()))
    return connect()


def _no_waiting_for_the_disk(connection: sqlite3.Connection, _record: Any) -> None:
    """A commit outlives the process at once, a power failure within moments (WAL stays whole)."""
    connection.execute("PRAGMA synchronous=NORMAL")


def study_attrs(url: str) -> list[dict[str, Any]]:
    """The user attributes of every study in a storage; no connection to it stays open."""
    storage = open_storage(url)
    try:
        return [study.user_attrs for study in storage.get_all_studies()]
    finally:
        close_storage(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close every connection of a storage; the next call opens a new one."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; PostgreSQL needs: pip install 'mupgpt[postgresql]'"
    return str(error)
