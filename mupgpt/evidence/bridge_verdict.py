"""Go or no-go: whether the transferred learning rate is the best one at sizes between.

A rung is one population: its three learning rates on every seed, side by side, so that a seed sees
the same initialization and data at each. Differences are therefore taken seed by seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mupgpt.data.corpus import load_corpus
from mupgpt.evidence.ladder import Rung, run_one
from mupgpt.mutransfer.axes import axes_between
from mupgpt.mutransfer.bridge import LR_FACTORS, BridgePlan, train_flops
from mupgpt.tuning.curves import Curve, half_width
from mupgpt.tuning.study import penalized
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import stop_flag
from mupgpt.util.text import align, show

__all__ = ["BridgeRunVerdict", "BridgeVerdict", "judge_bridge", "run_bridge"]

CENTER = LR_FACTORS.index(1.0)
Direction = Literal["down", "up"]


@dataclass(frozen=True, eq=False)
class BridgeRunVerdict:
    """What one rung says of the transferred learning rate."""

    rung: Rung

    @property
    def width(self) -> int:
        """d_model of the rung."""
        return self.rung.config.model.d_model

    @property
    def losses(self) -> np.ndarray:
        """Held-out loss, (factors, seeds), nats per token; a diverged run counts as ln V + 1."""
        vocab_size = self.rung.config.model.vocab_size
        losses = np.array([penalized(loss, vocab_size) for loss in self.rung.losses])
        return losses.reshape(len(LR_FACTORS), -1)

    @property
    def gains(self) -> Mapping[float, tuple[float, float]]:
        """Factor → what it gains over the transferred rate: mean over seeds, half of its 95 % t."""
        losses = self.losses
        paired = {f: (losses[CENTER] - losses[i]).tolist() for i, f in enumerate(LR_FACTORS)}
        return {f: (float(np.mean(d)), half_width(d)) for f, d in paired.items() if f != 1.0}

    @property
    def optimum(self) -> tuple[float, float]:
        """log2 of the best rate over the transferred one, within ±1: mean, half of its 95 % t."""
        optima = Curve(np.log2(LR_FACTORS), self.losses).optima().tolist()
        return float(np.mean(optima)), half_width(optima)

    @property
    def direction(self) -> Direction | None:
        """Where a rate lies that is better beyond seed noise; None: the transferred one stands."""
        better = {f: mean for f, (mean, half) in self.gains.items() if mean - half > 0}
        if not better:
            return None
        return "down" if max(better, key=lambda f: better[f]) < 1 else "up"

    @property
    def status(self) -> str:
        """``best``, ``within noise``, ``lower`` or ``higher``: where the best rate lies."""
        if self.direction:
            return {"down": "lower", "up": "higher"}[self.direction]
        return "best" if self.losses.mean(axis=1).argmin() == CENTER else "within noise"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "width": self.width,
            "status": self.status,
            "lr_factors": list(LR_FACTORS),
            "losses": self.losses.tolist(),
            "gains": {f"{f:g}": list(gain) for f, gain in self.gains.items()},
            "optimum_log2": self.optimum[0],
            "optimum_ci95": [self.optimum[0] - self.optimum[1], self.optimum[0] + self.optimum[1]],
        }


@dataclass(frozen=True, eq=False)
class BridgeVerdict:
    """Go or no-go for the target, from every rung."""

    plan: BridgePlan
    rungs: tuple[BridgeRunVerdict, ...]

    @property
    def go(self) -> bool:
        """Whether the transferred rate stands at every rung."""
        return all(rung.direction is None for rung in self.rungs)

    @property
    def direction(self) -> Direction | None:
        """Where the optimum goes, by the widest rung that says so."""
        moved = [rung.direction for rung in self.rungs if rung.direction]
        return moved[-1] if moved else None

    @property
    def remedy(self) -> list[str]:
        """What to do after a no-go."""
        if self.go:
            return []
        source, widest = self.plan.source, self.plan.rungs[-1]
        lower = {"down": "lower", "up": "higher", None: ""}[self.direction]
        shared = [
            f"{a.name} {show(a.source)} → {show(a.target)}"
            for a in axes_between(source, widest)
            if a.differs and a.name != "width"
        ]
        aside = f" ({'; '.join(shared)})" if shared else ""
        return [
            f"the best learning rate is {lower} there than the proxy's: do not train the target "
            "with it",
            f"if it moves with width, rule {source.rule} does not hold here: mupgpt coord-check "
            f"--rule {source.rule}",
            "if it moved by the same on every rung, what all rungs change has moved it" + aside,
            f"either way sweep again at width {self.rungs[0].width} or more, with the target's "
            "depth, batch and text, and check again",
        ]

    @property
    def warnings(self) -> list[str]:
        """Where the transferred rate is not the best, but the noise is too large to say so."""
        return [
            f"at width {r.width:,} another rate is better on average, within the noise: more "
            "--seeds would tell"
            for r in self.rungs
            if r.status == "within noise"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "go": self.go,
            "direction": self.direction,
            "remedy": self.remedy,
            "warnings": self.warnings,
            "results": [rung.to_dict() for rung in self.rungs],
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        head = [f"lr × {factor:g}" for factor in LR_FACTORS]
        gains = [f"gain at × {f:g}, 95 %" for f in LR_FACTORS if f != 1.0]
        rows = [("width", *head, *gains, "best at 2^ (ends ±1), 95 %", "the rate's place")]
        for r in self.rungs:
            means = (f"{x:.4f}" for x in r.losses.mean(axis=1))
            around = (f"{mean:+.4f} ± {half:.4f}" for mean, half in r.gains.values())
            best = "{:+.2f} ± {:.2f}".format(*r.optimum)
            rows.append((f"{r.width:,}", *means, *around, best, r.status))
        lines = [*align(rows, set(range(len(rows[0]) - 1))), ""]
        plan = self.plan
        if self.go:
            lines.append(
                f"GO: no other learning rate is better beyond the noise of {len(plan.seeds)} seeds "
                f"(95 %, paired), at width {', '.join(show(r.width) for r in self.rungs)}"
            )
        else:
            lines.append(f"NO-GO: the optimum moves {self.direction} with size")
            lines += [f"  {line}" for line in self.remedy]
        return "\n".join(lines + [f"warning: {line}" for line in self.warnings])


def judge_bridge(plan: BridgePlan, rungs: tuple[Rung, ...]) -> BridgeVerdict:
    """Go or no-go from finished rungs: no-go where a neighbour is better beyond seed noise.

    That is when its gain over the transferred rate, paired over seeds, has a 95 % t-interval
    above 0.
    """
    return BridgeVerdict(plan, tuple(map(BridgeRunVerdict, rungs)))


def run_bridge(plan: BridgePlan, folder: Path | str) -> BridgeVerdict:
    """Train the rungs that ``folder`` lacks, and judge all of them.

    Raises KeyboardInterrupt when it is stopped: the rung in hand is lost, the same call goes on
    with it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(plan.target.data)
    done, rungs = 0.0, []
    with stop_flag() as stop, Progress("rungs") as progress:
        for config in plan.rungs:
            share = plan.runs * train_flops(config) / plan.flops

            def tell(part: float, done: float = done, share: float = share) -> None:
                progress.update(round(1000 * (done + part * share)), 1000, "of the FLOPs")
                stop.check()

            path = folder / f"w{config.model.d_model}.json"
            rungs.append(run_one(path, config, plan.seeds, corpus, tell, LR_FACTORS))
            done += share
    return judge_bridge(plan, tuple(rungs))
