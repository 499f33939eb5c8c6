"""A ladder: small µP runs over width and horizon, and what they say the target will reach.

Under µP every rung trains with the target's hyperparameters, so the rungs are points on the
target's own scaling law. A rung is one population (its seeds side by side); when it is finished it
is one JSON file, and what is on disk is not trained again.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import Prediction, TrackingConfig, TrainConfig
from mupgpt.data.corpus import Corpus, load_corpus
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.mutransfer.bridge import with_lr
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.rules import get_rule
from mupgpt.planning.flops import run_flops
from mupgpt.resolve import train_config
from mupgpt.scaling.named import LAWS
from mupgpt.scaling.report import LawReport, report
from mupgpt.scaling.runs import Runs
from mupgpt.training.population import Population
from mupgpt.util.bundled import find_bundled
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import stop_flag

__all__ = ["Ladder", "LadderSpec", "Rung", "load_ladder", "run_ladder", "run_one"]

LAWS_OF_LOSS = ("chinchilla", "overtraining", "power", "compute")
STEPS_AT_ONCE = 20  # between two updates of the progress line


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Which runs make the ladder, and the law that is fitted to them."""

    widths: tuple[int, ...]
    """Values of d_model; d_head and the ratio of the FFN stay."""
    steps: tuple[int, ...]
    """Horizons, each with its own schedule."""
    seeds: tuple[int, ...] = (0,)
    """Each rung trains once per seed."""
    max_flops: float = 0.0
    """Leave out rungs dearer than this, 6·N·D of one run (0: none): wide ones stay short."""
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
    ladder: Rungs
    """The rungs."""
    train: dict[str, Any] = field(default_factory=dict)
    """The run that every rung is, but for width, horizon and seed."""

    @property
    def config(self) -> TrainConfig:
        """The run that the rungs vary."""
        return train_config(self.train)

    @property
    def configs(self) -> list[TrainConfig]:
        """One run per rung, cheapest first."""
        plan = self.ladder
        made = [_rung(self.config, *pair) for pair in itertools.product(plan.widths, plan.steps)]
        kept = [c for c in made if not plan.max_flops or six_nd(c) <= plan.max_flops]
        return sorted(kept, key=six_nd)

    def like(self, target: TrainConfig) -> "LadderSpec":
        """These widths and horizons with everything else as ``target`` has it."""
        given = dataclasses.replace(
            target, prediction=Prediction(), tracking=TrackingConfig(), seed=0
        )
        return dataclasses.replace(self, train=to_dict(given))


def _rung(stem: TrainConfig, width: int, steps: int) -> TrainConfig:
    """``stem`` at another width and horizon; decay keeps lr·λ·steps where the rule does so."""
    moved = stem.steps / steps if get_rule(stem.rule).keeps_decay_time else 1.0
    decay = stem.hparams.weight_decay * moved
    hparams = dataclasses.replace(stem.hparams, weight_decay=decay)
    return dataclasses.replace(stem, model=stem.model.widen(width), steps=steps, hparams=hparams)


def six_nd(config: TrainConfig) -> float:
    """Training FLOPs of a run as laws in N and D count them."""
    return run_flops(config, convention="6N-stored")


