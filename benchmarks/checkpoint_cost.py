"""What verified checkpoints cost a run: the same run with many and with one, in turns.

    python benchmarks/checkpoint_cost.py       # writes sweeps/results/checkpoint_cost.json

A checkpoint is copied, written, synced, hashed and renamed; the thread that does it counts in CPU
seconds, and in wall seconds where it holds the steps up. On a GPU: `gpu_13b.py save`.
"""

import shutil
import tempfile
from pathlib import Path

from measure import Cost, machine, spread, take_turns, timed, write

from mupgpt.checkpoint.verify import load_newest
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.device import settle_cpu

MODEL, STEPS, EVERY, ROUNDS = "proxy-256", 60, 6, 5
SIDES = {"many": EVERY, "one": STEPS}


def main() -> None:
    settle_cpu()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = {side: Path(folder) / side for side in SIDES}
        costs = take_turns({s: lambda s=s: run(runs[s], SIDES[s]) for s in SIDES}, ROUNDS, warm=1)
        saved = load_newest(runs["many"] / "checkpoints")
        assert saved is not None
        size = sum(path.stat().st_size for path in saved.folder.iterdir())
        verified = timed(lambda: load_newest(runs["many"] / "checkpoints"))
    more = STEPS // EVERY - 1
    each = {clock: spread([(getattr(many, clock) - getattr(one, clock)) / more
                           for many, one in zip(costs["many"], costs["one"], strict=True)])
            for clock in ("wall", "cpu")}  # fmt: skip
    run_cpu = spread([cost.cpu for cost in costs["one"]])["median"]
    record = {
        "machine": where, "model": MODEL, "steps": STEPS, "bytes": size, "rounds": ROUNDS,
        "run_cpu_seconds": run_cpu, "seconds_each": each, "verify_seconds": verified.wall,
        "cpu_share_at_five_in_this_run": 5 * each["cpu"]["median"] / run_cpu,
        "cpu_share_at_one_in_ten_minutes": each["cpu"]["median"] / 600, "goals": [],
    }  # fmt: skip
    write("checkpoint_cost", record)
    print({k: v for k, v in record.items() if k not in ("machine", "goals")})


def run(folder: Path, every: int) -> Cost:
    """The whole run in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    config = train_config({
        "model": MODEL, "steps": STEPS, "data": {"eval_tokens": 2048},
        "tracking": {"checkpoint_every": every, "eval_every": STEPS, "wandb": "off"},
    })  # fmt: skip
    return timed(lambda: Trainer(config, folder).fit())


if __name__ == "__main__":
    main()
