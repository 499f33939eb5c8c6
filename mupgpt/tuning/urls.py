"""Where a sweep's trials are kept: storage URLs, told apart and shown without their passwords."""

import os
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["STORAGE", "default_url", "given_url", "journal_file", "shown", "sqlite_file", "unsaid"]

STORAGE = "MUPGPT_STORAGE"
"""Environment variable with the storage where none is given. Workers get theirs by it: unlike a
command line it is not for everyone to read."""

JOURNAL = "journal:"
HIDDEN = "***"
BROKEN = "it is no URL; in a user's name or password write @ as %40, : as %3A, / as %2F"


def default_url(folder: Path) -> str:
    """The SQLite database of a sweep's folder."""
    return f"sqlite:///{folder / 'study.db'}"


def given_url(url: str | None) -> str | None:
    """The storage that was named, or that of the environment; None where neither says one."""
    return url or os.environ.get(STORAGE) or None


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, which lies on this machine; None for any other storage.

    >>> sqlite_file("sqlite:///runs/x.db").name, sqlite_file("postgresql://me@there/x")
    ('x.db', None)
    """
    parsed = _parsed(url)
    if parsed is None or parsed.get_backend_name() != "sqlite":
        return None
    return None if parsed.database in (None, "", ":memory:") else Path(parsed.database)


def journal_file(url: str) -> Path | None:
    """The file of Optuna's journal, ``journal:PATH``; None for any other storage."""
    return Path(url.removeprefix(JOURNAL)) if url.startswith(JOURNAL) else None


def shown(url: str) -> str:
    """The URL as messages, logs and commands' output show it: without any password.

    >>> shown("postgresql+psycopg://me:secret@there/x?sslpassword=too")
    'postgresql+psycopg://me:***@there/x?sslpassword=***'
    >>> shown("postgresql://me:sec@ret@there/x")  # what cannot be read is not repeated
    'postgresql://***'
    """
    if journal_file(url):
        return url
    parsed = _parsed(url)
    if parsed is None:
        return f"{url.partition('://')[0]}://{HIDDEN}" if "@" in url else url
    query = dict.fromkeys(_secret_keys(parsed), HIDDEN)
    text = parsed.update_query_dict(query).render_as_string(hide_password=True)
    return text.replace("%2A%2A%2A", HIDDEN)


def unsaid(text: str, url: str) -> str:
    """``text``, as an error of a driver's, without the passwords of ``url``."""
    if (parsed := _parsed(url)) is None:
        return BROKEN if "@" in url else text
    text = text.replace(url, shown(url))
    for word in [parsed.password, *(parsed.query[key] for key in _secret_keys(parsed))]:
        if word:
            text = text.replace(str(word), HIDDEN).replace(quote(str(word)), HIDDEN)
    return text


def _secret_keys(url: URL) -> list[str]:
    return [key for key in url.query if "password" in key.lower()]


def _parsed(url: str) -> URL | None:
    """None for what is no URL: there is no telling where in it a password ends."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is none
        return None
    return None if "@" in (parsed.host or "") else parsed