def load_ladder(name: str | Path) -> LadderSpec:
    """The ladder of that name (shipped) or file, every rung's config resolved.

    >>> [(c.model.d_model, c.steps) for c in load_ladder("ladder").configs][:2]
    [(32, 400), (32, 800)]
    """
    path = find_bundled(str(name))
    try:
        spec = from_dict(LadderSpec, {"name": path.stem, **load_toml(path)})
        require(len(spec.configs) > 0, "ladder.max_flops", spec.ladder.max_flops, "leave a rung")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return spec


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One finished rung."""

    config: TrainConfig
    seeds: tuple[int, ...]
    lr_factors: tuple[float, ...] = (1.0,)
    """What the learning rate is multiplied by, each on every seed."""
    losses: tuple[float, ...]
    """Final held-out loss of each run, nats per token: factor by factor, seed by seed."""
    corpus: dict[str, Any]
    """Fingerprint of the text."""
    seconds: float

    @property
    def flops(self) -> float:
        """6·N·D of all its runs."""
        return six_nd(self.config) * len(self.losses)


@dataclass(frozen=True, eq=False)
class Ladder:
    """A finished ladder."""

    spec: LadderSpec
    rungs: tuple[Rung, ...]

    @property
    def flops(self) -> float:
        """6·N·D of all runs."""
        return sum(rung.flops for rung in self.rungs)

    @property
    def runs(self) -> Runs:
        """Every run of every seed, counted in the convention 6N."""
        rows = [(rung.config, loss) for rung in self.rungs for loss in rung.losses]
        return Runs(
            n_params=np.array([count_params(c.model) for c, _ in rows], float),
            tokens=np.array([c.tokens for c, _ in rows], float),
            loss=np.array([loss for _, loss in rows]),
        )

    def report(self, target: TrainConfig, law: str | None = None) -> LawReport:
        """The law fitted to the rungs, predicting the loss of ``target``.

        Raises ConfigError when ``target`` differs from the rungs in more than width, horizon,
        weight decay and warm-up, or the law cannot be fitted to these rungs.
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
        """The target must be a rung but for what the law speaks of (and µTransfer moves)."""
        rung, mine = comparable(self.spec.config, target), comparable(target, target)
        for name, value in mine.items():
            if rung[name] != value:
                raise ConfigError(
                    f"ladder {self.spec.name} has {name} = {rung[name]!r}, the target {value!r}: "
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
    """Train the rungs that ``folder`` (default: runs/ladders/NAME) lacks; returns all of them.

    An interrupt costs the rung in hand; the same call continues with it.
    """
    spec = spec if isinstance(spec, LadderSpec) else load_ladder(spec)
    folder = Path(folder or Path("runs") / "ladders" / spec.name)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(spec.config.data)
    total = sum(map(six_nd, spec.configs))
    rungs: list[Rung] = []
    with stop_flag() as stop, Progress(f"ladder {spec.name}") as progress:
        for config in spec.configs:
            done = sum(six_nd(rung.config) for rung in rungs)

            def tell(part: float, done: float = done, config: TrainConfig = config) -> None:
                share = (done + part * six_nd(config)) / total
                progress.update(round(1000 * share), 1000, "of the FLOPs")
                stop.check()

            path = folder / f"w{config.model.d_model}-s{config.steps}.json"
            rungs.append(run_one(path, config, spec.ladder.seeds, corpus, tell))
    return Ladder(spec, tuple(rungs))


def run_one(
    path: Path,
    config: TrainConfig,
    seeds: Sequence[int],
    corpus: Corpus,
    tell: Callable[[float], None],
    lr_factors: Sequence[float] = (1.0,),
) -> Rung:
    """The rung in the file ``path``; one that is not there, or another one, is trained first.

    ``tell`` hears which part of it is done, between steps: it may raise KeyboardInterrupt.
    """
    asked = Rung(
        config=config,
        seeds=tuple(seeds),
        lr_factors=tuple(lr_factors),
        losses=(),
        corpus=corpus.fingerprint,
        seconds=0.0,
    )
    return _stored(path, asked) or _train(path, asked, corpus, tell)


def _stored(path: Path, asked: Rung) -> Rung | None:
    """The rung on disk, when it is the one (what it recorded on its way does not matter)."""
    if not path.is_file():
        return None
    rung = from_dict(Rung, load_toml(path))
    config = dataclasses.replace(rung.config, tracking=asked.config.tracking)
    same = dataclasses.replace(rung, config=config, losses=(), seconds=0.0) == asked
    return rung if same else None


def _train(path: Path, asked: Rung, corpus: Corpus, tell: Callable[[float], None]) -> Rung:
    """Train one rung and write it."""
    start, steps = time.monotonic(), asked.config.steps
    runs = [
        dataclasses.replace(with_lr(asked.config, factor), seed=seed)
        for factor in asked.lr_factors
        for seed in asked.seeds
    ]
    population = Population(runs, corpus)
    while population.step < steps:
        population.train(population.step + STEPS_AT_ONCE)
        tell(population.step / steps)
    losses = tuple(population.evaluate().values())
    seconds = round(time.monotonic() - start, 2)
    rung = dataclasses.replace(asked, losses=losses, seconds=seconds)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(to_dict(rung), indent=1), encoding="utf-8")
    whole.replace(path)
    return rung
