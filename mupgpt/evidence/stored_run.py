"""A config trained on several seeds side by side, kept in a file: of a bridge or of a ladder.

When it is finished it is one JSON file, and what is on disk is not trained again.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import Corpus
from mupgpt.mutransfer.bridge import with_lr
from mupgpt.planning.flops import run_flops
from mupgpt.training.population import Population

__all__ = ["StoredRun", "load_or_train", "six_nd"]

STEPS_AT_ONCE = 20  # between two updates of the progress line


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One config on several seeds, at one or more learning rates, with the losses it ended at."""

    config: TrainConfig
    seeds: tuple[int, ...]
    lr_factors: tuple[float, ...] = (1.0,)
    """What the learning rate is multiplied by, each on every seed."""
    losses: tuple[float, ...] = ()
    """Final held-out loss of each run, nats per token: factor by factor, seed by seed."""
    corpus: dict[str, Any]
    """Fingerprint of the text."""
    seconds: float = 0.0

    @classmethod
    def asked(
        cls,
        config: TrainConfig,
        seeds: Sequence[int],
        corpus: Corpus,
        lr_factors: Sequence[float] = (1.0,),
    ) -> "StoredRun":
        """What is to be trained: no losses yet."""
        return cls(
            config=config,
            seeds=tuple(seeds),
            lr_factors=tuple(lr_factors),
            corpus=corpus.fingerprint,
        )

    @property
    def configs(self) -> list[TrainConfig]:
        """One config for each learning rate and seed, in the order of ``losses``."""
        return [
            dataclasses.replace(with_lr(self.config, factor), seed=seed)
            for factor in self.lr_factors
            for seed in self.seeds
        ]

    @property
    def flops(self) -> float:
        """6·N·D of all its runs."""
        return six_nd(self.config) * len(self.losses)


def six_nd(config: TrainConfig) -> float:
    """Training FLOPs of a run, 6·N·D as laws count it: masked weights too."""
    return run_flops(config, convention="6N-stored")


def load_or_train(
    path: Path, asked: StoredRun, corpus: Corpus, tell: Callable[[float], None]
) -> StoredRun:
    """The run in the file ``path``; one that is not there, or another one, is trained first.

    ``tell`` hears which part of it is done, between steps: it may raise KeyboardInterrupt.
    """
    return _load(path, asked) or _train(path, asked, corpus, tell)


def _load(path: Path, asked: StoredRun) -> StoredRun | None:
    """The run on disk, when it is the one (what it recorded on its way does not matter)."""
    if not path.is_file():
        return None
    run = from_dict(StoredRun, load_toml(path))
    config = dataclasses.replace(run.config, tracking=asked.config.tracking)
    same = dataclasses.replace(run, config=config, losses=(), seconds=0.0) == asked
    return run if same else None


def _train(
    path: Path, asked: StoredRun, corpus: Corpus, tell: Callable[[float], None]
) -> StoredRun:
    """Train what is asked for, and write it."""
    start, steps = time.monotonic(), asked.config.steps
    population = Population(asked.configs, corpus)
    while population.step < steps:
        population.train(population.step + STEPS_AT_ONCE)
        tell(population.step / steps)
    losses = tuple(population.evaluate().values())
    seconds = round(time.monotonic() - start, 2)
    run = dataclasses.replace(asked, losses=losses, seconds=seconds)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(to_dict(run), indent=1), encoding="utf-8")
    whole.replace(path)
    return run
