"""A ladder: small µP runs over width and horizon, and what they say the target will reach.

Under µP every run of the ladder trains with the target's hyperparameters, so the runs are points on
the target's own scaling law. A run is one population (its seeds side by side); when it is finished
it is one JSON file, and what is on disk is not trained again.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import Prediction, TrackingConfig, TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.evidence.stored_run import StoredRun, load_or_train, six_nd
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.rules import get_rule
from mupgpt.resolve import train_config
from mupgpt.scaling.named import LAWS
from mupgpt.scaling.report import LawReport, report
from mupgpt.scaling.runs import Runs
from mupgpt.util.bundled import find_bundled
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import stop_flag

__all__ = ["Ladder", "LadderSpec", "load_ladder", "run_ladder"]

LAWS_OF_LOSS = ("chinchilla", "overtraining", "power", "compute")


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Which runs make the ladder, and the law that is fitted to them."""

    widths: tuple[int, ...]
    """Values of d_model; d_head and the ratio of the FFN stay."""
    steps: tuple[int, ...]
    """Horizons, each with its own schedule."""
    seeds: tuple[int, ...] = (0,)
    """Each run trains once per seed."""
    max_flops: float = 0.0
    """Leave out runs dearer than this, 6·N·D of one seed (0: none): wide ones stay short."""
    law: str = "overtraining"
    """One of chinchilla, overtraining, power, compute."""

    def __post_init__(self) -> None:
        for name in ("widths", "steps", "seeds"):
            values = getattr(self, name)
            distinct = len(values) > 0 and len(set(values)) == len(values)
            require(distinct, f"ladder.{name}", values, "name at least one value, none twice")
        if self.law not in LAWS_OF_LOSS:
            raise unknown("ladder.law", self.law, LAWS_OF_LOSS)


@dataclass(frozen=True, kw_only=True)
class LadderSpec:
    """A ladder as data; any key of `TrainConfig` under ``train``."""

    name: str
    """Name of its folder."""
    ladder: LadderConfig
    """Widths, horizons and seeds."""
    train: dict[str, Any] = field(default_factory=dict)
    """The run that every one is, but for width, horizon and seed."""

    @property
    def config(self) -> TrainConfig:
        """The run that the ladder varies."""
        return train_config(self.train)

    @property
    def configs(self) -> list[TrainConfig]:
        """One config for each width and horizon, cheapest first."""
        plan = self.ladder
        made = [_at(self.config, *pair) for pair in itertools.product(plan.widths, plan.steps)]
        kept = [c for c in made if not plan.max_flops or six_nd(c) <= plan.max_flops]
        return sorted(kept, key=six_nd)

    def like(self, target: TrainConfig) -> "LadderSpec":
        """These widths and horizons with everything else as ``target`` has it."""
        given = dataclasses.replace(
            target, prediction=Prediction(), tracking=TrackingConfig(), seed=0
        )
        return dataclasses.replace(self, train=to_dict(given))


def _at(stem: TrainConfig, width: int, steps: int) -> TrainConfig:
    """``stem`` at another width and horizon; decay keeps lr·λ·steps where the rule does so."""
    moved = stem.steps / steps if get_rule(stem.rule).keeps_decay_time else 1.0
    decay = stem.hparams.weight_decay * moved
    hparams = dataclasses.replace(stem.hparams, weight_decay=decay)
    return dataclasses.replace(stem, model=stem.model.widen(width), steps=steps, hparams=hparams)


def load_ladder(name: str | Path) -> LadderSpec:
    """The ladder of that name (shipped) or file, every config resolved.

    >>> [(c.model.d_model, c.steps) for c in load_ladder("ladder").configs][:2]
    [(32, 400), (32, 800)]
    """
    path = find_bundled(str(name))
    try:
        spec = from_dict(LadderSpec, {"name": path.stem, **load_toml(path)})
        require(len(spec.configs) > 0, "ladder.max_flops", spec.ladder.max_flops, "leave a run")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return spec


