"""The winner of a study, trained again on fresh seeds, and how well its values are known."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError, require
from mupgpt.mutransfer.tuned import Tuned, Uncertainty
from mupgpt.training.population import Population
from mupgpt.tuning.curves import half_width
from mupgpt.tuning.group_size import usual
from mupgpt.tuning.spec import Cell
from mupgpt.tuning.storage import quiet
from mupgpt.tuning.study import Sweep, cell_of, finished, penalized
from mupgpt.util.progress import Progress

__all__ = ["FRESH_SEED", "best_hparams", "importances"]

FRESH_SEED = 1000  # seeds of a confirmation: never those of a sweep
LEAST = 20  # trials below which importances say nothing
COST = 0.005  # relative loss at which a hyperparameter counts as badly set


def best_hparams(study: optuna.Study | str, top: int = 3, seeds: int = 3) -> Tuned:
    """The best trial of ``study`` after its ``top`` were trained again on ``seeds`` fresh seeds.

    ``study`` is what `run_sweep` returned, or the name or folder of a sweep of one study.
    The winner of a sweep owes part of its lead to luck (the winner's curse); the fresh losses do
    not. With two seeds or more, so are the run as it stands, which says what was gained, and the
    winner with each of its searched values halved and doubled, which says how well they are known.
    All of it is kept in the study, so that asking again costs nothing. With ``seeds=0`` nothing is
    trained and the sweep's own losses stand, luck included: the way for imported runs whose text is
    not here. Losses are nats per token. Raises `ConfigError` for a study without a finished trial.

    >>> best_hparams("nowhere")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: no sweep 'nowhere' here; start it with: mupgpt sweep run nowhere
    """
    study = _only_study(study) if isinstance(study, str) else study
    require(top >= 1, "top", top, "be >= 1")
    require(seeds >= 0, "seeds", seeds, "be >= 0 (0: the sweep's own losses stand)")
    cell = cell_of(study)
    spec, attrs = cell.spec, study.user_attrs
    candidates = [t for t in finished(study) if "copied_from" not in t.user_attrs][:top]
    if not candidates:
        raise ConfigError(f"study {cell.name!r} has no finished trial that did not diverge")
    fresh = [t.user_attrs["losses"] for t in candidates]
    if seeds:
        fresh = _fresh_losses(study, cell, [t.params for t in candidates], seeds)
    winner, losses = min(
        zip(candidates, fresh, strict=True), key=lambda pair: statistics.fmean(pair[1])
    )
    space = cell.search_space.dimensions
    return Tuned(
        config=cell.config(winner.params, spec.study.seeds[0]),
        study=cell.name,
        trial=winner.number,
        loss=statistics.fmean(losses),
        spread=statistics.stdev(losses) if len(losses) > 1 else 0.0,
        swept_loss=winner.value or math.nan,
        edges={key: edge for key, d in space.items() if (edge := d.at_edge(winner.params[key]))},
        uncertainty=_uncertainties(study, cell, winner, losses) if seeds > 1 else {},
        gain=_gain(study, cell, winner, losses) if seeds > 1 else None,
        corpus=attrs["corpus"],
        confirmed=seeds > 0,
    )


def _only_study(name: str) -> optuna.Study:
    studies = Sweep.open(name).studies()
    if len(studies) > 1:
        raise ConfigError(
            f"sweep {name!r} has {len(studies)} studies: give one of run_sweep({name!r}), "
            f"by name: {', '.join(studies)}"
        )
    return next(iter(studies.values()))


def importances(study: optuna.Study) -> dict[str, float]:
    """Searched key → its share of what makes a trial one of the best tenth; the shares sum to 1.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) as Optuna has it: it goes by ranks, so that
    a diverged trial's penalty counts as bad and no more. Raises ConfigError for fewer than 20
    finished trials, two of which would be that tenth.
    """
    count = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if count < LEAST:
        raise ConfigError(
            f"study {study.study_name!r} has {count} finished trials: importances need {LEAST}"
        )
    with quiet():
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def _gain(
    study: optuna.Study, cell: Cell, winner: FrozenTrial, losses: Sequence[float]
) -> tuple[float, float] | None:
    """What the winner gains on the run as it stands, seed by seed; None if that is the winner."""
    stands = cell.own()
    if stands == winner.params:
        return None
    paired = np.subtract(_fresh_losses(study, cell, [stands], len(losses))[0], losses)
    return float(paired.mean()), half_width(paired.tolist())


def _uncertainties(
    study: optuna.Study, cell: Cell, winner: FrozenTrial, losses: Sequence[float]
) -> dict[str, Uncertainty]:
    """How well each searched value on a log range is known, by key."""
    keys = [key for key, d in cell.search_space.dimensions.items() if d.log and not d.values]
    moved = [
        {**winner.params, key: winner.params[key] * 2.0**step} for key in keys for step in (-1, 1)
    ]
    fresh = _fresh_losses(study, cell, moved, len(losses))
    return {
        key: _uncertainty(np.array([fresh[2 * i], losses, fresh[2 * i + 1]]))
        for i, key in enumerate(keys)
    }


def _uncertainty(losses: np.ndarray) -> Uncertainty:
    """From the losses at half, once and twice the value, (3, seeds).

    >>> u = _uncertainty(np.array([[2.1, 2.2], [2.0, 2.1], [2.1, 2.2]]))
    >>> round(u.best, 6), round(u.factor, 6), round(u.harmless, 3)
    (1.0, 1.0, 1.248)
    """
    x = np.array([-1.0, 0.0, 1.0])
    a, b, _ = np.polyfit(x, losses, 2)  # (seeds,) each
    bend = float(a.mean())
    seen = bool((a > 0).all() and (np.abs(b) <= 2 * a).all())
    optima = -b / (2 * a) if seen else np.array([math.nan])
    return Uncertainty(
        best=2.0 ** float(optima.mean()) if seen else None,
        factor=2.0 ** half_width(optima.tolist()) if seen else None,
        harmless=2.0 ** math.sqrt(COST * losses[1].mean() / bend) if bend > 0 else None,
    )


def _fresh_losses(
    study: optuna.Study, cell: Cell, params: Sequence[Mapping[str, float]], seeds: int
) -> list[list[float]]:
    """Losses of each set of values on the first ``seeds`` fresh seeds, trained where not known."""
    keys = [json.dumps(dict(p), sort_keys=True) for p in params]
    known: dict[str, list[float]] = dict(study.user_attrs.get("confirmed", {}))
    distinct = dict(zip(keys, params, strict=True))
    missing = [p for key, p in distinct.items() if len(known.get(key, [])) < seeds]
    if missing:
        fresh = [FRESH_SEED + i for i in range(seeds)]
        losses = _train(study, [cell.config(p, seed) for p in missing for seed in fresh])
        for i, p in enumerate(missing):
            known[json.dumps(dict(p), sort_keys=True)] = losses[i * seeds : (i + 1) * seeds]
        study.set_user_attr("confirmed", known)
    return [known[key][:seeds] for key in keys]


def _train(study: optuna.Study, configs: Sequence[TrainConfig]) -> list[float]:
    """Final held-out losses of the runs, in populations as large as a worker's."""
    corpus = load_corpus(configs[0].data)
    if corpus.fingerprint != study.user_attrs["corpus"]:
        raise ConfigError(
            f"study {study.study_name!r} was run on another corpus ({study.user_attrs['corpus']}): "
            "its best trials cannot be confirmed on this one; run the sweep here first, or take "
            "its own losses as they are (seeds = 0)"
        )
    together = usual(configs[0])
    losses: list[float] = []
    with Progress(f"confirm {study.study_name}") as progress:
        for first in range(0, len(configs), together):
            group = configs[first : first + together]
            population = Population(group, corpus)
            for step in range(configs[0].steps):
                population.train(step + 1)
                done = len(losses) * configs[0].steps + len(group) * (step + 1)
                progress.update(done, len(configs) * configs[0].steps, "steps")
            losses += population.evaluate().values()
    return [penalized(loss, configs[0].model.vocab_size) for loss in losses]
