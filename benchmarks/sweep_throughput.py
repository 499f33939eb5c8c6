"""Trials per second of a sweep: ours as shipped against the usual way to run one.

    python benchmarks/sweep_throughput.py      # writes sweeps/results/sweep_throughput.json

The usual way is one process with PyTorch's default threads that trains one plain GPT after the
other under `Study.optimize`, Optuna's storage in memory. Both sides train the same trials (shapes,
steps, tokens, searched values) to their end and evaluate them on as many held-out tokens; each is
a process of its own, started anew, so that its start-up counts. Beside them, what a token costs one
thread of either model, without anything around the training step.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

from measure import Cost, child, each_clock, goal, machine, take_turns, timed, times_faster, write

ROUNDS, TRIALS, STEPS, WIDTH = 3, 24, 150, 64
TURNS, WARM, COLUMNS, GOAL = 12, 2, 8, 4.0
SPACE = {
    "hparams.lr": {"low": 7e-4, "high": 1.2e-2, "log": True},
    "hparams.init_std": {"low": 0.04, "high": 0.3, "log": True},
    "hparams.emb_mult": {"low": 0.5, "high": 12.0, "log": True},
}
TRAIN = {"model": {"preset": "proxy-64", "d_model": WIDTH}, "steps": STEPS}


def main() -> None:
    where = machine()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        # The last side begins: the usual way trains the trials that our sweep before it sampled.
        sides = {side: lambda side=side: run(side, work) for side in ("usual", "ours")}
        costs = take_turns(sides, ROUNDS)
    times, engine = times_faster(costs["usual"], costs["ours"]), step_costs()
    tokens = 512
    record = {
        "machine": where,
        "trial": {"d_model": WIDTH, "tokens_per_step": tokens, "steps": STEPS, "trials": TRIALS},
        "rounds": ROUNDS,
        "trials_per_second": {name: each_clock(costs[name], TRIALS) for name in sides},
        "times_faster": times,
        "one_thread": {
            "columns": COLUMNS,
            "tokens_per_second": {
                "usual": each_clock(engine["usual"], COLUMNS * tokens),
                "ours": each_clock(engine["ours"], COLUMNS * tokens),
            },
            "times_faster": times_faster(engine["usual"], engine["ours"]),
        },
        "goals": [goal(f"trials per wall second against the usual way, d = {WIDTH}",
                       times["wall"]["median"], least=GOAL)],
    }  # fmt: skip
    write("sweep_throughput", record)
    for name, clocks in record["trials_per_second"].items():
        print(f"{name:6} {clocks['wall']['median']:.3f} trials per wall second, "
              f"{clocks['cpu']['median']:.3f} per CPU second")  # fmt: skip
    alone = record["one_thread"]["times_faster"]["cpu"]["median"]
    print(f"a training step on one thread: {alone:.2f} times faster in CPU seconds")


def run(side: str, work: Path) -> Cost:
    """One whole sweep in a process that sees no limit on threads."""
    folder = Path(tempfile.mkdtemp(dir=work))
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in limits}
    command = [sys.executable, str(Path(__file__).resolve()), side, str(work / "trials.json")]
    return child(command, cwd=folder, env=clean)


def ours(trials: Path) -> None:
    """The sweep with its default workers; writes the values of its trials."""
    from mupgpt.tuning.run import run_sweep
    from mupgpt.tuning.spec import parse_spec

    table = {"name": "throughput", "study": {"trials": TRIALS}, "train": TRAIN, "space": SPACE}
    study = run_sweep(parse_spec(table, __file__))
    done = [trial for trial in study.trials if trial.value is not None]
    assert len(done) == TRIALS, f"{len(done)} of {TRIALS} trials"
    trials.write_text(json.dumps([trial.params for trial in done]))


def usual(trials: Path) -> None:
    """One plain trial after the other, in Optuna's own loop and memory."""
    import optuna
    from plain_gpt import plain_trial

    from mupgpt.data.corpus import load_corpus
    from mupgpt.resolve import train_config

    config = train_config(TRAIN)
    corpus = load_corpus(config.data)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for params in json.loads(trials.read_text()):
        study.enqueue_trial(params)

    def objective(trial: optuna.Trial) -> float:
        values = {name: trial.suggest_float(name, **bounds) for name, bounds in SPACE.items()}
        return plain_trial(config, corpus, values["hparams.lr"], values["hparams.init_std"])

    study.optimize(objective, n_trials=TRIALS)


def step_costs() -> dict[str, list[Cost]]:
    """A step of a population, and as many plain steps as it has columns, in turns."""
    import numpy as np
    import torch
    from plain_gpt import PlainGPT, crops, plain_step

    from mupgpt.data.corpus import load_corpus
    from mupgpt.resolve import train_config
    from mupgpt.training.device import settle_cpu
    from mupgpt.training.population import Population

    settle_cpu()
    config = train_config({**TRAIN, "steps": 10**6})
    corpus, rng = load_corpus(config.data), np.random.default_rng(0)
    population = Population([dataclasses.replace(config, seed=0)] * COLUMNS, corpus)
    model = PlainGPT(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def plain() -> None:
        for _ in range(COLUMNS):
            plain_step(model, optimizer, model(*crops(corpus.train, config, rng)), 1e-3)

    sides = {"usual": plain, "ours": lambda: population.train(population.step + 1)}
    return take_turns({n: lambda s=s: timed(s) for n, s in sides.items()}, TURNS, WARM)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"ours": ours, "usual": usual}[sys.argv[1]](Path(sys.argv[2]))
