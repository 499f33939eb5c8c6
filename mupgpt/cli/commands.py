"""The command line, put together from the modules that hold its commands.

Heavy imports happen inside commands: ``--help`` and ``table`` need no torch.
"""

import sys
from collections.abc import Callable
from typing import Any

from tyro.extras import SubcommandApp

from mupgpt.cli import checks, guards, laws, look, runs, sweeps

__all__ = ["parse"]

WAS = {"rungs": "bridge"}  # commands of 0.1.0, for a version


def parse(argv: list[str]) -> int | None:
    """Run the command line; returns an exit code (None is 0)."""
    if argv[:1] and argv[0] in WAS:
        argv = [WAS[argv[0]], *argv[1:]]
        print(f"this command is called mupgpt {argv[0]} now", file=sys.stderr)
    if argv[:1] == ["train"] and len(argv) > 1 and argv[1] not in ("-h", "--help"):
        return runs.run_train(argv[1], argv[2:])
    app, sweep, data = SubcommandApp(), SubcommandApp(), SubcommandApp()
    commands: list[Callable[..., Any]] = [
        *look.COMMANDS, *sweeps.COMMANDS, *checks.COMMANDS, *guards.COMMANDS, *runs.COMMANDS,
        *laws.COMMANDS,
    ]  # fmt: skip
    for command in commands:
        app.command(name=command.__name__.replace("_", "-"))(command)
    below: dict[str, Callable[..., Any]] = dict(sweeps.SWEEP)
    for name, command in below.items():
        sweep.command(name=name)(command)
    data.command(look.prepare)
    app.command(sweep, name="sweep", help="Run and read hyperparameter sweeps.")
    app.command(data, name="data", help="Prepare token shards.")
    return app.cli(
        prog="mupgpt",
        description="Tune on tiny proxies, transfer to 13B, and check that it holds.",
        args=argv or ["--help"],
    )
