"""Predict a target's loss from a small ladder, write that down, then train the target.

    python benchmarks/predict_target.py ladder         # writes sweeps/results/predict_ladder.json
    python benchmarks/predict_target.py ladder-long

The ladder costs less than a tenth of one run of the target. The prediction is on disk before the
first target step; the record then gets the losses of three seeds. Interrupted, it continues. A
record is kept as long as the ladder and the target are those it speaks of; else it is begun anew,
and so are the target's runs.
"""

import dataclasses
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import TrainConfig
from mupgpt.evidence.ladder import LAWS_OF_LOSS, Ladder, load_ladder, run_ladder, six_nd

TARGETS = {"ladder": (192, 4600), "ladder-long": (256, 2900)}  # width and steps
SEEDS, AT_ONCE = (0, 1, 2), 2
RESULTS = Path(__file__).parent.parent / "sweeps" / "results"


def main(name: str) -> None:
    spec, path = load_ladder(name), RESULTS / f"predict_{name}.json"
    ladder = run_ladder(spec)
    stem, (width, steps) = spec.config, TARGETS[name]
    target = dataclasses.replace(stem, model=stem.model.widen(width), steps=steps)
    runs = Path("runs") / f"predict_{name}"
    record = begun(path, said_before(ladder, target), runs)
    if "finished" in record["target"]:
        print(json.dumps(record["prediction"] | record["target"], indent=1))
        return
    losses = train(runs, dataclasses.replace(target, prediction=ladder.predict(target)))
    mean = statistics.fmean(losses)
    loss, low, high = (record["prediction"][key] for key in ("loss", "low", "high"))
    record["target"] |= {
        "finished": now(),
        "losses": losses,
        "mean": mean,
        "error_percent": 100 * (loss / mean - 1),
        "inside": low <= mean <= high,
    }
    record["without_one_run"] = without_one_run(ladder, target)
    write(path, record)
    print(json.dumps(record["prediction"] | record["target"], indent=1))


def begun(path: Path, said: dict, runs: Path) -> dict:
    """The record on disk if it speaks of the ladder and target of ``said``, else ``said``, written.

    Runs of the target that were trained before ``said`` are nothing it predicts: they go.
    """
    if path.is_file():
        record = json.loads(path.read_text())
        same_target = said["target"].items() <= record["target"].items()
        if record["ladder_runs"] == said["ladder_runs"] and same_target:
            return record
    shutil.rmtree(runs, ignore_errors=True)
    write(path, said)
    return said


def said_before(ladder: Ladder, target: TrainConfig) -> dict:
    """The record without a result: ladder, target, and what each law expects."""
    laws = {law: to_dict(ladder.predict(target, law)) for law in LAWS_OF_LOSS}
    runs = [
        {"width": r.config.model.d_model, "steps": r.config.steps, "losses": list(r.losses),
         "flops": r.flops, "seconds": r.seconds}
        for r in ladder.stored
    ]  # fmt: skip
    return {
        "command": f"python benchmarks/predict_target.py {ladder.spec.name}",
        "machine": "2-core CPU, one thread a run",
        "predicted": now(),
        "prediction": laws[ladder.spec.ladder.law],
        "law": ladder.spec.ladder.law,
        "notes": list(ladder.report(target).notes),
        "other_laws": laws,
        "convention": "6N",
        "ladder_flops": ladder.flops,
        "target_flops": six_nd(target),
        "cost": ladder.flops / six_nd(target),
        "corpus": ladder.stored[0].corpus,
        "ladder_runs": runs,
        "target": {"width": target.model.d_model, "steps": target.steps, "seeds": list(SEEDS)},
    }


def without_one_run(ladder: Ladder, target: TrainConfig) -> dict[str, float]:
    """The prediction when one run is left out: how much hangs on each of them."""
    return {
        f"width {run.config.model.d_model}, {run.config.steps} steps": dataclasses.replace(
            ladder, stored=tuple(other for other in ladder.stored if other is not run)
        )
        .predict(target)
        .loss
        for run in ladder.stored
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(runs: Path, target: TrainConfig) -> list[float]:
    """The final loss of each seed, some of them at once in processes of one thread."""
    runs.mkdir(parents=True, exist_ok=True)
    results: list[float] = []
    for start in range(0, len(SEEDS), AT_ONCE):
        children = [spawn(runs, target, seed) for seed in SEEDS[start : start + AT_ONCE]]
        said = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            sys.exit(
                "a run of the target failed (its message is above); the same command continues"
            )
        results += [json.loads(text.splitlines()[-1])["val/loss"] for text in said]
    return results


def spawn(runs: Path, target: TrainConfig, seed: int) -> subprocess.Popen:
    path = runs / f"seed{seed}.json"
    path.write_text(json.dumps(to_dict(dataclasses.replace(target, seed=seed))), encoding="utf-8")
    command = [sys.executable, "-m", "mupgpt.trainer", str(path), str(runs / f"seed{seed}")]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet)


if __name__ == "__main__":
    main(sys.argv[1])
