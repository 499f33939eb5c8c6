"""Alarms during a run: it is held against narrower runs of its own config, at equal steps.

µP promises more than an optimum that stays put: at equal steps a wider model has the activations
and relative updates of its proxy, and no higher loss (Yang et al. 2022, arXiv 2203.03466). So the
cheapest proxy to watch with is the same config at a smaller width, trained at least as far as the
alarms are to reach. What its record becomes at this run's width follows from the two tables alone,
its own and the one that its rule makes of it here:

``update_ratio``  updates go as the learning rates, weights as below
``weight_rms``    what was there at the start goes as the initial std, what was learned since (in
                  quadrature) as the learning rate; weights that shrank go as the std. Only where
                  steps are as large as their rate: under AdamW and Lion
``eps_ratio``     stays: ε is meant to go as the gradients; below 1 % it is harmless at any width
``act``           stays
``val/loss``      stays or falls: it is held against the widest proxies, seeds averaged
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.config.fields import differing
from mupgpt.config.plain import load_toml
from mupgpt.config.schedules import lr_factor
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.parametrization.axes import AXES
from mupgpt.parametrization.rules import get_rule
from mupgpt.parametrization.table import ParamTable, parametrize
from mupgpt.resolve import train_config
from mupgpt.training.health import kind
from mupgpt.training.metrics import HEALTH, STEP, VAL_LOSS, WATCH, read_metrics

__all__ = ["Band", "Proxy", "Watch"]

TOLERANCE = {"weight_rms": 1.25, "update_ratio": 2.0, "eps_ratio": 2.0, "act": 4.0}
"""Factor by which a quantity may leave what the proxies say (benchmarks/health.py has how far
healthy runs do; the activations of a narrow proxy grow the most)."""
BIAS = 2.0
"""By so much more where weights and updates of biases are concerned, which start at nothing: all of
them is learned, and noisy."""
EPS_MATTERS = 0.01
"""ε/√v̂ below which Adam's step is what it would be without ε."""
LOSS_MARGIN = 0.01
"""Relative excess of loss that is forgiven; or three standard deviations over seeds, if more."""
SAME_RATE = 0.05
"""Difference of learning-rate factors up to which two runs stand at the same point."""

SIGN_LIKE = ("adamw", "lion")
WIDTHS = ("model.d_model", "model.n_head", "model.d_head", "model.n_kv_head", "model.d_ffn")
TABLE, CLOCK, NOISE = ("rule", "base", "hparams"), ("schedule", "steps", "phases"), ("seed",)
APART = (*WIDTHS, *TABLE, *CLOCK, *NOISE, "precision")
"""What a proxy may have otherwise: the alarms expect it of a width, compare its table, end where
its learning rates leave ours, and allow more than seeds or rounding change."""
GROWN = ("width", "ffn ratio", "d_head")
"""Axes over which a proxy may differ, where its rule covers them."""
LIKELY = {
    "weight_rms": "their initial std, learning rate or weight decay is not the proxies' widened",
    "update_ratio": "their learning rate or initial std is not the proxies' widened",
    "eps_ratio": "ε is not small beside the gradients here; lower hparams.eps",
    "act": "a multiplier, initial std or learning rate is not the proxies' widened",
    VAL_LOSS: "a wider run should not lose to its proxy; look at the first alarm, or at the data",
}


@dataclass(frozen=True)
class Band:
    """Where a quantity should lie at a step."""

    low: float
    expected: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}" if self.low else f"at most {self.high:.4g}"


