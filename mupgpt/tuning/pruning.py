"""Who of a population goes on at a rung. All trials of a study share one schedule of rungs."""

import statistics
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate

from optuna.trial import FrozenTrial, TrialState

from mupgpt.tuning.spec import StudyConfig

__all__ = ["bracket", "passing", "rung_steps"]

GOLDEN = (5**0.5 - 1) / 2


def rung_steps(config: StudyConfig, steps: int) -> list[int]:
    """Steps at which trials are judged.

    >>> rung_steps(StudyConfig(rungs=2, reduction=3), 180)
    [20, 60]
    """
    first = max(1, steps // config.reduction**config.rungs)
    return [first * config.reduction**i for i in range(config.rungs)]


def passing(
    config: StudyConfig, trials: Iterable[FrozenTrial], rungs: list[int], rung: int, here: set[int]
) -> set[int]:
    """Numbers of the trials ``here`` that go on at ``rung``, one of the steps ``rungs``.

    They stand at the rung together, and are judged against all ``trials`` that ever stood there,
    themselves included. Optuna's own pruners judge one trial after the other, so that the first of
    a population would pass whatever its loss.
    """
    stood = [t for t in trials if rung in t.intermediate_values and t.state != TrialState.FAIL]
    there = {t.number: t.intermediate_values[rung] for t in stood}
    here = here & there.keys()  # a trial that was taken away meanwhile did not report
    if config.pruner != "hyperband":
        return _judge(config, there, here)
    groups: dict[int, set[int]] = {}
    for number in there:
        groups.setdefault(bracket(number, config.rungs, config.reduction), set()).add(number)
    passed: set[int] = set()
    for first, group in groups.items():
        mine = here & group
        if first > rungs.index(rung):  # this bracket's first rung comes later
            passed |= mine
        else:
            passed |= _judge(config, {n: there[n] for n in group}, mine)
    return passed


def _judge(config: StudyConfig, there: dict[int, float], here: Collection[int]) -> set[int]:
    if not here:
        return set()
    bar = BARS[config.pruner](sorted(there.values()), config.reduction)
    return {n for n in here if there[n] <= bar}


def _best_share(seen: list[float], reduction: int) -> float:
    return seen[max(1, len(seen) // reduction) - 1]


def _median(seen: list[float], _reduction: int) -> float:
    return statistics.median(seen)


BARS: dict[str, Callable[[list[float], int], float]] = {
    "halving": _best_share,
    "hyperband": _best_share,
    "median": _median,
}
"""Pruner → the loss at a rung, from those seen there in ascending order, that still passes."""


def bracket(number: int, rungs: int, reduction: int) -> int:
    """The rung at which Hyperband first judges trial ``number`` (``rungs``: it never does).

    Bracket s of S + 1 gets ⌈(S + 1) · reduction^s / (s + 1)⌉ parts of the trials (Li et al. 2018,
    arXiv 1603.06560, algorithm 1), where s counts the judgements of a trial; a golden-ratio
    sequence spreads them evenly over the numbers, so that every population has its share.

    >>> counts = [bracket(i, 2, 3) for i in range(1500)]
    >>> [counts.count(b) for b in range(3)]  # parts 9 : 5 : 3
    [794, 442, 264]
    """
    parts = [-(-(rungs + 1) * reduction**s // (s + 1)) for s in range(rungs, -1, -1)]
    place = number * GOLDEN % 1 * sum(parts)
    return next(b for b, end in enumerate(accumulate(parts)) if place < end)
