"""The runs that a fidelity verdict rests on: which trials, at which widths, trained and kept."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import Corpus, load_corpus
from mupgpt.errors import ConfigError, require
from mupgpt.evidence.fidelity import Fidelity, judge_fidelity
from mupgpt.mutransfer.transfer import transfer
from mupgpt.parametrization.axes import AXES
from mupgpt.planning.flops import run_flops
from mupgpt.training.population import Population
from mupgpt.tuning.best import FRESH_SEED
from mupgpt.tuning.group_size import usual
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.study import cell_of, finished, penalized
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import stop_flag
from mupgpt.util.text import several

__all__ = ["FidelityPlan", "plan_fidelity", "run_fidelity"]


@dataclass(frozen=True, kw_only=True)
class FidelityPlan:
    """Trials of a sweep and the widths at which they are trained again."""

    cell: Cell
    target: TrainConfig
    params: tuple[Mapping[str, float], ...]
    """The sweep's winner first."""
    swept: tuple[float, ...]
    widths: tuple[int, ...]
    """The proxy's first."""
    seeds: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Of all runs together."""
        return sum(_cost(self.cell, w) for w in self.widths) * len(self.params) * len(self.seeds)

    @property
    def share(self) -> float:
        """Of the target's training FLOPs."""
        return self.flops / run_flops(self.target, self.target.steps)

    def configs(self, width: int) -> list[TrainConfig]:
        """The runs at one width: every configuration on every seed, in that order."""
        return [
            _at(self.cell.config(params, seed), width)
            for params in self.params
            for seed in self.seeds
        ]

    def __str__(self) -> str:
        runs = len(self.params) * len(self.seeds)
        return (
            f"{self.cell.name}: {len(self.params)} configurations on "
            f"{several(len(self.seeds), 'seed')} at "
            f"widths {', '.join(map(str, self.widths))}: {runs * len(self.widths)} runs, "
            f"{100 * self.share:.3g} % of the target's FLOPs"
        )


def _at(config: TrainConfig, width: int) -> TrainConfig:
    return replace(config, model=config.model.widen(width))


def _cost(cell: Cell, width: int) -> float:
    run = _at(cell.config(), width)
    return run_flops(run, run.steps)


def plan_fidelity(
    study: optuna.Study,
    to: str | Mapping[str, Any],
    widths: Sequence[int] = (),
    configs: int = 24,
    share: float = 0.1,
    seeds: int = 2,
) -> FidelityPlan:
    """Which trials of a finished ``study`` are trained again, and where.

    ``configs`` trials are taken evenly by rank, the winner among them; ``widths`` are by default
    the proxy's, doubled as long as all runs take at most ``share`` of the target's training FLOPs,
    and end with the target's. Runs keep the proxy's depth, batch and steps: it is the width over
    which ranks are compared. Raises ConfigError where no width above the proxy's is affordable.

    >>> plan_fidelity(optuna.create_study(), "proxy-256")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: study 'no-name-...' was not made by mupgpt: it carries no spec
    """
    require(share > 0, "share", share, "be > 0")
    require(seeds >= 1, "seeds", seeds, "be >= 1")
    cell = cell_of(study)
    trials = _stratified(finished(study), configs)
    own = cell.config().model
    target = transfer(cell.config(trials[0].params), to, accept=AXES).config
    plan = FidelityPlan(
        cell=cell,
        target=target,
        params=tuple(t.params for t in trials),
        swept=tuple(t.value or math.nan for t in trials),
        widths=(own.d_model, *widths),
        seeds=tuple(FRESH_SEED + i for i in range(seeds)),
    )
    if widths:
        require(min(widths) > own.d_model, "widths", list(widths), f"lie above {own.d_model}")
        return replace(plan, widths=(own.d_model, *sorted(set(widths))))
    for width in _doubled(own.d_model, target.model.d_model):
        wider = replace(plan, widths=(*plan.widths, width))
        if wider.share > share:
            break
        plan = wider
    if len(plan.widths) < 2:
        wider = replace(plan, widths=(own.d_model, 2 * own.d_model))
        raise ConfigError(
            f"share = {share}: {configs} configurations at width {2 * own.d_model} alone take "
            f"{wider.share:.2g} of the target's FLOPs; allow more, or take fewer configurations"
        )
    return plan


def _doubled(width: int, target: int) -> list[int]:
    """Doublings above ``width`` below the target's, and the target's.

    >>> _doubled(32, 256), _doubled(256, 640)
    ([64, 128, 256], [512, 640])
    """
    count = math.ceil(math.log2(max(target, width) / width)) if target > width else 0
    return [*(width * 2**i for i in range(1, count)), target][: count or None] if count else []


