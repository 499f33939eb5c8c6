"""Metrics: an append-only JSONL file that is the truth, and wandb as its mirror."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupgpt.config.schema import TrackingConfig

__all__ = [
    "FLOPS",
    "GRAD_NORM",
    "HEALTH",
    "PREDICT_HIGH",
    "PREDICT_LOW",
    "STEP",
    "TOKENS",
    "TOKENS_PER_S",
    "TRAIN_LOSS",
    "TRAIN_LR",
    "VAL_BPB",
    "VAL_LOSS",
    "WATCH",
    "MetricsLog",
    "Wandb",
    "read_metrics",
]

STEP, TOKENS, FLOPS = "step", "tokens", "flops"
TRAIN_LOSS, TRAIN_LR, GRAD_NORM = "train/loss", "train/lr", "train/grad_norm"
VAL_LOSS, VAL_BPB = "val/loss", "val/bpb"
TOKENS_PER_S = "perf/tokens_per_s"
PREDICT_LOW, PREDICT_HIGH = "predict/low", "predict/high"
HEALTH, WATCH = "health", "watch"
"""Prefixes: see `mupgpt.training.health` and `mupgpt.training.watch`."""


class MetricsLog:
    """``metrics.jsonl``: a line a record, written at once; reopened at a step, it is cut there."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_metrics(path) if record[STEP] <= step]
        whole = path.with_suffix(".jsonl.tmp")
        whole.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        whole.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line (a killed writer) is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _run_id(path: Path) -> str:
    """The folder's wandb id, made once: a continued run stays one run there."""
    if not path.is_file():
        path.write_text(secrets.token_hex(6), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Wandb:
    """A wandb run that mirrors the metrics; whatever fails in it is said once and costs nothing.

    Offline unless the config or ``WANDB_MODE`` says otherwise.
    """

    def __init__(
        self, tracking: TrackingConfig, folder: Path, name: str, config: Mapping[str, Any]
    ) -> None:
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE", tracking.wandb)
        if mode in ("off", "disabled"):
            return
        try:
            import wandb

            self._run = wandb.init(
                id=_run_id(folder / "wandb.id"),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", tracking.project),
                name=name,
                dir=str(folder),
                mode=mode,  # type: ignore[bad-argument-type]
                config=dict(config),
                job_type="target",
                reinit="create_new",
                settings=wandb.Settings(silent=True),
            )
            self._run.define_metric(TOKENS)
            for prefix in ("train/*", "val/*", "perf/*", "predict/*", "health/*", "watch/*"):
                self._run.define_metric(prefix, step_metric=TOKENS)
            self._run.define_metric(VAL_LOSS, step_metric=TOKENS, summary="min")
        except Exception as error:
            self._give_up(error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record."""
        if self._run is not None:
            try:
                self._run.log(dict(record))
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"wandb is off for this run: {error} (metrics.jsonl has it all)", file=sys.stderr)
