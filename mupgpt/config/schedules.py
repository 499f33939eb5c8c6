"""Learning-rate schedules: functions from progress to a factor of the peak.

A shape maps progress p in [0, 1] after the warm-up to a factor; `factor` adds the warm-up. A decay
maps its own progress to a factor that falls from 1 to ``end``.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import replace

from mupgpt.config.phases import tokens_at
from mupgpt.config.schema import Schedule, TrainConfig
from mupgpt.errors import ConfigError, require

__all__ = [
    "DECAYS",
    "SHAPES",
    "LrFactor",
    "factor",
    "least_warmup",
    "lr_factor",
    "schedule_of",
    "warmup_steps",
]

LrFactor = Callable[[int], float]
"""The factor of the peak at a step (0-based) of a run."""
Shape = Callable[[float, Schedule], float]

DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, end: 1.0 + (end - 1.0) * x,
    "1-sqrt": lambda x, end: 1.0 + (end - 1.0) * math.sqrt(x),
    "exponential": lambda x, end: end**x,
    "cosine": lambda x, end: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * x)),
}
"""Decay → factor at progress x in [0, 1] of the decay, given the last factor ``end``.

``1-sqrt`` is that of Hägele et al. (arXiv 2405.18392), ``exponential`` MiniCPM's with its halving
time chosen so that the decay ends at ``end``.
"""


def _wsd(p: float, s: Schedule) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395)."""
    start = 1.0 - s.decay
    return 1.0 if p <= start else DECAYS[s.decay_shape]((p - start) / s.decay, s.end)


SHAPES: dict[str, Shape] = {
    "constant": lambda p, s: 1.0,
    "linear": lambda p, s: DECAYS["linear"](p, s.end),
    "cosine": lambda p, s: DECAYS["cosine"](p, s.end),
    "wsd": _wsd,
}


def warmup_steps(s: Schedule, steps: float, tokens_per_step: int) -> int:
    """Number of warm-up steps of a run of ``steps`` steps.

    >>> warmup_steps(Schedule(warmup_tokens=375_000_000), 174335, 720 * 2048)
    254
    """
    if s.warmup_tokens:
        return min(int(steps), s.warmup_tokens // tokens_per_step)
    return round(s.warmup * steps)


def least_warmup(beta2: float) -> int:
    """Steps that Adam's second moment needs to settle, 2/(1 − β₂): no warm-up should be shorter.

    Ma & Yarats, arXiv 1910.04209.

    >>> least_warmup(0.95)
    40
    """
    return math.ceil(2 / (1 - beta2) - 1e-9)


def schedule_of(config: TrainConfig, own: LrFactor | None) -> tuple[TrainConfig, LrFactor]:
    """A run's config, and its factor of the peak at a step: ``own`` where given, or the config's.

    ``own`` takes the step, counted from 0, and must give the same factor whenever it is asked. It
    replaces all of ``config.schedule``, warm-up included, and the config that is returned names it
    by the factors of all steps: a run is not continued under another one, nor without it.

    >>> from mupgpt.resolve import train_config
    >>> config = train_config({"model": "proxy-32", "steps": 100})
    >>> named, factor = schedule_of(config, lambda step: 1 / (1 + step))
    >>> named.schedule.shape, named.schedule.digest, factor(3)
    ('own', 'b870324e760284c1', 0.25)

    Raises ConfigError for a factor that is no finite number >= 0, and for a config that names a
    function where none is given.
    """
    if own is None:
        lr_factor(config, 0)
        return config, functools.partial(lr_factor, config)
    factors = [own(step) for step in range(config.steps)]
    for step, value in enumerate(factors):
        number = isinstance(value, int | float) and 0 <= value < math.inf
        require(number, f"schedule({step})", value, "be a finite number >= 0")
    digest = hashlib.sha256(struct.pack(f"<{config.steps}d", *factors)).hexdigest()[:16]
    return replace(config, schedule=Schedule(shape="own", digest=digest)), own


def lr_factor(config: TrainConfig, step: int) -> float:
    """The factor of the peak at ``step`` of a run: one line through all its phases.

    Its axis is tokens, counted in steps of the first phase. Where the batch grows a step advances
    it by more, as Cerebras-GPT's counter does (720 to 1080 sequences: 57 000 steps are 38 000).
    """
    course = config.course
    unit = course[0].tokens_per_step
    now, end = (tokens_at(course, s) / unit for s in (step, config.steps))
    return factor(config.schedule, now, end, unit)


def factor(s: Schedule, step: float, steps: float, tokens_per_step: int = 1) -> float:
    """The factor of the peak at ``step`` (0-based) of ``steps``; ``end`` is reached at ``steps``.

    Warm-up reaches the peak at its last step: (t + 1)/W. Then the shape at (t − W)/(S − W); for
    ``linear`` with end 0 that is D2Z of arXiv 2502.15938.

    >>> [round(factor(Schedule(warmup=0.2, end=0.2), i, 10), 3) for i in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.6, 0.2]
    """
    if s.shape == "own":
        raise ConfigError(
            "schedule.shape = 'own': this run's rate is a function that only Python knows; "
            "give it again, e.g. Trainer(config, folder, schedule=function)"
        )
    warm = warmup_steps(s, steps, tokens_per_step)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return SHAPES[s.shape](min(1.0, progress), s)
