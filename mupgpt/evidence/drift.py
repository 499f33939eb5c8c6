"""How far an optimum moves with the size, and what that costs.

For each seed and size the optimum of a hyperparameter is read off its curve (`curves`). The drift
is one slope of these optima against log2 of the size per seed; its interval is Student's t over the
seeds. The regret is what the smallest size's optimum costs at the largest (for density, the
largest's at the smallest).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mupgpt.config.plain import finite
from mupgpt.errors import ConfigError
from mupgpt.tuning.curves import Curve, half_width

__all__ = ["LR", "Drift", "find_drift", "size_key"]

HARMLESS = 0.005  # regret up to which a drift costs next to nothing
LR = "hparams.lr"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the optimum of one hyperparameter moves with the size under one rule."""

    rule: str
    hparam: str
    sizes: tuple[float, ...]
    """From the proxy's to the target's: ascending, but masks are tuned dense."""
    optimum: Mapping[float, tuple[float, ...]]
    """Size → log2 of the optimum of each seed."""
    shifts: tuple[float, ...]
    """Slope of each seed, octaves per doubling of the size."""
    regrets: tuple[float, ...]
    """Relative excess loss at the last size of each seed, with the first one's optimum."""
    best_loss: Mapping[float, float]
    """Size → lowest loss, mean over seeds."""
    open_sizes: tuple[float, ...]
    """Sizes at which some seed's lowest point is the end of the grid: no optimum was seen."""
    tolerance: float

    @property
    def shift(self) -> float:
        """Mean slope."""
        return float(np.mean(self.shifts))

    @property
    def ci95(self) -> tuple[float, float]:
        """Student's 95 % interval of the slope over the seeds."""
        half = half_width(self.shifts)
        return self.shift - half, self.shift + half

    @property
    def regret(self) -> float:
        """Mean regret."""
        return float(np.mean(self.regrets))

    @property
    def most_regret(self) -> float:
        """Upper end of the 95 % interval of the mean regret over the seeds."""
        return self.regret + half_width(self.regrets)

    @property
    def verdict(self) -> str:
        """PASS when the interval lies inside ±tolerance, FAIL when outside, else INCONCLUSIVE.

        FLAT is an INCONCLUSIVE or FAIL that does not matter: of a hyperparameter other than the
        learning rate, whose optimum was seen everywhere, and whose regret is at most 0.5 %.
        """
        if self.open_sizes:
            return "INCONCLUSIVE"
        low, high = self.ci95
        if -self.tolerance <= low and high <= self.tolerance:
            return "PASS"
        if self.hparam != LR and self.most_regret <= HARMLESS:
            return "FLAT"
        return "FAIL" if low > self.tolerance or high < -self.tolerance else "INCONCLUSIVE"

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that would decide, if mean and spread of the slopes stayed; None: over 200."""
        if len(self.shifts) < 2:
            return 2
        room = abs(self.tolerance - abs(self.shift))
        spread = float(np.std(self.shifts, ddof=1))
        for n in range(max(3, len(self.shifts)), 200):
            if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= room:
                return n
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        name = self.hparam.removeprefix("hparams.")
        return {
            f"optimum_log2_{name}": {
                size_key(s): float(np.mean(o)) for s, o in self.optimum.items()
            },
            f"optimum_log2_{name}_by_seed": {size_key(s): list(o) for s, o in self.optimum.items()},
            "shift_per_doubling": self.shift,
            "shift_ci95": [finite(x) for x in self.ci95],
            "shift_by_seed": list(self.shifts),
            "regret_at_largest": self.regret,
            "regret_at_widest": self.regret,
            "regret_upper95": finite(self.most_regret),
            "regret_by_seed": list(self.regrets),
            "best_loss": {size_key(s): loss for s, loss in self.best_loss.items()},
            "seeds": len(self.shifts),
            "verdict": self.verdict,
        }

    def line(self, judged: str, heads: Sequence[str]) -> str:
        """One row of the printed table, below the ``heads`` of its sizes."""
        optima = "".join(
            f"{np.mean(self.optimum[s]):>{len(head)}.2f}"
            for s, head in zip(self.sizes, heads, strict=True)
        )
        shift = f"{self.shift:+.2f} ± {half_width(self.shifts):.2f}"
        regret = f"{100 * self.regret:.2f} %"
        return f"{self.rule:<18}{optima}{shift:>28}{regret:>9}  {judged}"


def size_key(size: float) -> str:
    """A size as a key of plain data."""
    return f"{size:g}"


def find_drift(
    rule: str, hparam: str, curves: Mapping[float, Curve], tolerance: float, falls: bool
) -> Drift:
    """The drift of ``hparam`` under ``rule`` over the sizes of ``curves``, from proxy to target.

    ``falls``: the proxy is the largest of them. Raises `ConfigError` for a single size.
    """
    sizes = tuple(sorted(curves, reverse=falls))
    if len(sizes) < 2:
        raise ConfigError(f"rule {rule}: one size only ({sizes}); a drift needs at least two")
    optima = {s: curves[s].optima() for s in sizes}
    x = np.log2(sizes)
    slopes = np.polyfit(x, np.stack([optima[s] for s in sizes]), 1)[0]
    return Drift(
        rule=rule,
        hparam=hparam,
        sizes=sizes,
        optimum={s: tuple(o.tolist()) for s, o in optima.items()},
        shifts=tuple(slopes.tolist()),
        regrets=tuple(curves[sizes[-1]].regret(optima[sizes[0]]).tolist()),
        best_loss={s: float(curves[s].loss.min(axis=0).mean()) for s in sizes},
        open_sizes=tuple(s for s in sizes if not curves[s].inside().all()),
        tolerance=tolerance,
    )
