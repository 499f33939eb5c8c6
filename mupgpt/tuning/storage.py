"""Optuna's own storages, opened for sweeps: with heartbeats, and patient with their database."""

import abc
import functools
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._heartbeat import BaseHeartbeat  # by it Optuna knows who has heartbeats
from sqlalchemy import event
from sqlalchemy.exc import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random_exponential,
)

from mupgpt.errors import ConfigError
from mupgpt.tuning.retry import retry_after_death
from mupgpt.tuning.urls import journal_file, shown, sqlite_file, unsaid

__all__ = ["MISSED_BEATS", "PatientStorage", "close_storage", "open_storage", "quiet",
           "study_attrs"]  # fmt: skip

MISSED_BEATS = 6  # so many heartbeats late, a trial is given to another worker
PATIENCE_S = 60.0  # how long a database may be away
# The last: a query in a transaction that an earlier one has lost, as Optuna's second way to read
# trials is.
AWAY = (OperationalError, InterfaceError, PendingRollbackError)
HALF_MADE = (IntegrityError, ProgrammingError, StorageInternalError)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its news, and without warnings of heartbeats outside ``Study.optimize``: the
    worker sends them itself."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Hh]eartbeat.*")
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _is_away(error: BaseException) -> bool:
    return isinstance(error.__cause__ if isinstance(error, StorageInternalError) else error, AWAY)


def _say_waiting(state: RetryCallState) -> None:
    if state.upcoming_sleep > 1:
        print("the sweep's database does not answer; waiting", file=sys.stderr)


_patiently = Retrying(
    retry=retry_if_exception(_is_away),
    stop=stop_before_delay(PATIENCE_S),
    wait=wait_exponential(multiplier=0.1, max=5.0),
    before_sleep=_say_waiting,
    reraise=True,
)


def _patient(name: str) -> Callable[..., Any]:
    original = getattr(BaseStorage, name, None) or getattr(BaseHeartbeat, name)

    @functools.wraps(original, updated=())  # but for its mark of being abstract
    def call(self: "PatientStorage", *args: Any, **kwargs: Any) -> Any:
        return _patiently(getattr(self.cached, name), *args, **kwargs)

    return call


def _forwarding(cls: type) -> type:
    """A class decorator: what the bases leave open is asked of ``self.cached``, patiently."""
    for name in cls.__abstractmethods__:
        setattr(cls, name, _patient(name))
    return abc.update_abstractmethods(cls)


@_forwarding
class PatientStorage(BaseStorage, BaseHeartbeat):
    """Optuna's database storage and its cache, whose calls outlast a minute without the database.

    Every call may be repeated, even if it was its answer that got lost: a trial that was created
    or popped twice is found to be surplus by its worker, or has no heartbeat and is taken back.
    """

    def __init__(self, database: RDBStorage) -> None:
        self.database = database
        self.cached = get_storage(database)


def open_storage(url: str, heartbeat: int = 10) -> BaseStorage:
    """Optuna's storage at ``url``, with heartbeats (seconds apart) where a database gives them.

    ``journal:PATH`` opens Optuna's journal file: accepted, but it has no heartbeat (the trials of a
    killed worker stay RUNNING), and a torn append can make the study unreadable. Raises ConfigError
    for what cannot be opened.
    """
    if file := journal_file(url):
        return _open_journal(file)
    try:
        # pyrefly: ignore[bad-instantiation]  # the decorator has filled what it holds abstract
        return PatientStorage(_open_database(url, heartbeat))
    except Exception as error:  # each driver has errors of its own
        reason = unsaid(str(error), url)
        if isinstance(error, ModuleNotFoundError):
            reason += "; PostgreSQL needs: pip install 'mupgpt[postgresql]'"
        raise ConfigError(f"cannot open storage {shown(url)!r}: {reason}") from None


def _open_journal(file: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        return JournalStorage(JournalFileBackend(str(file)))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read journal '{file}': {error}") from error


def _open_database(url: str, heartbeat: int) -> RDBStorage:
    file = sqlite_file(url)
    if file is None:
        return _connect(url, {"pool_pre_ping": True}, heartbeat, HALF_MADE)
    # Readers and the writer do not wait for each other; kept in the file.
    with closing(sqlite3.connect(file, timeout=60)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    # SQLite's way to say that a table is there already is an OperationalError; a server's way to
    # say that it is not there itself, which no second attempt mends.
    busy = (*HALF_MADE, OperationalError)
    storage = _connect(url, {"connect_args": {"timeout": 60}}, heartbeat, busy)
    event.listen(storage.engine, "connect", _no_waiting_for_the_disk)
    storage.engine.dispose()
    return storage


def _connect(
    url: str, options: dict[str, Any], heartbeat: int, half_made: tuple[type[Exception], ...]
) -> RDBStorage:
    """The storage; tried again where another process makes the same tables at the same moment."""
    again = Retrying(
        retry=retry_if_exception_type(half_made),
        stop=stop_after_attempt(5),
        wait=wait_random_exponential(multiplier=0.4, max=6.0),
        reraise=True,
    )
    with quiet():
        return again(
            RDBStorage,
            url,
            engine_kwargs=options,
            heartbeat_interval=heartbeat,
            grace_period=MISSED_BEATS * heartbeat,
            heartbeat_stale_trial_callback=retry_after_death,
        )


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
    if isinstance(storage, PatientStorage):
        storage.database.remove_session()
        storage.database.engine.dispose()
