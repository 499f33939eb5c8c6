"""Is a proxy faithful? Do its sweep's configurations rank at larger sizes as they did in it?

A sweep's winner is worth what it is at the target. A sample of finished trials, from the best to
the worst, is trained again at larger widths on fresh seeds; `judge_fidelity` compares ranks, says
what the proxy's own pick loses there, whether the winner gains from width as the others do, and
which hyperparameters explain the disagreement.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mupgpt.errors import require
from mupgpt.tuning.curves import half_width
from mupgpt.util.text import align, several, show

__all__ = ["RANKS", "REGRET", "Agreement", "Fidelity", "judge_fidelity", "rank_correlation"]

RANKS = 0.8  # Spearman's coefficient from which ranks at the proxy are worth going by
REGRET = 0.02  # relative loss at the largest size that the proxy's pick may cost
DRAWS = 2000  # of the bootstrap over configurations
TOP = 3  # the best third is looked at by itself
CLEAR = 3.0  # a coefficient so many standard errors from 0 explains something


@dataclass(frozen=True)
class Agreement:
    """How far two orders agree: Spearman's rank correlation, all and among the best third."""

    ranks: float
    """Spearman's coefficient over all configurations."""
    low: float
    """Lower end of its 95 % interval (bootstrap over configurations)."""
    high: float
    """Upper end."""
    top: float
    """The same among the third that is best at the larger size."""
    regret: float
    """Relative loss of the proxy's pick above the best of the sample at the larger size."""


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's coefficient of two (C,) arrays; 0 where one of them is constant.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 9.0]))
    1.0
    """
    x, y = stats.rankdata(a), stats.rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _agreement(before: np.ndarray, after: np.ndarray) -> Agreement:
    """How the order of ``before`` (C,) stands up in ``after`` (C,): losses, lower is better."""
    rng, n = np.random.default_rng(0), len(before)
    draws = rng.integers(n, size=(DRAWS, n))
    low, high = np.quantile([rank_correlation(before[d], after[d]) for d in draws], [0.025, 0.975])
    best = np.argsort(after, kind="stable")[: max(3, n // TOP)]
    return Agreement(
        ranks=rank_correlation(before, after),
        low=float(low),
        high=float(high),
        top=rank_correlation(before[best], after[best]),
        regret=float(after[before.argmin()] / after.min() - 1),
    )


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What larger sizes say of a proxy's order, and of its winner; `run_fidelity` makes it.

    >>> swept = np.array([2.3, 2.4, 2.5])
    >>> again = np.stack([swept, swept - 0.1])[..., None].repeat(2, axis=-1)  # (2, 3, 2)
    >>> params = tuple({"hparams.lr": lr} for lr in (0.01, 0.02, 0.04))
    >>> found = Fidelity(study="mine", widths=(32, 64), target=256, params=params, swept=swept,
    ...                  losses=again)
    >>> found.agreements[-1].ranks, found.verdict  # the order stands, but of three only
    (1.0, 'INCONCLUSIVE')
    """

    study: str
    widths: tuple[int, ...]
    """The proxy's width first, then larger ones."""
    target: int
    """Width of the target, trained or not."""
    params: tuple[Mapping[str, float], ...]
    """The configurations; the sweep's winner first."""
    swept: np.ndarray
    """Loss that the sweep saw, (C,)."""
    losses: np.ndarray
    """Losses on fresh seeds, (widths, C, seeds), nats per token."""

    @property
    def means(self) -> np.ndarray:
        """Mean losses over the seeds, (widths, C)."""
        return self.losses.mean(axis=2)

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        """For each width how the sweep's order stands up there."""
        return tuple(_agreement(self.swept, row) for row in self.means)

    @property
    def gains(self) -> np.ndarray:
        """Relative loss that each configuration gains per doubling of the width, (C, seeds)."""
        x = np.log2(self.widths)
        c, seeds = self.losses.shape[1:]
        slopes = np.polyfit(x, self.losses.reshape(len(x), -1), 1)[0].reshape(c, seeds)
        return -slopes / self.losses[0]

    @property
    def winner_gain(self) -> tuple[float, float]:
        """What the winner gains per doubling, and half of its 95 % interval over the seeds."""
        gains = self.gains[0]
        return float(gains.mean()), half_width(gains.tolist())

    @property
    def usual_gain(self) -> float:
        """The median of what the sample's best third at the proxy gains per doubling."""
        best = np.argsort(self.swept, kind="stable")[: max(3, len(self.swept) // TOP)]
        return float(np.median(self.gains.mean(axis=1)[best]))

    @property
    def expected(self) -> float:
        """Spearman's coefficient to expect at the target: Fisher's z, linear in log width."""
        x = np.log2(np.array(self.widths[1:]) / self.widths[0])
        z = np.arctanh(np.clip([a.ranks for a in self.agreements[1:]], -0.999, 0.999))
        at = math.log2(self.target / self.widths[0])
        if len(x) < 2 or self.target <= self.widths[-1]:
            return float(np.tanh(np.interp(at, x, z)))
        slope, level = np.polyfit(x, z, 1)
        return float(np.tanh(level + min(slope, 0.0) * at))

    @property
    def reasons(self) -> dict[str, float]:
        """Hyperparameter → t of how it explains what changes in rank, where that is clear.

        A least-squares fit of the difference of ranks (largest width − sweep) on the logarithms of
        the values. Positive: high values rank worse at the larger size than the sweep said.
        """
        values = {key: {p[key] for p in self.params} for key in self.params[0]}
        keys = [key for key, some in values.items() if len(some) > 1 and min(some) > 0]
        x = np.log([[p[k] for k in keys] for p in self.params])
        moved = stats.rankdata(self.means[-1]) - stats.rankdata(self.swept)
        design = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
        free = len(x) - design.shape[1]
        if free < 3:
            return {}
        fit, *_ = np.linalg.lstsq(design, moved, rcond=None)
        noise = np.sum((moved - design @ fit) ** 2) / free
        errors = np.sqrt(np.diag(noise * np.linalg.pinv(design.T @ design)))
        t = dict(zip(keys, (fit / np.maximum(errors, 1e-12))[1:].tolist(), strict=True))
        return {k: v for k, v in sorted(t.items(), key=lambda kv: -abs(kv[1])) if abs(v) >= CLEAR}

    @property
    def verdict(self) -> str:
        """FAITHFUL, UNFAITHFUL or INCONCLUSIVE.

        FAITHFUL: the interval of the ranks at the largest width lies above `RANKS`, and the proxy's
        pick costs at most `REGRET` there. UNFAITHFUL: the interval lies below, or the pick costs
        more.
        """
        last = self.agreements[-1]
        if last.regret > REGRET or last.high < RANKS:
            return "UNFAITHFUL"
        return "FAITHFUL" if last.low >= RANKS else "INCONCLUSIVE"

    @property
    def warnings(self) -> list[str]:
        """What a reader must not overlook."""
        gain, half = self.winner_gain
        notes = []
        if gain < self.usual_gain / 2:
            notes.append(
                f"the winner gains {100 * gain:.2f} % of its loss per doubling of the width, its "
                f"neighbours {100 * self.usual_gain:.2f} %: it uses what is narrow in the proxy"
            )
        elif math.isfinite(half) and gain - half <= 0:
            notes.append("whether the winner gains from width is within the noise of the seeds")
        if self.target > self.widths[-1]:
            notes.append(
                f"nothing was trained at the target's width {self.target}: {self.expected:.2f} is "
                "extrapolated"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "verdict": self.verdict,
            "study": self.study,
            "widths": list(self.widths),
            "target": self.target,
            "agreements": [vars(a) for a in self.agreements],
            "expected": self.expected,
            "winner_gain": self.winner_gain[0],
            "usual_gain": self.usual_gain,
            "reasons": self.reasons,
            "warnings": self.warnings,
            "params": [dict(p) for p in self.params],
            "swept": self.swept.tolist(),
            "losses": self.losses.tolist(),
        }

    def __str__(self) -> str:
        rows = [("width", "ranks kept", "95 %", "best third", "the pick costs", "winner", "best")]
        for width, a, row in zip(self.widths, self.agreements, self.means, strict=True):
            rows.append((
                show(width), f"{a.ranks:.2f}", f"{a.low:.2f} … {a.high:.2f}", f"{a.top:.2f}",
                f"{100 * a.regret:.2f} %", f"{row[0]:.4f}", f"{row.min():.4f}",
            ))  # fmt: skip
        lines = [*align(rows, set(range(7))), ""]
        c, seeds = self.losses.shape[1:]
        gain, half = self.winner_gain
        known = f" ± {100 * half:.2f}" if math.isfinite(half) else ""
        lines += [
            f"{self.study}: {self.verdict}, {c} configurations, {several(seeds, 'fresh seed')}; "
            f"ranks to expect at width {show(self.target)}: {self.expected:.2f}",
            f"the winner gains {100 * gain:.2f}{known} % of its loss per doubling of the width, "
            f"the best third {100 * self.usual_gain:.2f} %",
        ]
        for key, t in self.reasons.items():
            worse = "worse" if t > 0 else "better"
            name = key.removeprefix("hparams.")
            lines.append(
                f"high {name} ranks {worse} at larger widths than in the sweep (t {t:+.1f})"
            )
        return "\n".join(lines + [f"warning: {note}" for note in self.warnings])


def judge_fidelity(
    study: str,
    widths: Sequence[int],
    target: int,
    params: Sequence[Mapping[str, float]],
    losses: tuple[np.ndarray, np.ndarray],
) -> Fidelity:
    """The fidelity of a sweep from what it saw, (C,), and fresh losses, (widths, C, seeds).

    ``losses`` is that pair; the sweep's winner is the first configuration. Raises ConfigError for
    fewer than six configurations or a single width.
    """
    swept, fresh = losses
    require(len(params) >= 6, "configs", len(params), "be at least 6: ranks of fewer say nothing")
    require(len(widths) >= 2, "widths", list(widths), "hold a width above the proxy's")
    assert fresh.shape[:2] == (len(widths), len(params)) and len(swept) == len(params)
    return Fidelity(
        study=study, widths=tuple(widths), target=target, params=tuple(params), swept=swept,
        losses=fresh,
    )  # fmt: skip
