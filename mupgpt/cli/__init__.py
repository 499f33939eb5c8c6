"""The command ``mupgpt``: every flag comes from a function's signature, through tyro."""

import sys
from collections.abc import Callable, Sequence

from mupgpt.errors import ConfigError
from mupgpt.util.stopping import STOPPED

__all__ = ["main"]

USER_MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """The exit code of one command."""
    from mupgpt.cli.commands import parse

    try:
        return guarded(lambda: parse(argv))
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}; what finished is kept: the same command continues",
              file=sys.stderr)  # fmt: skip
        return STOPPED


def guarded(command: Callable[[], int | None]) -> int:
    """The command's exit code, its known failures turned into one line."""
    try:
        return command() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except RuntimeError as error:
        if type(error).__name__ not in ("CheckpointError", "Crashed", "Diverged"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
