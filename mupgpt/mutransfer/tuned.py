"""What a sweep found: the run that won, and how well its values are known."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mupgpt.config.schema import TrainConfig

__all__ = ["Tuned", "Uncertainty"]


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """How well one tuned value is known: from runs with half of it and twice of it."""

    best: float | None
    """The best value over the tuned one; None: it lies outside half to twice for some seed."""
    factor: float | None
    """Times or divided by this is the 95 % interval of the best value, over seeds."""
    harmless: float | None
    """Times or divided by this costs 0.5 % of the loss; None: no bend was seen."""

    def __str__(self) -> str:
        known = (
            f"best at × {self.best:.2f}, ×/÷ {self.factor:.2f}"
            if self.best and self.factor
            else "best outside × ½ … 2 for some seed"
        )
        flat = f"×/÷ {self.harmless:.2g}" if self.harmless else "no change up to × 2"
        return f"{known} (95 %, seeds); 0.5 % of loss: {flat}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A sweep's result: the run whose hyperparameters won, and how sure that is.

    `best_hparams` makes it; `transfer` takes it to another size.

    >>> from mupgpt.resolve import train_config
    >>> found = Tuned(config=train_config({"model": "proxy-32"}), study="mine", trial=7, loss=2.31,
    ...               spread=0.01, swept_loss=2.29, edges={"hparams.lr": "high"}, corpus={})
    >>> print(str(found).splitlines()[0])
    mine: trial 7, loss 2.3100 ± 0.0100 on fresh seeds (the sweep saw 2.2900)
    """

    config: TrainConfig
    """The winning run, hyperparameters in ``config.hparams``."""
    study: str
    """Name of the study."""
    trial: int
    """Number of the trial in it."""
    loss: float
    """Mean held-out loss on fresh seeds, nats per token."""
    spread: float
    """Standard deviation of that loss over the fresh seeds."""
    swept_loss: float
    """What the sweep itself measured: lower, by the luck that made it win."""
    edges: Mapping[str, str]
    """Searched keys whose best value lies at the edge of its range → which edge."""
    uncertainty: Mapping[str, Uncertainty] = field(default_factory=dict)
    """Searched keys → how well their values are known."""
    gain: tuple[float, float] | None = None
    """Loss that the winner gains on the run as it stood, and half of its 95 % interval: both are
    trained on the same fresh seeds."""
    corpus: Mapping[str, Any]
    """Fingerprint of the corpus."""
    confirmed: bool = True
    """Whether ``loss`` is of fresh seeds; else it is the sweep's own, luck included."""

    def __str__(self) -> str:
        seen = f"on fresh seeds (the sweep saw {self.swept_loss:.4f})"
        lines = [
            f"{self.study}: trial {self.trial}, loss {self.loss:.4f} ± {self.spread:.4f} "
            + (seen if self.confirmed else "in the sweep itself, not confirmed on fresh seeds")
        ]
        if self.gain is not None:
            mean, half = self.gain
            doubt = "" if mean > half else ": no more than the noise of seeds"
            lines.append(f"  gains {mean:.4f} ± {half:.4f} (95 %) on the run as it stood{doubt}")
        for f in dataclasses.fields(self.config.hparams):
            known = self.uncertainty.get(f"hparams.{f.name}")
            value = f"  {f.name} = {getattr(self.config.hparams, f.name):.6g}"
            lines.append(f"{value:<30} {known}" if known else value)
        lines += [
            f"  warning: the best {key} lies at the {edge} edge of its range: widen the space"
            for key, edge in self.edges.items()
        ]
        return "\n".join(lines)
