"""Branching a decay off a stable run: one long run at the peak rate, many horizons.

A warm-up–stable–decay run is the same for every horizon until its decay begins (Hägele et al.,
arXiv 2405.18392): a new horizon costs its decay alone.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.verify import checkpoints, verify
from mupgpt.config.phases import lasting, tokens_at
from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schedules import lr_factor, warmup_steps
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError, require
from mupgpt.resolve import train_config

__all__ = ["branch", "branch_config"]


def branch_config(stem: TrainConfig, at: int, steps: int, **decay: Any) -> TrainConfig:
    """The run of ``steps`` steps that leaves ``stem`` at step ``at`` and decays from there on.

    ``decay`` are fields of `Schedule` (``decay_shape``, ``end``). Trained from the start it is the
    branch bit for bit, since both see the same data under the same rate up to ``at``.

    Raises ConfigError when ``stem`` is not stable up to ``at``, or ``steps`` is not beyond it.

    >>> stem = train_config({"model": "proxy-32", "steps": 200, "schedule": {"shape": "constant"}})
    >>> branched = branch_config(stem, at=110, steps=140, decay_shape="1-sqrt", end=0.0)
    >>> branched.schedule.shape, branched.schedule.decay  # 30 of the 120 steps behind the warm-up
    ('wsd', 0.25)
    """
    require(steps > at, "steps", steps, f"be beyond the branch point, step {at}")
    unit = stem.tokens_per_step  # the schedule's axis is tokens, in steps of the first phase
    warm = warmup_steps(stem.schedule, stem.tokens / unit, unit)
    total, start = tokens_at(lasting(stem.course, steps), steps) / unit, stem.tokens_at(at) / unit
    require(start >= warm, "at", at, f"lie behind the warm-up, which ends at step {warm}")
    schedule = dataclasses.replace(
        stem.schedule,
        shape="wsd",
        warmup=0.0,
        warmup_tokens=warm * unit,
        decay=(total - start) / (total - warm),
        **decay,
    )
    phases = lasting(stem.phases, steps)
    branched = dataclasses.replace(stem, steps=steps, phases=phases, schedule=schedule)
    for step in range(at):
        if lr_factor(stem, step) != lr_factor(branched, step):
            raise ConfigError(
                f"at = {at}: the run's rate leaves its peak at step {step} "
                f"(schedule.shape = {stem.schedule.shape!r}); branch off before that"
            )
    return branched


def branch(run: Path, out: Path, steps: int, at: int | None = None, **decay: Any) -> TrainConfig:
    """Make ``out`` a run folder that begins with the checkpoint of ``run`` at step ``at``.

    ``at`` is by default the newest checkpoint's step; the `Trainer` then continues the folder. A
    folder that already holds this branch is left as it is. Returns the config of the branch.

    Raises ConfigError when ``run`` has no such checkpoint (``tracking.keep_steps`` keeps those that
    are wanted) or is not stable up to it.
    """
    require((run / "config.json").is_file(), "run", str(run), "be a run's folder (config.json)")
    stem = train_config(load_toml(run / "config.json"))
    start = _checkpoint(run, at)
    config = branch_config(stem, start.step, steps, **decay)
    root = {"run": str(run), "step": start.step, "stem": to_dict(stem)}
    if not (out / "branch.json").is_file():
        require(not out.exists(), "out", str(out), "not exist yet: nothing is overwritten")
        _start(run, start, out, config, root)
    return config


def _checkpoint(run: Path, at: int | None) -> Checkpoint:
    found = {
        int(path.name.removeprefix("step-")): path for path in checkpoints(run / "checkpoints")
    }
    wanted = max(found, default=None) if at is None else at
    if wanted not in found:
        kept = ", ".join(map(str, sorted(found))) or "none"
        raise ConfigError(
            f"{run} has no checkpoint at step {wanted} (kept: {kept}); name the steps to keep "
            "before training, e.g. --tracking.keep_steps 400 800"
        )
    return verify(found[wanted])


def _start(
    run: Path, start: Checkpoint, out: Path, config: TrainConfig, root: dict[str, Any]
) -> None:
    """Write the folder under another name first: an interrupted copy is never taken for a run."""
    making = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(start.folder, making / "checkpoints" / start.folder.name)
    shutil.copyfile(run / "metrics.jsonl", making / "metrics.jsonl")  # cut at the branch on opening
    (making / "config.json").write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")
    (making / "branch.json").write_text(json.dumps(root, indent=1), encoding="utf-8")
    making.rename(out)