def _stratified(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """``count`` of the trials (best first), a third of them from each third; the winner first.

    Inside a third they are spread evenly. Of equal values one is taken.
    """
    require(count >= 6, "configs", count, "be at least 6: ranks of fewer say nothing")
    unique = list({tuple(sorted(t.params.items())): t for t in reversed(trials)}.values())[::-1]
    if len(unique) < count:
        raise ConfigError(
            f"configs = {count}: the sweep has {len(unique)} finished trials of different values; "
            "take fewer, or give it a larger budget"
        )
    places = np.unique(np.linspace(0, len(unique) - 1, count).round().astype(int))
    return [unique[i] for i in places]


def run_fidelity(plan: FidelityPlan, folder: Path | str, proxy_again: bool = True) -> Fidelity:
    """Train what ``folder`` lacks of the plan's runs, and judge them.

    Each width is a file, written group by group: the same call goes on after an interrupt, which
    raises KeyboardInterrupt between two steps. Without ``proxy_again`` the proxy's own width is not
    trained again: its losses are those that the sweep saw, luck included.

    >>> import tempfile
    >>> from mupgpt import SweepSpec, run_sweep
    >>> from mupgpt.tuning.space import Dimension
    >>> from mupgpt.tuning.spec import StudyConfig
    >>> model = {"n_layer": 1, "d_model": 8, "d_head": 8, "vocab_size": 257, "seq_len": 16}
    >>> train = {"model": model, "steps": 2, "batch_size": 2,
    ...          "data": {"source": "package:json", "eval_tokens": 64}}
    >>> spec = SweepSpec(name="mine", train=train, study=StudyConfig(trials=6, seeds=(0,)),
    ...                  space={"hparams.lr": Dimension(low=1e-3, high=1e-1, log=True)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     study = run_sweep(spec, workers=1, storage=f"sqlite:///{folder}/study.db")
    ...     wide = {**train, "model": {**model, "d_model": 32}}
    ...     plan = plan_fidelity(study, wide, widths=[16], configs=6)
    ...     found = run_fidelity(plan, folder)
    >>> found.losses.shape
    (2, 6, 2)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(plan.cell.config().data)
    swept = np.array(plan.swept)
    widths = plan.widths if proxy_again else plan.widths[1:]
    costs = [_cost(plan.cell, width) for width in widths]
    with stop_flag() as stop, Progress(f"fidelity {plan.cell.name}") as progress:

        def tell(place: int, part: float) -> None:
            done = (sum(costs[:place]) + part * costs[place]) / sum(costs)
            progress.update(round(1000 * done), 1000, "of the FLOPs")
            stop.check()

        trained = [
            _width(folder / f"w{width}.json", plan.configs(width), corpus, partial(tell, place))
            for place, width in enumerate(widths)
        ]
    shape = (len(plan.params), len(plan.seeds))
    losses = [np.array(losses).reshape(shape) for losses in trained]
    if not proxy_again:
        losses.insert(0, np.repeat(swept[:, None], shape[1], axis=1))
    target = plan.target.model.d_model
    pair = (swept, np.array(losses))
    return judge_fidelity(plan.cell.name, plan.widths, target, plan.params, pair)


def _width(
    path: Path, runs: Sequence[TrainConfig], corpus: Corpus, tell: Callable[[float], None]
) -> list[float]:
    """The losses of ``runs``: read from ``path`` as far as they are there, else trained."""
    asked = {"runs": [_identity(run) for run in runs], "corpus": corpus.fingerprint}
    losses = _known(path, asked)
    together = usual(runs[0])
    while len(losses) < len(runs):
        group = runs[len(losses) : len(losses) + together]
        population = Population(group, corpus)
        while population.step < group[0].steps:
            population.train(population.step + 1)
            done = len(losses) + len(group) * population.step / group[0].steps
            tell(done / len(runs))
        vocab = group[0].model.vocab_size
        losses += [penalized(loss, vocab) for loss in population.evaluate().values()]
        _write(path, {**asked, "losses": losses})
    return losses


def _identity(run: TrainConfig) -> dict[str, Any]:
    """All of a run that decides its loss."""
    return {k: v for k, v in to_dict(run).items() if k not in ("tracking", "prediction")}


def _known(path: Path, asked: Mapping[str, Any]) -> list[float]:
    """The losses in ``path``, when they are of the runs that are asked for."""
    if not path.is_file():
        return []
    stored = load_toml(path)
    losses = stored.get("losses")
    same = all(stored.get(key) == value for key, value in asked.items())
    return list(losses) if same and isinstance(losses, list) else []


def _write(path: Path, data: Mapping[str, Any]) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(data), encoding="utf-8")
    whole.replace(path)
