"""The exponent of size that a probe has, one fit a seed, and whether it is as promised."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from mupgpt.config.plain import finite
from mupgpt.evidence.probes import Measures
from mupgpt.parametrization.expected_slopes import Exponent

__all__ = ["ALLOWANCE", "Slope", "fit_slopes", "is_zero"]

ALLOWANCE = 0.15
"""Error of a slope that finite widths are forgiven; a wrong exponent is wrong by 1/2 or 1."""
CONFIDENCE = 0.9973
"""Two-sided level of Student's t: three standard errors with many seeds, more with few."""
MAX_ERROR = 0.25
"""Standard error beyond which a slope could not tell a wrong exponent from a right one."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """One probe's exponent of size."""

    setting: str
    """What stays fixed while the width grows (``d_head fixed``, ``n_head fixed``), or ``depth``."""
    measure: str
    """``weights init change gradient step update`` or ``damping``: see
    `mupgpt.evidence.probes.measure`."""
    probe: str
    """``emb``, a matmul's output, ``scores``, ``residual.*``, ``logits``; or a role."""
    by_seed: tuple[float, ...]
    """Slope of log2 RMS against log2 size, one a seed."""
    expected: float
    """The exponent that the rule promises, the highest where several agree with it."""
    lowest: float
    """The lowest one."""
    log2_rms: tuple[float, ...]
    """Mean over the seeds, one a size."""

    @property
    def slope(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return float(np.std(self.by_seed, ddof=1) / math.sqrt(len(self.by_seed)))

    @property
    def deviation(self) -> np.ndarray:
        """Slope less the nearest exponent that the rule allows, one a seed."""
        slopes = np.array(self.by_seed)
        return slopes - slopes.clip(self.lowest, self.expected)

    @property
    def ok(self) -> bool:
        """Whether slope and exponent agree, and the seeds do."""
        return self.se <= MAX_ERROR and is_zero(self.deviation)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a number that is not finite (a run diverged) is None."""
        return {
            "setting": self.setting,
            "measure": self.measure,
            "probe": self.probe,
            "slope": finite(self.slope),
            "se": finite(self.se),
            "expected": self.expected,
            "lowest": self.lowest,
            "ok": self.ok,
        }


def is_zero(deviation: np.ndarray) -> bool:
    """Whether the mean of one deviation a seed is within t·se + `ALLOWANCE` of 0.

    >>> is_zero(np.array([0.1, 0.12, 0.11])), is_zero(np.array([0.5, 0.52, 0.51]))
    (True, False)
    """
    n = len(deviation)
    t = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return bool(abs(deviation.mean()) <= ALLOWANCE + t * deviation.std(ddof=1) / math.sqrt(n))


def fit_slopes(
    setting: str,
    sizes: Sequence[float],
    runs: Sequence[Measures],
    expected: Mapping[str, Mapping[str, Exponent]],
) -> Iterator[Slope]:
    """A slope for each probe that all sizes have and the rule speaks of."""
    x = torch.tensor(sizes, dtype=torch.float64).log2()
    x -= x.mean()
    for measured, probe in runs[0]:
        exponent = _promised(expected.get(measured, {}), probe)
        if exponent is None or any((measured, probe) not in run for run in runs):
            continue
        y = torch.stack([run[measured, probe] for run in runs]).double()
        if not y.any():
            continue  # what starts at zero has no power of the size
        y = y.log2()
        y[~y.isfinite()] = math.nan  # a run that diverged
        low, high = exponent if isinstance(exponent, tuple) else (exponent, exponent)
        yield Slope(
            setting=setting,
            measure=measured,
            probe=probe,
            by_seed=tuple((x @ y / (x @ x)).tolist()),
            expected=high,
            lowest=low,
            log2_rms=tuple(y.mean(dim=1).tolist()),
        )


def _promised(exponents: Mapping[str, Exponent], probe: str) -> Exponent | None:
    """The exponent of a probe; the stream may have one for all layers, the rest each their own."""
    in_stream = probe.startswith("residual.") and probe not in exponents
    return exponents.get("residual" if in_stream else probe)
