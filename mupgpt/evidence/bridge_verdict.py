"""Go or no-go: whether the transferred learning rate is the best one at sizes between.

A size is one population: its three learning rates on every seed, side by side, so that a seed sees
the same initialization and data at each. Differences are therefore taken seed by seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mupgpt.data.corpus import load_corpus
from mupgpt.evidence.stored_run import StoredRun, load_or_train
from mupgpt.mutransfer.axes import axes_between
from mupgpt.mutransfer.bridge import LR_FACTORS, BridgePlan
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
    """What one size says of the transferred learning rate."""

    run: StoredRun

    @property
    def width(self) -> int:
        """d_model of the size."""
        return self.run.config.model.d_model

    @property
    def losses(self) -> np.ndarray:
        """Held-out loss, (factors, seeds), nats per token; a diverged run counts as ln V + 1."""
        vocab_size = self.run.config.model.vocab_size
        losses = np.array([penalized(loss, vocab_size) for loss in self.run.losses])
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
    """Go or no-go for the target, from every size."""

    plan: BridgePlan
    sizes: tuple[BridgeRunVerdict, ...]

    @property
    def go(self) -> bool:
        """Whether the transferred rate stands at every size."""
        return all(size.direction is None for size in self.sizes)

    @property
    def direction(self) -> Direction | None:
        """Where the optimum goes, by the widest size that says so."""
        moved = [size.direction for size in self.sizes if size.direction]
        return moved[-1] if moved else None

    @property
    def remedy(self) -> list[str]:
        """What to do after a no-go."""
        if self.go:
            return []
        source, widest = self.plan.source, self.plan.sizes[-1]
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
            "if it moved by the same at every size, what all sizes change has moved it" + aside,
            f"either way sweep again at width {self.sizes[0].width} or more, with the target's "
            "depth, batch and text, and check again",
        ]

    @property
    def warnings(self) -> list[str]:
        """Where the transferred rate is not the best, but the noise is too large to say so."""
        return [
            f"at width {r.width:,} another rate is better on average, within the noise: more "
            "--seeds would tell"
            for r in self.sizes
            if r.status == "within noise"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "go": self.go,
            "direction": self.direction,
            "remedy": self.remedy,
            "warnings": self.warnings,
            "results": [size.to_dict() for size in self.sizes],
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        head = [f"lr × {factor:g}" for factor in LR_FACTORS]
        gains = [f"gain at × {f:g}, 95 %" for f in LR_FACTORS if f != 1.0]
        rows = [("width", *head, *gains, "best at 2^ (ends ±1), 95 %", "the rate's place")]
        for r in self.sizes:
            means = (f"{x:.4f}" for x in r.losses.mean(axis=1))
            around = (f"{mean:+.4f} ± {half:.4f}" for mean, half in r.gains.values())
            best = "{:+.2f} ± {:.2f}".format(*r.optimum)
            rows.append((f"{r.width:,}", *means, *around, best, r.status))
        lines = [*align(rows, set(range(len(rows[0]) - 1))), ""]
        plan = self.plan
        if self.go:
            lines.append(
                f"GO: no other learning rate is better beyond the noise of {len(plan.seeds)} seeds "
                f"(95 %, paired), at width {', '.join(show(r.width) for r in self.sizes)}"
            )
        else:
            lines.append(f"NO-GO: the optimum moves {self.direction} with size")
            lines += [f"  {line}" for line in self.remedy]
        return "\n".join(lines + [f"warning: {line}" for line in self.warnings])


def judge_bridge(plan: BridgePlan, runs: tuple[StoredRun, ...]) -> BridgeVerdict:
    """Go or no-go from finished runs, one a size: no-go where a neighbour is better beyond noise.

    That is when its gain over the transferred rate, paired over seeds, has a 95 % t-interval
    above 0.

    >>> from mupgpt import plan_bridge, train_config
    >>> plan = plan_bridge(train_config({"model": "cerebras-gpt-40m"}), "cerebras-gpt-13b")
    >>> losses = (2.2, 2.3, 2.1, 2.2, 2.0, 2.1)  # half, once and twice the rate, two seeds each
    >>> runs = tuple(StoredRun(config=c, seeds=(0, 1), losses=losses, corpus={})
    ...              for c in plan.sizes)
    >>> judge_bridge(plan, runs).direction
    'up'
    """
    return BridgeVerdict(plan, tuple(map(BridgeRunVerdict, runs)))


def run_bridge(plan: BridgePlan, folder: Path | str) -> BridgeVerdict:
    """Train the sizes that ``folder`` lacks, and judge all of them.

    Raises KeyboardInterrupt when it is stopped: the size in hand is lost, the same call goes on
    with it.

    >>> import tempfile
    >>> from mupgpt import plan_bridge, train_config
    >>> model = {"n_layer": 1, "d_model": 8, "d_head": 8, "vocab_size": 257, "seq_len": 16}
    >>> proxy = train_config({"model": model, "steps": 2, "batch_size": 2,
    ...                       "hparams": {"beta2": 0.0},
    ...                       "data": {"source": "package:json", "eval_tokens": 64}})
    >>> plan = plan_bridge(proxy, {"model": {**model, "d_model": 24}, "steps": 4, "batch_size": 2},
    ...                    seeds=(0, 1), max_share=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = run_bridge(plan, folder)
    >>> [size.losses.shape for size in found.sizes]
    [(3, 2)]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(plan.target.data)
    done, runs = 0.0, []
    with stop_flag() as stop, Progress("bridge") as progress:
        for config in plan.sizes:
            share = plan.flops_of(config) / plan.flops

            def tell(part: float, done: float = done, share: float = share) -> None:
                progress.update(round(1000 * (done + part * share)), 1000, "of the FLOPs")
                stop.check()

            path = folder / f"w{config.model.d_model}.json"
            asked = StoredRun.asked(config, plan.seeds, corpus, LR_FACTORS)
            runs.append(load_or_train(path, asked, corpus, tell))
            done += share
    return judge_bridge(plan, tuple(runs))
