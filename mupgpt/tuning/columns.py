"""How many columns train together: as memory allows, and as a short timing finds."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mupgpt.config import TrainConfig
from mupgpt.data import load_corpus
from mupgpt.memory import moments
from mupgpt.population import Population
from mupgpt.training import pick_device
from mupgpt.tuning.spec import Cell

__all__ = ["best_count", "columns_for", "usual"]

TOKENS = {"cpu": 2**13, "cuda": 2**17}
"""Columns × tokens per step: what still fits a core's share of the L3 cache; what fills a GPU."""
WARM = {"cpu": 1, "cuda": 5}  # steps before a timing; a GPU's are recorded in them
STEPS = 3  # that one timing costs about
SHARE = 0.02  # of the work at hand: timing may take no more
GAIN = 0.05  # more columns a second, or another count is not worth it
MISSES = 2  # counts without a gain in a row that end the search in one direction
MEMORY_SHARE = 0.5  # of the memory: what a plan does not know needs room too

log = logging.getLogger("mupgpt.worker")


def usual(config: TrainConfig, processes: int = 1) -> int:
    """Columns of one population where nothing was timed, on a device that processes share."""
    device = pick_device().type
    if device == "cpu" and config.precision == "auto":
        config = replace(config, precision="fp32")  # which it is there
    need = max(moment.total for moment in moments(config, "exact", "none"))
    fit = int(MEMORY_SHARE * _memory() / processes / need)
    return max(1, min(TOKENS[device] // config.tokens_per_step, fit))


def columns_for(
    cell: Cell, work: float, processes: int = 1, check: Callable[[], None] = lambda: None
) -> int:
    """Columns that a worker trains together, one of ``processes`` beside each other.

    ``work`` is what it has to train, in steps of one column: where that is little, the usual count
    is taken untimed. ``check()`` is called before each timing.
    """
    config = cell.config()
    if cell.spec.study.columns:
        return cell.spec.study.columns
    first = usual(config, processes)
    if (1 + 2 + 0.5) * STEPS * first > SHARE * work:
        return first
    found: dict[int, float] = {}

    def measure(count: int) -> float:
        check()
        found[count] = _step_seconds(cell, count)
        return found[count]

    chosen = best_count(measure, first, work)
    rates = ", ".join(f"{k}: {k / found[k]:.0f}" for k in sorted(found))
    log.info("%s: %d columns together (steps of one column a second by count: %s)",
             cell.name, chosen, rates)  # fmt: skip
    return chosen


def best_count(measure: Callable[[int], float], first: int, work: float) -> int:
    """The count with the most columns a second near ``first``, by doubling or halving it.

    ``measure(count)`` trains `STEPS` steps and returns the seconds of one; infinity where memory
    ends. It stops before measuring takes more than `SHARE` of ``work`` steps of one column.

    >>> best_count(lambda k: 1 + k / 64 if k <= 128 else math.inf, 16, 1e6)
    128
    >>> best_count(lambda k: k**2, 16, 1e6)
    1
    """
    best, rate = first, first / measure(first)
    left = SHARE * work / rate - STEPS * first / rate  # seconds
    for factor in (2.0, 0.5):
        count, misses = int(first * factor), 0
        while misses < MISSES and count >= 1 and STEPS * count / rate <= left:
            seconds = measure(count)
            left -= STEPS * seconds if math.isfinite(seconds) else 0.0
            if count / seconds >= rate * (1 + GAIN):
                best, rate, misses = count, count / seconds, 0
            else:
                misses += 1
            count = int(count * factor)
        if best != first:
            break
    return best


def _step_seconds(cell: Cell, count: int) -> float:
    config = cell.config()
    try:
        population = Population([cell.config({}, seed) for seed in range(count)],
                                load_corpus(config.data))  # fmt: skip
        warm = WARM[population.device.type]
        population.train(warm)
        started = _now()
        population.train(warm + 2)
        return (_now() - started) / 2
    except torch.OutOfMemoryError:
        return math.inf


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory() -> int:
    """Bytes of the device's memory."""
    device = pick_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
