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
    """A mistake of the user's: names the field, the value and the remedy."""


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
    """No checkpoint could be written, or none could be read."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a checkpoint: the same command continues it."""


class Diverged(RuntimeError):
    """The loss is no longer finite."""


class Crashed(RuntimeError):
    """The run keeps failing without getting anywhere."""
