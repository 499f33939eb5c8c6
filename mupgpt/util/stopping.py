"""Stopping a long job where it loses nothing: a signal asks, the job looks at safe points."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPPED", "Stop", "stop_flag"]

STOPPED = 130
"""Exit code of a job that was asked to stop and can be continued."""


class Stop:
    """Whether a job is to stop; it looks where it loses nothing.

    ``when`` is one more reason to stop, beside being asked.

    >>> stop = Stop()
    >>> stop.check()
    >>> stop.ask()
    >>> stop.asked
    True
    """

    def __init__(self, when: Callable[[], bool] = lambda: False) -> None:
        self._when, self._asked = when, False

    def ask(self) -> None:
        """Ask the job to stop; that cannot be taken back."""
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether it was asked, or ``when()`` holds."""
        return self._asked or self._when()

    def check(self) -> None:
        """Raise KeyboardInterrupt if the job is to stop."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stop_flag(when: Callable[[], bool] = lambda: False) -> Iterator[Stop]:
    """A `Stop` that SIGINT and SIGTERM ask, or ``when()``; a second signal acts at once.

    Outside the main thread, where Python delivers no signals, only ``when`` counts.
    """
    stop = Stop(when)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, _: Any) -> None:
        stop.ask()
        signal.signal(number, before[number])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
