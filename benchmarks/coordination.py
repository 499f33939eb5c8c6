"""What Optuna, the storage and our bookkeeping cost, in CPU seconds a trial and of a whole sweep.

    python benchmarks/coordination.py        # two to four minutes of one core

One worker runs sweeps of 250, 500 and 1,000 trials whose training is replaced by a random loss:
what is left is coordination. A trial of the shipped sweep `joint` (two seeds, as a population) is
timed in the same run; the goal is a share below 5 % at 1,000 trials. The growth of memory says
whether a finished trial leaves anything behind but its record.
"""

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile

from measure import goal, machine, timed, write

SIZES = (250, 500, 1000)
GOAL = 0.05


def main() -> None:
    where = machine()
    rows = []
    for trials in SIZES:
        command = [sys.executable, __file__, str(trials)]
        with tempfile.TemporaryDirectory() as folder:
            said = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
        rows.append(json.loads(said))
        print(f"{trials} trials: {1000 * rows[-1]['cpu_s'] / trials:.0f} ms a trial, "
              f"{rows[-1]['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    trial = trial_seconds()
    each = rows[-1]["cpu_s"] / SIZES[-1]
    share = each / (each + trial)
    print(f"a trial of `joint` trains for {trial:.2f} CPU seconds")
    growth = (rows[-1]["peak_mib"] - rows[0]["peak_mib"]) / (SIZES[-1] - SIZES[0])
    write("coordination", {
        "machine": where,
        "rows": rows,
        "trial_cpu_s": trial,
        "share": share,
        "growth_kib_per_trial": 1024 * growth,
        "goals": [goal("coordination's share of a sweep's CPU, 1000 trials", share, most=GOAL)],
    })  # fmt: skip


def coordinate(trials: int) -> None:
    """One sweep that trains nothing; prints its cost as JSON."""
    import mupgpt.tuning.trial_group as chunk
    from mupgpt.tuning.run import run_sweep

    chunk.Population = Untrained  # type: ignore[assignment, misc]
    spec = joint(trials)
    cost = timed(lambda: run_sweep(spec, workers=1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"trials": trials, "cpu_s": cost.cpu, "wall_s": cost.wall, "peak_mib": peak}))


def joint(trials: int):
    """The shipped sweep at another budget."""
    from mupgpt.tuning.spec import load_spec

    spec = load_spec("joint")
    study = dataclasses.replace(spec.study, trials=trials, members=16)
    return dataclasses.replace(spec, study=study)


class Untrained:
    """Stands where a Population does, and trains nothing."""

    def __init__(self, configs, corpus) -> None:
        self.clocks = dict.fromkeys(range(len(configs)), 0)
        self._losses = random.Random(len(configs))

    @property
    def members(self) -> list[int]:
        return list(self.clocks)

    @property
    def step(self) -> int:
        return max(self.clocks.values())

    def train(self, until: int) -> None:
        steps = until - self.step
        self.clocks = {member: clock + steps for member, clock in self.clocks.items()}

    def evaluate(self, members) -> dict[int, float]:
        return {member: self._losses.uniform(2, 3) for member in members}

    def keep(self, members) -> None:
        self.clocks = {member: self.clocks[member] for member in members}

    def replace(self, members, configs) -> list[int]:
        fresh = [max(self.clocks) + 1 + i for i in range(len(configs))]
        self.keep([m for m in self.clocks if m not in members])
        self.clocks |= dict.fromkeys(fresh, 0)
        return fresh


def trial_seconds() -> float:
    """CPU seconds of a trial: a population as large as a worker's, whole, by its trials."""
    from mupgpt.data.corpus import load_corpus
    from mupgpt.training.device import settle_cpu
    from mupgpt.training.population import Population
    from mupgpt.tuning.group_size import usual

    settle_cpu()
    cell, seeds = joint(1).cells[0], joint(1).study.seeds
    config = cell.config()
    count = usual(config) // len(seeds)
    corpus = load_corpus(config.data)
    population = Population([cell.config({}, seed) for _ in range(count) for seed in seeds], corpus)
    return timed(lambda: (population.train(), population.evaluate())).cpu / count


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main() if len(sys.argv) == 1 else coordinate(int(sys.argv[1]))
