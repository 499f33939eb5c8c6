"""Seconds until a command that needs no torch has done its work.

    python benchmarks/start_times.py           # writes sweeps/results/start_times.json

Commands take turns in processes of their own, beside an empty Python and `import torch`.
"""

import sys

from measure import child, each_clock, goal, machine, take_turns, times_faster, write

ROUNDS, WARM = 9, 1
GOAL = 4.0
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import mupgpt'": ["-c", "import mupgpt"],
    "mupgpt --help": ["-m", "mupgpt", "--help"],
    "mupgpt table cerebras-gpt-13b": ["-m", "mupgpt", "table", "cerebras-gpt-13b"],
}


def main() -> None:
    where = machine()
    sides = {
        name: lambda arguments=arguments: child([sys.executable, *arguments])
        for name, arguments in COMMANDS.items()
    }
    costs = take_turns(sides, ROUNDS, WARM)
    torch = costs["python -c 'import torch'"]
    goals = [
        goal(f"CPU seconds of importing torch over those of `{name}`",
             times_faster(torch, costs[name])["cpu"]["median"], least=GOAL)
        for name in list(COMMANDS)[3:]
    ]  # fmt: skip
    seconds = {name: each_clock(cost) for name, cost in costs.items()}
    write("start_times", {"machine": where, "rounds": ROUNDS, "seconds": seconds, "goals": goals})
    for name, clocks in seconds.items():
        print(
            f"{name:30} {clocks['wall']['median']:.3f} s wall, {clocks['cpu']['median']:.3f} s CPU"
        )


if __name__ == "__main__":
    main()
