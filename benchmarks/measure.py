"""What the speed benchmarks share: timing in turns, spread, the machine, goals, and the record.

Machines are busy. So the sides of a comparison take turns, a ratio is one of two neighbours in
time, CPU seconds stand beside wall seconds, and the load is written down.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "sweeps" / "results"
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Cost:
    """Seconds of one piece of work."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Cost:
    """What ``work`` costs in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def child(command: Sequence[str], *, env: Mapping[str, str] = os.environ, **options: Any) -> Cost:
    """What a command costs, with all the processes that it starts and waits for.

    They may keep bytecode: else each of them compiles what it imports anew.
    """
    env = {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env, **options)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed (exit {process.returncode})")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


class Served:
    """A step in a process of its own: ``python FILE ARGUMENTS``, which ends in `serve`."""

    def __init__(self, file: str, *arguments: object) -> None:
        command = [sys.executable, file, *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, steps: int) -> Cost:
        """What so many steps cost there."""
        assert self.process.stdin and self.process.stdout
        print(steps, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args} ended early; its message is above")
        return Cost(**json.loads(line))

    def end(self) -> None:
        self.process.communicate()


def serve(step: Callable[[], object]) -> None:
    """Take as many steps as each line of standard input says, and print what they cost."""
    for line in sys.stdin:
        cost = timed(lambda steps=int(line): [step() for _ in range(steps)])
        print(json.dumps(vars(cost)), flush=True)


def take_turns(
    sides: Mapping[str, Callable[[], Cost]], rounds: int, warm: int = 0
) -> dict[str, list[Cost]]:
    """The costs of each side, one a round; who begins changes from round to round."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for turn in range(-warm, rounds):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            cost = sides[name]()
            if turn >= 0:
                costs[name].append(cost)
    return costs


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def each_clock(costs: Sequence[Cost], amount: float | None = None) -> dict[str, Any]:
    """Spread of the seconds on both clocks; of ``amount`` per second where one is given."""
    columns = {clock: [getattr(cost, clock) for cost in costs] for clock in CLOCKS}
    return {
        clock: spread([amount / s for s in seconds] if amount else seconds)
        for clock, seconds in columns.items()
    }


def times_faster(slow: Sequence[Cost], fast: Sequence[Cost]) -> dict[str, Any]:
    """Spread over rounds of how many times ``fast`` is faster, on both clocks."""
    return {
        clock: spread(
            [getattr(s, clock) / getattr(f, clock) for s, f in zip(slow, fast, strict=True)]
        )
        for clock in CLOCKS
    }


def goal(what: str, found: float, *, least: float = -1.0, most: float = -1.0) -> dict[str, Any]:
    """One figure held against what it should at least (or at most) be."""
    limit = {"least": least} if least >= 0 else {"most": most}
    reached = found >= least if least >= 0 else found <= most
    return {"what": what, "found": found, **limit, "reached": reached}


def machine() -> dict[str, Any]:
    """Where, and how busy it was when this was called."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor as Linux names it, with the widest vector instructions it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    fields = dict(line.split("\t: ", 1) for line in text.splitlines() if "\t: " in line)
    flags = fields.get("flags", "").split()
    wide = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return ", ".join(filter(None, (fields.get("model name", "unknown"), wide)))


def write(name: str, record: Mapping[str, Any]) -> None:
    """Write ``sweeps/results/NAME.json``; print where it was measured and its goals."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = {"command": f"python benchmarks/{name}.py"}
    text = json.dumps(command | dict(record), indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    where = record["machine"]
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load']} at the start")
    for row in record["goals"]:
        limit = f">= {row['least']:g}" if "least" in row else f"<= {row['most']:g}"
        verdict = "reached" if row["reached"] else "NOT reached"
        print(f"{row['what']}: {row['found']:.3g} (goal {limit}: {verdict})")
