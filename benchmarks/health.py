"""How far healthy runs are from their narrower runs, and what measuring them costs.

    python benchmarks/health.py             # writes sweeps/results/health.json

Two seeds of the bundled proxies at widths 32 and 64 are what runs of other seeds at 128 and 256 are
held against, one proxy at a time. For each quantity of `mupgpt.training.watch` the table holds the
smallest and largest ratio to the expectation over all records, kinds, seeds and pairs of widths.
The cost is processor time of one measurement over that of one training step, alternating.
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import Batches
from mupgpt.data.corpus import load_corpus
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.health import measure
from mupgpt.training.metrics import read_metrics
from mupgpt.training.step import train_step
from mupgpt.training.watch import TOLERANCE, Watch

RESULT = Path(__file__).parent.parent / "sweeps" / "results" / "health.json"
RUNS, STEPS = Path("runs") / "health", 200
NARROW, WIDE, SEEDS, OTHER_SEEDS = (32, 64), (128, 256), (0, 1), (2, 3)
KINDS = {"bias": "biases", "norm": "norms"}


def main() -> None:
    torch.set_num_threads(1)
    for width, seed in [*itertools.product(NARROW, SEEDS), *itertools.product(WIDE, OTHER_SEEDS)]:
        Trainer(config(width, seed), folder(width, seed)).fit()
    record = {
        "command": "python benchmarks/health.py",
        "machine": "2-core CPU, one thread",
        "model": "proxy-*",
        "steps": STEPS,
        "held_against": {str(width): ratios(width) for width in NARROW},
        "measurement_over_step": {str(width): cost(width) for width in WIDE},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def config(width: int, seed: int) -> TrainConfig:
    tracking = {"log_every": 10, "eval_every": 20, "wandb": "off"}
    model = f"proxy-{width}"
    return train_config({"model": model, "seed": seed, "steps": STEPS, "tracking": tracking})


def folder(width: int, seed: int) -> Path:
    return RUNS / f"{width}-{seed}"


def ratios(narrow: int) -> dict:
    """Comparisons, false alarms, and for each quantity the smallest and largest ratio."""
    false: list[str] = []
    found: dict[str, list[float]] = {}
    for seed, width, other in itertools.product(SEEDS, WIDE, OTHER_SEEDS):
        wide = config(width, other)
        watched = dataclasses.replace(wide.tracking, watch=(str(folder(narrow, seed)),))
        watch = Watch(dataclasses.replace(wide, tracking=watched))
        for record in read_metrics(folder(width, other) / "metrics.jsonl"):
            facts, alarms = watch(record)
            false += alarms
            for key, ratio in facts.items():
                if key != "watch/outside":
                    found.setdefault(name(key), []).append(ratio)
    return {
        "comparisons": sum(map(len, found.values())),
        "false_alarms": len(false),
        "ratios": {key: [round(min(x), 3), round(max(x), 3)] for key, x in sorted(found.items())},
    }


def name(key: str) -> str:
    """``watch/hidden/eps_ratio`` → ``eps_ratio of matrices``."""
    _, kind, quantity = key.split("/")
    if quantity not in TOLERANCE:
        return f"{kind}/{quantity}"
    return f"{quantity} of {KINDS.get(kind, 'matrices')}"


def cost(width: int, times: int = 20) -> float:
    """Median processor time of a measurement over the median of a training step."""
    c = config(width, 0)
    table = parametrize(c.model, c.base, c.hparams, c.rule)
    model = GPT(c.model)
    init_weights(model, table, 0)
    optimizer = make_optimizer(model, table)
    batches = Batches(load_corpus(c.data), c.course, 0)
    spent: dict[str, list[float]] = {"step": [], "measure": []}
    for step in range(times):
        start = time.process_time()
        train_step(model, optimizer, batches(step), lr_factor=1.0, grad_clip=1.0)
        between = time.process_time()
        measure(optimizer, table)
        spent["step"].append(between - start)
        spent["measure"].append(time.process_time() - between)
    return round(statistics.median(spent["measure"]) / statistics.median(spent["step"]), 3)


if __name__ == "__main__":
    main()