@dataclass(frozen=True)
class Proxy:
    """A narrower run: its records as they should look at the watched run's width."""

    folder: Path
    config: TrainConfig
    series: Mapping[str, tuple[list[int], list[float]]]
    """Metric → steps and values."""

    @property
    def last(self) -> int:
        """The last step that can be compared."""
        return max(steps[-1] for steps, _ in self.series.values())

    def at(self, key: str, step: int) -> float | None:
        """The metric at ``step``, between two records if need be; None where there is none."""
        steps, values = self.series.get(key, ([], []))
        inside = bool(steps) and steps[0] <= step <= steps[-1]
        return float(np.interp(step, steps, values)) if inside else None

    @classmethod
    def read(cls, folder: Path, ours: TrainConfig) -> "Proxy":
        """The run in ``folder``, or an error that says why it is no proxy of ``ours``."""
        if not (folder / "config.json").is_file():
            raise ConfigError(f"tracking.watch = {str(folder)!r}: must be the folder of a run")
        config = train_config(load_toml(folder / "config.json"))
        _comparable(folder, config, ours)
        until = _together(config, ours)
        scales = _scales(_table(config), _table(ours, like=config))
        series: dict[str, tuple[list[int], list[float]]] = {}
        for record in read_metrics(folder / "metrics.jsonl"):
            if record[STEP] <= until:
                for key, value in _widened(record, scales).items():
                    steps, values = series.setdefault(key, ([], []))
                    steps.append(record[STEP])
                    values.append(value)
        if not series:
            raise ConfigError(
                f"tracking.watch = {str(folder)!r}: nothing to compare; up to step {until}, where "
                "schedule or phases of the two runs part, it has no record. A proxy is this config "
                "at a smaller width: mupgpt train CONFIG --model.d_model 64 --run runs/proxy"
            )
        return cls(folder, config, series)


def _comparable(folder: Path, theirs: TrainConfig, ours: TrainConfig) -> None:
    """Refuse a run that differs in more than its width, or whose rule does not cover that."""
    for name, there, here in differing(theirs, ours, "result", "measure", apart=APART):
        raise ConfigError(
            f"tracking.watch = {str(folder)!r}: {name} is {there!r} there and {here!r} here; "
            "steps compare between runs that differ in width alone"
        )
    for axis in GROWN:
        there, here = (AXES[axis].value(config) for config in (theirs, ours))
        if there != here and axis not in get_rule(theirs.rule).covers:
            raise ConfigError(
                f"tracking.watch = {str(folder)!r}: its rule {theirs.rule} promises nothing over "
                f"{axis}, {there:g} there and {here:g} here"
            )


def _together(a: TrainConfig, b: TrainConfig) -> int:
    """Steps up to which two runs have had the same batches and learning-rate factors."""
    steps = min(a.steps, b.steps)
    for step in range(steps):
        sizes = [(c.phase_at(step).batch_size, c.phase_at(step).seq_len) for c in (a, b)]
        apart = abs(lr_factor(a, step) - lr_factor(b, step))
        if sizes[0] != sizes[1] or apart > SAME_RATE:
            return step
    return steps


def _table(config: TrainConfig, like: TrainConfig | None = None) -> ParamTable:
    """The table of ``config``, with base, hyperparameters and rule as in ``like``."""
    by = like or config
    return parametrize(config.model, by.base, by.hparams, by.rule)


@dataclass(frozen=True)
class Scale:
    """How one kind of parameter changes from the proxy to the watched run."""

    start: float
    """RMS of the proxy's weights at the start."""
    start_ratio: float
    lr_ratio: float

    def weight(self, rms: float) -> float:
        """RMS of the watched run's weights where the proxy's is ``rms``."""
        if rms < self.start:
            return rms * self.start_ratio
        learned = math.sqrt(rms**2 - self.start**2)
        return math.hypot(self.start * self.start_ratio, learned * self.lr_ratio)


def _scales(theirs: ParamTable, ours: ParamTable) -> dict[str, Scale]:
    """Kind of parameter → how it scales."""
    there, here = _sizes(theirs), _sizes(ours)
    scales = {}
    for name, (start, lr) in there.items():
        ratio = here[name][0] / start if start else 1.0
        scales[name] = Scale(start, ratio, here[name][1] / lr)
    return scales


def _sizes(table: ParamTable) -> dict[str, tuple[float, float]]:
    """Kind → RMS of weights at the start and of learning rates, where both say what weights do."""
    sums: dict[str, np.ndarray] = {}
    for row in (row for row in table.params if row.optimizer in SIGN_LIKE):
        start = 1.0 if row.init == "ones" else row.init_std
        more = math.prod(row.shape) * np.array([1.0, start**2, row.lr**2])
        sums[kind(row)] = sums.get(kind(row), 0.0) + more
    return {name: (math.sqrt(s / n), math.sqrt(lr / n)) for name, (n, s, lr) in sums.items()}


