"""Phases of a run: parts with a context and a batch of their own, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mupgpt.config.fields import BATCH, CONTEXT, STEPS, decides
from mupgpt.config.plain import settle

__all__ = ["PhaseConfig", "lasting", "longest", "phase_at", "tokens_at"]


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A part of a run with a context and a batch of its own.

    >>> PhaseConfig(steps=100, seq_len=512, batch_size=16).tokens_per_step
    8192
    """

    steps: int = field(metadata=decides("result", 1, STEPS))
    """Optimizer steps."""
    seq_len: int = field(default=0, metadata=decides("result", 0, CONTEXT))
    """Context in tokens; 0 means the model's."""
    batch_size: int = field(default=0, metadata=decides("result", 0, BATCH))
    """Sequences per step; 0 means the run's."""

    def __post_init__(self) -> None:
        settle(self, "phases")

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.batch_size * self.seq_len


def longest(phases: Sequence[PhaseConfig]) -> int:
    """The longest context of the phases, in tokens."""
    return max(phase.seq_len for phase in phases)


def phase_at(phases: Sequence[PhaseConfig], step: int) -> PhaseConfig:
    """The phase of step ``step`` (0-based); after the end, the last one."""
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def lasting(phases: Sequence[PhaseConfig], steps: int) -> tuple[PhaseConfig, ...]:
    """``phases`` cut short, or the last one drawn out, so that they last ``steps`` steps.

    >>> [p.steps for p in lasting([PhaseConfig(steps=3), PhaseConfig(steps=4)], 9)]
    [3, 6]
    """
    cut = []
    for i, phase in enumerate(phases):
        own = steps if i == len(phases) - 1 else min(steps, phase.steps)
        if own > 0:
            cut.append(replace(phase, steps=own))
        steps -= own
    return tuple(cut)


def tokens_at(phases: Sequence[PhaseConfig], step: int) -> int:
    """Tokens in the first ``step`` steps.

    >>> tokens_at([PhaseConfig(steps=2, seq_len=8, batch_size=4),
    ...            PhaseConfig(steps=9, seq_len=16, batch_size=4)], 3)
    128
    """
    tokens = 0
    for phase in phases:
        done = min(step, phase.steps)
        tokens += done * phase.tokens_per_step
        step -= done
    return tokens
