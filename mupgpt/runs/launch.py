"""Keeping one run alive: torchrun again from the last good checkpoint, and no loop of crashes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mupgpt.checkpoint.verify import checkpoints
from mupgpt.errors import Crashed, require
from mupgpt.util.stopping import STOPPED

__all__ = ["command_for", "supervise"]


MOST_PAUSE_S = 300.0


MISTAKE = 2  # its exit code for a config that cannot be run


def command_for(config: Path, folder: Path, processes: int) -> list[str]:
    """The command that trains ``config`` on ``processes`` processes of this machine.

    >>> command_for(Path("target.toml"), Path("runs/target"), 1)[1:]
    ['-m', 'mupgpt.trainer', 'target.toml', 'runs/target']
    >>> "--nproc-per-node=8" in command_for(Path("target.toml"), Path("runs/target"), 8)
    True
    """
    require(processes >= 1, "processes", processes, "be >= 1")
    trainer = ["-m", "mupgpt.trainer", str(config), str(folder)]
    if processes == 1:
        return [sys.executable, *trainer]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *trainer]


def supervise(command: Sequence[str], folder: Path, retries: int = 3, pause: float = 10.0) -> None:
    """Run ``command`` to its end, again after each failure.

    The trainer continues from the newest good checkpoint in ``folder`` by itself. ``retries``
    counts failures in a row between which no new checkpoint was written: then `Crashed` is raised,
    so that a run that cannot work does not burn its machine. The pause doubles with each such
    failure. An interrupt is passed on, and is not a failure; nor is a mistake in the config worth
    a second try.
    """
    require(retries >= 0, "retries", retries, "be >= 0")
    fruitless = 0
    while True:
        before = _newest(folder)
        code = _run(command)
        if code == 0:
            return
        if code == STOPPED:
            raise KeyboardInterrupt(f"stopped at step {_newest(folder)}")
        if code == MISTAKE:
            raise Crashed("the trainer refuses this config: see its message above")
        after = _newest(folder)
        fruitless = 1 if after > before else fruitless + 1
        if fruitless > retries:
            raise Crashed(
                f"exit code {code}, {fruitless} times in a row without a new checkpoint after step "
                f"{after} in {folder}; the messages above say why. When that is repaired, the same "
                "command continues"
            )
        wait = min(pause * 2 ** (fruitless - 1), MOST_PAUSE_S)
        print(f"exit code {code} after step {after}; again in {wait:g} s "
              f"({fruitless} of {retries} without a new checkpoint)", file=sys.stderr)  # fmt: skip
        time.sleep(wait)


def _newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    steps = [int(path.name.rpartition("-")[2]) for path in checkpoints(folder / "checkpoints")]
    return max(steps, default=0)


def _run(command: Sequence[str]) -> int:
    """The command's exit code; SIGINT and SIGTERM to this process reach it once."""
    child = subprocess.Popen(command, start_new_session=True, env=_environment())
    asked = False

    def forward(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if asked and code != 0 else code


def _environment() -> dict[str, str]:
    """One thread a process, as torchrun does it, and time for the checkpoint after a signal.

    What the user has set stays.
    """
    return {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "540", **os.environ}