def _widened(record: Mapping[str, Any], scales: Mapping[str, Scale]) -> dict[str, float]:
    """What is watched of a proxy's record, as it should be at the watched run's width."""
    stays = {k: v for k, v in record.items() if _quantity(k) in ("eps_ratio", "act", VAL_LOSS)}
    moves = {}
    for name, scale in scales.items():
        weight, ratio = (f"{HEALTH}/{name}/{q}" for q in ("weight_rms", "update_ratio"))
        if weight in record:
            moves[weight] = scale.weight(record[weight])
        if ratio in record:
            moves[ratio] = record[ratio] * scale.lr_ratio * record[weight] / moves[weight]
    return stays | moves


def _quantity(key: str) -> str:
    """Which quantity a metric is; empty for one that is not watched."""
    if key == VAL_LOSS:
        return key
    prefix, _, rest = key.partition("/")
    name = "act" if rest.startswith("act/") else rest.rpartition("/")[2]
    return name if prefix == HEALTH and name in TOLERANCE else ""


class Watch:
    """The alarms of one run; without ``tracking.watch`` it is silent."""

    def __init__(self, config: TrainConfig) -> None:
        self.proxies = [Proxy.read(Path(folder), config) for folder in config.tracking.watch]
        self._config = config
        self._said: set[str] = set()

    def opening(self) -> list[str]:
        """What to say before the run: how far the alarms reach, and tables that do not agree."""
        lines = [f"held against {proxy.folder} up to step {proxy.last}" for proxy in self.proxies]
        for proxy in self.proxies:
            expected = _table(self._config, like=proxy.config).to_dict()
            if differences := _table(self._config).diff(expected):
                lines.append(
                    f"beware: the table of this run is not that of {proxy.folder} widened: "
                    f"{differences[0]} ({len(differences)} differences)"
                )
                break
        return lines

    def __call__(self, record: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """``watch/…`` → value over the proxies' for each quantity, and the alarms, each said once.

        ``watch/outside`` counts the quantities that are outside their bands in this record.
        """
        facts: dict[str, float] = {}
        alarms, outside = [], 0
        for key in filter(_quantity, record):
            band = self.band(key, record[STEP])
            if band is None or not band.expected:
                continue
            facts[f"{WATCH}/{key.removeprefix(f'{HEALTH}/')}"] = record[key] / band.expected
            if record[key] not in band:
                outside += 1
                alarms += self._alarm(key, record, band)
        return (facts | {f"{WATCH}/outside": outside} if facts else {}), alarms

    def band(self, key: str, step: int) -> Band | None:
        """Where the proxies put a metric at ``step``; None where none of them has been."""
        if key == VAL_LOSS:
            return self._loss_band(step)
        values = _known(proxy.at(key, step) for proxy in self.proxies)
        if not values:
            return None
        quantity = _quantity(key)
        factor = TOLERANCE[quantity]
        if key.startswith(f"{HEALTH}/bias/") and quantity != "eps_ratio":
            factor *= BIAS
        low, high = min(values) / factor, max(values) * factor
        if quantity == "eps_ratio":
            low, high = 0.0, max(high, EPS_MATTERS)
        return Band(low, statistics.fmean(values), high)

    def _loss_band(self, step: int) -> Band | None:
        widths = {p.config.model.d_model for p in self.proxies}
        widest = max((w for w in widths if w <= self._config.model.d_model), default=None)
        proxies = [p for p in self.proxies if p.config.model.d_model == widest]
        losses = _known(proxy.at(VAL_LOSS, step) for proxy in proxies)
        if not losses:
            return None
        mean = statistics.fmean(losses)
        noise = 3 * statistics.stdev(losses) if len(losses) > 1 else 0.0
        return Band(0.0, mean, mean + max(LOSS_MARGIN * mean, noise))

    def _alarm(self, key: str, record: Mapping[str, Any], band: Band) -> list[str]:
        if key in self._said:
            return []
        self._said.add(key)
        return [
            f"step {record[STEP]}: {key} is {record[key]:.4g}; from narrower runs it should be "
            f"{band}: {LIKELY[_quantity(key)]}"
        ]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
