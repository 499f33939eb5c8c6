"""Fit the step-time model on measured training steps of a dozen shapes, and name the best shape.

    python benchmarks/step_time.py             # writes sweeps/results/step_time.json

CPU seconds of a one-thread process (the least over steps), so that a busy machine counts little.
"""

import json
import time
from pathlib import Path

import torch

from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.planning.flops import flops_per_token
from mupgpt.resolve import train_config
from mupgpt.scaling.steptime import fit_step_time, memory_copies
from mupgpt.training.population import Population

RESULT = Path(__file__).parent.parent / "sweeps" / "results" / "step_time.json"
SHAPES = [(2, 64, 8), (2, 96, 8), (2, 128, 8), (2, 192, 8), (4, 64, 8), (4, 128, 8), (8, 64, 8),
          (2, 64, 32), (2, 128, 32), (4, 96, 16), (6, 96, 8), (2, 256, 8)]  # fmt: skip
WARM, MEASURED = 3, 12
HELD_OUT = (3, 160, 16)


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(*shape) for shape in (*SHAPES, HELD_OUT)]
    fitted, unseen = rows[:-1], rows[-1]
    columns = {name: [row[name] for row in fitted] for name in ("seconds", "copies", "flops")}
    fit = fit_step_time(**columns)
    at = (unseen["copies"], unseen["flops"])
    record = {
        "command": "python benchmarks/step_time.py",
        "machine": "2-core CPU, CPU seconds of one thread",
        "r2": fit.r2,
        "parameters": {name: getattr(fit, name) for name in ("overhead", "per_copy", "per_flop")},
        "intervals": {name: list(interval) for name, interval in fit.intervals.items()},
        "notes": list(fit.notes),
        "largest_relative_error": float(max(abs(fit.residuals))),
        "unseen": {**unseen, "predicted": float(fit.predict(*at)),
                   "interval": list(fit.predict_interval(*at))},
        "shapes": fitted,
    }  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in ("r2", "largest_relative_error", "unseen")}, indent=1))


def measure(layers: int, width: int, batch: int) -> dict:
    """One shape: its seconds per step, elements moved and FLOPs per step."""
    raw = {"model": {"preset": "proxy-64", "n_layer": layers, "d_model": width}}
    config = train_config({**raw, "batch_size": batch, "steps": WARM + MEASURED})
    m = config.model
    copies = memory_copies(m, batch, fused_attention=True)
    flops = flops_per_token(m, "palm") * config.tokens_per_step
    return {"n_layer": layers, "d_model": width, "batch_size": batch,
            "seconds": seconds_per_step(config), "copies": copies, "flops": flops}  # fmt: skip


def seconds_per_step(config: TrainConfig) -> float:
    population = Population([config], load_corpus(config.data))
    population.train(WARM)
    each = []
    for step in range(WARM, WARM + MEASURED):
        start = time.process_time()
        population.train(step + 1)
        each.append(time.process_time() - start)
    return min(each)


if __name__ == "__main__":
    main()