@dataclass(frozen=True, eq=False)
class Ladder:
    """A finished ladder."""

    spec: LadderSpec
    stored: tuple[StoredRun, ...]

    @property
    def flops(self) -> float:
        """6·N·D of all runs."""
        return sum(run.flops for run in self.stored)

    @property
    def runs(self) -> Runs:
        """Every run of every seed, counted in the convention 6N."""
        rows = [(run.config, loss) for run in self.stored for loss in run.losses]
        return Runs(
            n_params=np.array([count_params(c.model) for c, _ in rows], float),
            tokens=np.array([c.tokens for c, _ in rows], float),
            loss=np.array([loss for _, loss in rows]),
        )

    def report(self, target: TrainConfig, law: str | None = None) -> LawReport:
        """The law fitted to the runs, predicting the loss of ``target``.

        Raises ConfigError when ``target`` differs from the runs in more than width, horizon,
        weight decay and warm-up, or the law cannot be fitted to these runs.
        """
        self._check(target)
        law = law or self.spec.ladder.law
        n_params, tokens = float(count_params(target.model)), float(target.tokens)
        at = {"n_params": n_params, "tokens": tokens}
        if tuple(at) not in LAWS[law].predict:
            at = {"flops": 6 * n_params * tokens}
        try:
            return report(law, self.runs, at)
        except ValueError as error:
            raise ConfigError(f"ladder {self.spec.name}: {error}") from error

    def predict(self, target: TrainConfig, law: str | None = None) -> Prediction:
        """The loss expected of one run of ``target``, with its 95 % interval."""
        found = self.report(target, law)
        loss, around = found.predicted["loss"]
        assert around is not None
        cost = self.flops / six_nd(target)
        source = (
            f"{found.law} on {found.runs} runs of ladder {self.spec.name}, "
            f"{100 * cost:.2g} % of the target's FLOPs"
        )
        # Both ends come from draws, which need not lie around the best fit.
        return Prediction(
            loss=loss, low=min(loss, around.low), high=max(loss, around.high), source=source
        )

    def _check(self, target: TrainConfig) -> None:
        """The target must be like the runs but for what the law speaks of (and µTransfer moves)."""
        ours, theirs = comparable(self.spec.config, target), comparable(target, target)
        for name, value in theirs.items():
            if ours[name] != value:
                raise ConfigError(
                    f"ladder {self.spec.name} has {name} = {ours[name]!r}, the target {value!r}: "
                    "its losses say nothing about that; run a ladder like the target"
                )


def comparable(config: TrainConfig, target: TrainConfig) -> dict[str, Any]:
    """What must agree for two losses to lie on one law: ``config`` at the width of ``target``."""
    hparams = {**to_dict(config.hparams), "weight_decay": None}
    schedule = to_dict(config.schedule)
    return {
        "model": to_dict(config.model.widen(target.model.d_model)),
        "data": to_dict(config.data),
        "batch_size": config.batch_size,
        "rule": config.rule,
        "base": to_dict(config.base),
        "hparams": hparams,
        "schedule": {k: v for k, v in schedule.items() if not k.startswith("warmup")},
    }


def run_ladder(spec: LadderSpec | str | Path, folder: Path | str | None = None) -> Ladder:
    """Train the runs that ``folder`` (default: runs/ladders/NAME) lacks; returns all of them.

    An interrupt costs the run in hand; the same call continues with it.
    """
    spec = spec if isinstance(spec, LadderSpec) else load_ladder(spec)
    folder = Path(folder or Path("runs") / "ladders" / spec.name)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(spec.config.data)
    total = sum(map(six_nd, spec.configs))
    stored: list[StoredRun] = []
    with stop_flag() as stop, Progress(f"ladder {spec.name}") as progress:
        for config in spec.configs:
            done = sum(six_nd(run.config) for run in stored)

            def tell(part: float, done: float = done, config: TrainConfig = config) -> None:
                share = (done + part * six_nd(config)) / total
                progress.update(round(1000 * share), 1000, "of the FLOPs")
                stop.check()

            path = folder / f"w{config.model.d_model}-s{config.steps}.json"
            asked = StoredRun.asked(config, spec.ladder.seeds, corpus)
            stored.append(load_or_train(path, asked, corpus, tell))
    return Ladder(spec, tuple(stored))
