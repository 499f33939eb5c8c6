"""What can go wrong by a user's hand or in a run: one class each, told apart by class alone."""

import difflib
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Crashed",
    "Diverged",
    "Interrupted",
    "require",
    "unknown",
]


class ConfigError(ValueError):
    """A mistake of the user's: names the field, the value and the remedy.

    >>> from mupgpt import HParams
    >>> HParams(beta2=1.5)
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: hparams.beta2 = 1.5: must be < 1
    """


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Raise `ConfigError` naming the field, the value and what it must do, unless ``ok``."""
    if not ok:
        remedy = remedy if remedy.startswith("must") else f"must {remedy}"
        raise ConfigError(f"{name} = {value!r}: {remedy}")


def unknown(kind: str, value: str, known: Any) -> ConfigError:
    """The error for a name that is not among ``known``, with the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown {kind} {value!r}; {hint}")


class CheckpointError(RuntimeError):
    """No checkpoint could be written, or none could be read; the command line exits with 1.

    >>> issubclass(CheckpointError, RuntimeError)
    True
    """


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a checkpoint: the same command continues it.

    As every KeyboardInterrupt it passes by ``except Exception``:

    >>> try:
    ...     raise Interrupted("stopped after step 8")
    ... except KeyboardInterrupt as stop:
    ...     print(stop)
    stopped after step 8
    """


class Diverged(RuntimeError):
    """The loss is no longer finite; the command line exits with 1.

    >>> issubclass(Diverged, RuntimeError)
    True
    """


class Crashed(RuntimeError):
    """The run keeps failing without getting anywhere: `mupgpt launch` tries no more.

    >>> issubclass(Crashed, RuntimeError)
    True
    """
