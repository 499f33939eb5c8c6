"""Run folders of the Trainer as the input of scaling laws: finished runs, and loss curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.config.fields import differing
from mupgpt.config.plain import load_toml
from mupgpt.config.schedules import lr_factor, warmup_steps
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError, require
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import run_flops
from mupgpt.resolve import train_config
from mupgpt.scaling.annealing import LossCurve
from mupgpt.scaling.runs import Runs
from mupgpt.training.metrics import STEP, VAL_LOSS, read_metrics

__all__ = ["read_curves", "read_folders", "step_rates"]

SETTLING = 3  # warm-ups to leave out of a curve: no law of annealing holds there yet
VARIED = ("schedule", "steps", "seed")
"""What the curves of one law of annealing may differ in: it speaks of nothing else."""


def read_folders(folders: Sequence[Path], convention: str = "6N") -> Runs:
    """The finished runs in ``folders`` with their last held-out loss.

    ``n_params`` counts every parameter; FLOPs follow ``convention``. Raises ConfigError for a run
    that has not reached its last step, or runs of different text, whose losses do not compare.
    """
    finished = [_finished(folder) for folder in folders]
    configs, losses = [config for config, _ in finished], np.array([loss for _, loss in finished])
    for folder, config in zip(folders, configs, strict=True):
        _same(folders[0], configs[0].data, folder, config.data, "data")
    n_params = np.array([count_params(c.model) for c in configs], float)
    tokens = np.array([c.tokens for c in configs], float)
    counted = np.array([run_flops(c, c.steps, convention) for c in configs])
    return Runs(n_params=n_params, tokens=tokens, flops=counted, loss=losses, convention=convention)


def _finished(folder: Path) -> tuple[TrainConfig, float]:
    config, records = _read(folder)
    last = records[-1]
    if last[STEP] != config.steps:
        raise ConfigError(
            f"{folder} stands at step {last[STEP]} of {config.steps}; the same train command "
            "finishes it"
        )
    return config, last[VAL_LOSS]


def _read(folder: Path) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The config and the evaluations of a run folder, at least one."""
    require(
        (folder / "config.json").is_file(), "runs", str(folder), "be a CSV file or a run's folder"
    )
    records = [r for r in read_metrics(folder / "metrics.jsonl") if VAL_LOSS in r]
    if not records:
        raise ConfigError(f"{folder} has no evaluation yet; train it further")
    return train_config(load_toml(folder / "config.json")), records


def _same(first: Path, a: Any, second: Path, b: Any, name: str) -> None:
    if a != b:
        raise ConfigError(
            f"{name} of {first} is {a!r} and of {second} is {b!r}: one law holds for one of them; "
            "fit them apart"
        )


def read_curves(folders: Sequence[Path], begin: int = 0) -> list[LossCurve]:
    """The held-out loss of each run behind step ``begin`` (0: behind three warm-ups).

    Raises ConfigError for runs that differ in more than schedule, steps and seed.
    """
    runs = [_read(folder) for folder in folders]
    for folder, (config, _) in zip(folders, runs, strict=True):
        differences = differing(runs[0][0], config, "result", "measure", apart=VARIED)
        for name, ours, theirs in differences:
            _same(folders[0], ours, folder, theirs, name)
    return [_curve(config, records, begin) for config, records in runs]


def _curve(config: TrainConfig, records: list[dict[str, Any]], begin: int) -> LossCurve:
    warm = warmup_steps(config.schedule, config.steps, config.tokens_per_step)
    kept = [record for record in records if record[STEP] > (begin or SETTLING * warm)]
    if not kept:
        raise ConfigError(
            f"begin = {begin or SETTLING * warm}: the run has no evaluation behind that step"
        )
    steps = np.array([record[STEP] - 1 for record in kept])  # counted from 0
    return LossCurve(lr=step_rates(config), steps=steps, loss=np.array([r[VAL_LOSS] for r in kept]))


def step_rates(config: TrainConfig) -> np.ndarray:
    """The base's learning rate at each step of a run, (steps,).

    >>> config = train_config({"model": "proxy-32", "steps": 4, "hparams": {"lr": 1.0}})
    >>> step_rates(config).round(2).tolist()
    [1.0, 0.78, 0.55, 0.32]
    """
    return config.hparams.lr * np.array([lr_factor(config, s) for s in range(config.steps)])
