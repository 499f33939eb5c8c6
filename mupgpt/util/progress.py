"""One line that says how far a long job is and how long it will still take."""

import sys
import time
from typing import Self

__all__ = ["Progress"]


class Progress:
    """Writes ``label: done/total what · loss · about 12 s left`` to stderr, now and then.

    On a terminal the line is rewritten; elsewhere a new line is written every ten seconds.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._live = sys.stderr.isatty()
        self._every = 0.5 if self._live else 10.0
        self._start = time.monotonic()
        self._last = -self._every
        self._first: int | None = None
        self._text = ""

    def due(self) -> bool:
        """Whether an update would be shown (asking is cheap; counting may not be)."""
        return time.monotonic() - self._last >= self._every

    def update(self, done: int, total: int, what: str = "") -> None:
        """Note the state and show it, if due; the estimate counts from the first call."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        self._text = f"{self.label}: {done}/{total} {what}"
        if done > self._first:
            left = (now - self._start) / (done - self._first) * (total - done)
            self._text += f" · about {_duration(left)} left"
        if self.due():
            self._last = now
            self._write()

    def _write(self) -> None:
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{self._text}")
        else:
            sys.stderr.write(self._text + "\n")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._text:
            took = _duration(time.monotonic() - self._start)
            end = "interrupted" if kind else "done"
            self._text = f"{self._text.split(' · about')[0]} · {end} after {took}"
            self._write()
            if self._live:
                sys.stderr.write("\n")


def _duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> _duration(75), _duration(4000), _duration(9.2)
    ('1 min 15 s', '1 h 6 min', '9 s')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"
