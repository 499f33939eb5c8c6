"""A run held against the loss that was said of it before it began."""

from collections.abc import Mapping
from typing import Any

from mupgpt.config.schema import TrainConfig
from mupgpt.training.metrics import PREDICT_HIGH, PREDICT_LOW, STEP, VAL_LOSS

__all__ = ["Forecast"]


class Forecast:
    """The `Prediction` of a run while it is trained; an empty one says nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self._said, self._last = config.prediction, config.steps
        self._left = False

    def facts(self) -> dict[str, float]:
        """The band, beside each held-out loss."""
        said = self._said
        return {PREDICT_LOW: said.low, PREDICT_HIGH: said.high} if said else {}

    def left_by(self, record: Mapping[str, Any]) -> str:
        """What to say once when the run leaves the band: at its end, or as soon as it is below.

        >>> from mupgpt.resolve import train_config
        >>> band = {"loss": 3.0, "low": 2.9, "high": 3.1, "source": "a law"}
        >>> forecast = Forecast(train_config({"model": "proxy-32", "prediction": band}))
        >>> said = [forecast.left_by({"step": 5, "val/loss": loss}) for loss in (5.0, 2.8, 2.7)]
        >>> [line[:40] for line in said]
        ['', 'step 5: loss 2.8000 has left the predict', '']
        """
        said, step, loss = self._said, record[STEP], record[VAL_LOSS]
        above = step == self._last and loss > said.high
        if not said or self._left or not (loss < said.low or above):
            return ""
        self._left = True
        return f"step {step}: loss {loss:.4f} has left the prediction {said}"
