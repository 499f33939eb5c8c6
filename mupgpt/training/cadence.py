"""When a run looks at itself, and how fast it goes in between."""

import time
from dataclasses import dataclass
from typing import Self

from mupgpt.config.schema import TrainConfig

__all__ = ["Cadence", "Pace"]


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """After which steps a run logs, measures its health, evaluates and saves: the last, and every
    so many.

    >>> from mupgpt.resolve import train_config
    >>> due = Cadence.of(train_config({"model": "proxy-32", "steps": 45}))
    >>> [step for step in range(1, 46) if due.evaluates(step)]
    [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 45]
    >>> [step for step in range(1, 46) if due.saves(step)]
    [9, 18, 27, 36, 45]
    """

    steps: int
    """Steps of the run."""
    log_every: int
    health_every: int
    eval_every: int
    save_every: int
    keep_steps: frozenset[int]
    """Steps that are saved beside the others."""

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """The cadence that ``config.tracking`` asks for, its zeros resolved."""
        track = config.tracking
        return cls(
            steps=config.steps,
            log_every=track.log_every,
            health_every=track.health_every or track.log_every,
            eval_every=track.eval_every or max(1, config.steps // 10),
            save_every=track.checkpoint_every or max(1, config.steps // 5),
            keep_steps=frozenset(track.keep_steps),
        )

    def logs(self, step: int) -> bool:
        """Whether training metrics are recorded when ``step`` steps are done."""
        return self._due(step, self.log_every)

    def measures(self, step: int) -> bool:
        """Whether weights and updates are measured then."""
        return self._due(step, self.health_every)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is taken then."""
        return self._due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written then."""
        return self._due(step, self.save_every) or step in self.keep_steps

    def _due(self, step: int, every: int) -> bool:
        return step == self.steps or step % every == 0


class Pace:
    """Tokens per second of training: the clock runs inside ``with pace:`` alone.

    An evaluation or a save between two steps costs a run time, but says nothing about its speed.
    """

    def __init__(self, tokens: int = 0) -> None:
        """``tokens`` are those that the run has trained on already."""
        self._tokens = tokens
        self._seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.monotonic() - self._began

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call, when the run has trained on ``tokens`` in all."""
        rate = (tokens - self._tokens) / self._seconds
        self._tokens, self._seconds = tokens, 0.0
        return rate
