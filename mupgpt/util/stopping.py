"""Stopping a long job where it loses nothing: a signal asks, the job looks at safe points."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPPED", "stop_flag"]

STOPPED = 130
"""Exit code of a job that was asked to stop and can be continued."""


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal acts at once.

    Outside the main thread, where Python delivers no signals, it is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
