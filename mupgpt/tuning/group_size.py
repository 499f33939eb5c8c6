"""How many members train together: as memory allows, and as a short timing finds."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.planning.flops import flops_per_token
from mupgpt.planning.memory import CHUNK, moments
from mupgpt.training.device import pick_device
from mupgpt.training.population import Population
from mupgpt.tuning.spec import Cell
from mupgpt.util.host import memory

__all__ = ["Timing", "best_count", "fitting", "members_for", "time_step", "usual"]

TOKENS = {"cpu": 2**13, "cuda": 2**17}
"""Members × tokens per step: what still fits a core's share of the L3 cache; what fills a GPU."""
FLOPS = {"cpu": 2e10, "cuda": 2e13}
"""A step of so many gains nothing from company, and the longer a population trains, the more an
interrupt loses."""
WARM = {"cpu": 1, "cuda": 5}  # steps before a timing; a GPU's are recorded in them
STEPS = 2  # that are timed
TIMED_AT_LEAST = 12  # times the usual count: the least work of timing it, its double and its half
SHARE = 0.02  # of the work at hand: timing may take no more
GAIN = 0.2  # more members a second: less is noise, and a sampler learns later from larger groups
MISSES = 2  # counts without a gain in a row that end the search in one direction
MEMORY_SHARE = 0.5  # of the memory: what a plan does not know needs room too

log = logging.getLogger("mupgpt.worker")


def usual(config: TrainConfig, processes: int = 1) -> int:
    """Members of one population where nothing was timed, on a device that processes share."""
    device, tokens = pick_device().type, config.tokens_per_step
    enough = int(FLOPS[device] / tokens / flops_per_token(config.model, "palm"))
    return max(1, min(TOKENS[device] // tokens, enough, fitting(config, processes)))


def fitting(config: TrainConfig, processes: int = 1) -> int:
    """Members for which there is memory, on a device that processes share."""
    if pick_device().type == "cpu" and config.precision == "auto":
        config = replace(config, precision="fp32")  # which it is there
    need = max(moment.total for moment in moments(config, "exact", "none"))
    if (logits := config.tokens_per_step * config.model.vocab_size) > CHUNK:
        need += 3 * 4 * logits  # members' are not chunked, as those of one model are
    return max(1, int(MEMORY_SHARE * _memory() / processes / need))


def members_for(
    cell: Cell, work: float, processes: int = 1, check: Callable[[], None] = lambda: None
) -> int:
    """Members that a worker trains together, one of ``processes`` that share its device.

    ``work`` is what it has to train, in steps of one member: where that is little, the usual count
    is taken untimed. ``check()`` is called before each timing.
    """
    if cell.spec.study.members:
        return cell.spec.study.members
    config = cell.config()
    first = usual(config, processes)
    if TIMED_AT_LEAST * first > SHARE * work or config.steps < WARM[pick_device().type] + STEPS:
        return first
    rates: dict[int, str] = {}

    def measure(count: int) -> Timing:
        check()
        seeds = cell.spec.study.seeds
        timing = time_step([cell.config({}, seeds[i % len(seeds)]) for i in range(count)])
        rates[count] = f"{count}: {count / timing.step:.0f}"
        return timing

    chosen = best_count(measure, first, work, fitting(config, processes))
    log.info("%s: %d members together (steps of one member a second by count: %s)",
             cell.name, chosen, ", ".join(rates[k] for k in sorted(rates)))  # fmt: skip
    return chosen


@dataclass(frozen=True)
class Timing:
    """Seconds of one step of a population (infinity where memory ends), and of measuring it."""

    step: float
    spent: float


def best_count(measure: Callable[[int], Timing], first: int, work: float, most: int) -> int:
    """The count with the most members a second near ``first``, by doubling or halving it.

    It goes no higher than ``most``, and stops where measuring twice as many as before would have
    taken more than `SHARE` of ``work`` steps of one member.

    >>> def measure(count):  # a step takes as long for 128 as for one
    ...     seconds = max(1.0, count / 128)
    ...     return Timing(seconds, 3 * seconds)
    >>> best_count(measure, 16, work=1e6, most=1000), best_count(measure, 16, work=1e6, most=50)
    (128, 32)
    """
    timing = measure(first)
    while not math.isfinite(timing.step) and first > 1:
        first //= 2
        timing = measure(first)
    best, rate = first, first / timing.step
    left = SHARE * work / rate - timing.spent  # seconds
    for factor in (2.0, 0.5):
        count, misses, spent = int(first * factor), 0, timing.spent
        while misses < MISSES and 1 <= count <= most and factor * spent <= left:
            now = measure(count)
            spent, left = now.spent, left - now.spent
            if count / now.step >= rate * (1 + GAIN):
                best, rate, misses = count, count / now.step, 0
            else:
                misses += 1
            count = int(count * factor)
        if best != first:
            break
    return best


def time_step(configs: Sequence[TrainConfig]) -> Timing:
    """How long a step of these runs together takes on this device."""
    started = _now()
    try:
        population = Population(configs, load_corpus(configs[0].data))
        warm = WARM[population.device.type]
        population.train(warm)
        times = [_now()]
        for step in range(1, STEPS + 1):
            population.train(warm + step)
            times.append(_now())
        seconds = min(b - a for a, b in itertools.pairwise(times))
    except torch.OutOfMemoryError:
        seconds = math.inf
    return Timing(seconds, _now() - started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory() -> int:
    """Bytes of the device's memory, as far as they are ours."""
    device = pick_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory()
