"""A sweep's studies in Optuna's own storage: create, open, count, and read the best."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError
from mupgpt.training.device import compute, pick_device
from mupgpt.tuning.samplers import SamplerFactory, make_sampler, sampler_name
from mupgpt.tuning.spec import Cell, SweepSpec, differences, parse_spec
from mupgpt.tuning.storage import close_storage, open_storage, quiet, study_attrs
from mupgpt.tuning.urls import default_url, given_url, journal_file, shown, sqlite_file

__all__ = ["DONE", "Sweep", "cell_of", "earlier_sweep", "finished", "penalized", "trials_of"]


RUNS = Path("runs")


DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Sweep:
    """The studies of one spec in one storage."""

    spec: SweepSpec
    url: str = field(repr=False)
    sampler: SamplerFactory | None = None
    """A sampler of the user's own, instead of the spec's."""

    @classmethod
    def create(
        cls,
        spec: SweepSpec,
        url: str | None = None,
        corpus: dict[str, Any] | None = None,
        sampler: SamplerFactory | None = None,
    ) -> "Sweep":
        """The sweep of ``spec``, created or joined; another spec of the same name is refused.

        ``corpus`` is the fingerprint of what trials from elsewhere saw; by default it is that of
        the spec's own data, on which they are going to be trained here.
        """
        url = given_url(url) or default_url(RUNS / "sweeps" / spec.name)
        sweep = cls(spec, url, sampler)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        fingerprint = corpus or _trainable(spec)
        with quiet():
            for cell in spec.cells:
                sweep._create_study(cell, fingerprint)
        return sweep

    @classmethod
    def open(cls, name: str, url: str | None = None) -> "Sweep":
        """The sweep that was run under ``name`` (or in that folder, or in the storage ``url``)."""
        url = given_url(url)
        folder = Path(name) if (Path(name) / "study.db").is_file() else RUNS / "sweeps" / name
        if url is None and not (folder / "study.db").is_file():
            raise ConfigError(f"no sweep {name!r} here; start it with: mupgpt sweep run {name}")
        by_folder, url = url is None, url or default_url(folder)
        file = sqlite_file(url) or journal_file(url)
        if file and not file.is_file():
            raise ConfigError(f"no sweep {name!r}: there is no file {file}")
        specs = [attrs["spec"] for attrs in study_attrs(url) if "spec" in attrs]
        for raw in specs:
            if raw["name"] in (name, folder.name) or (by_folder and len(specs) == 1):
                return cls(parse_spec(raw, shown(url), stored=True), url)
        raise ConfigError(
            f"no sweep {name!r} in {shown(url)}; `optuna studies` lists what it holds"
        )

    @property
    def folder(self) -> Path:
        """Where this machine keeps what belongs to the sweep: its database, its workers' logs."""
        return RUNS / "sweeps" / self.spec.name

    @cached_property
    def storage(self) -> BaseStorage:
        """The storage, opened once per process; it reads a finished trial only once."""
        return open_storage(self.url, self.spec.study.heartbeat)

    @property
    def is_local(self) -> bool:
        """Whether it is kept in an SQLite file of this machine, as it is by default."""
        return sqlite_file(self.url) is not None

    def close(self) -> None:
        """Close the connections to the database, as a long-lived process does after looking."""
        close_storage(self.storage)

    def study(self, cell: Cell, salt: str = "") -> optuna.Study:
        """The study of ``cell``; a worker that asks gives its sampler a ``salt`` of its own."""
        sampler = make_sampler(self.spec.study, salt, self.sampler)
        return optuna.load_study(study_name=cell.name, storage=self.storage, sampler=sampler)

    def studies(self) -> dict[str, optuna.Study]:
        """Every study by name, in the spec's order."""
        return {cell.name: self.study(cell) for cell in self.spec.cells}

    def counts(self) -> dict[TrialState, int]:
        """Trials in each state over all studies (duplicates and retries given back not counted)."""
        counts = dict.fromkeys(TrialState, 0)
        for cell in self.spec.cells:
            for trial in trials_of(self.storage, cell.name):
                counts[trial.state] += 1
        return counts

    def to_begin(self, cell: Cell) -> int:
        """Trials of a study that wait for a worker: those queued, and what its budget lacks."""
        trials = trials_of(self.storage, cell.name)
        queued = sum(t.state == TrialState.WAITING for t in trials)
        if self.spec.study.sampler == "grid":  # it queues its points itself
            return queued
        return queued + max(0, self.spec.study.trials - len(trials))

    def _create_study(self, cell: Cell, fingerprint: dict[str, Any]) -> None:
        study = optuna.create_study(
            storage=self.storage, study_name=cell.name, direction="minimize", load_if_exists=True
        )
        attrs = study.user_attrs
        if "identity" not in attrs:
            study.set_user_attr("corpus", fingerprint)
            study.set_user_attr("structure", dict(cell.values))
            study.set_user_attr("only", cell.only)
            study.set_user_attr("optuna", optuna.__version__)
            study.set_user_attr("identity", self.spec.identity)
        elif changed := differences(attrs["spec"], self.spec.to_dict()):
            raise ConfigError(
                f"study {cell.name!r} in {shown(self.url)} belongs to another spec ({changed[0]}); "
                "rename this one (name = …), or move the old folder away"
            )
        elif attrs["corpus"] != fingerprint:
            raise ConfigError(
                f"study {cell.name!r} was run on another corpus "
                f"({attrs['corpus']['name']}, sha256 {attrs['corpus']['sha256'][:12]}; now "
                f"{fingerprint['sha256'][:12]}): losses would not compare; use another name"
            )
        study.set_user_attr("spec", self.spec.to_dict())
        if self.sampler is not None:
            study.set_user_attr("sampler", sampler_name(self.sampler))


def earlier_sweep(spec: SweepSpec, url: str | None) -> Sweep:
    """The sweep from which ``spec`` starts warm: in the same database server, or in its folder."""
    is_server = url is not None and sqlite_file(url) is None
    return Sweep.open(spec.study.warm_start, url if is_server else None)


def _trainable(spec: SweepSpec) -> dict[str, Any]:
    """The fingerprint of the spec's data; what a worker would refuse is refused here."""
    corpus = load_corpus(spec.cells[0].config().data)
    for cell in spec.cells:
        config = cell.config()
        corpus.check(config.model.vocab_size, config.model.seq_len)
        compute(config.precision, pick_device())
    return corpus.fingerprint


def trials_of(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """The trials of a study that count: those from the queue, without what was given back."""
    study_id = storage.get_study_id_from_name(name)
    trials = storage.get_all_trials(study_id, deepcopy=False)
    return [t for t in trials if t.state != TrialState.FAIL]


PENALTY = 1.0  # a diverged run counts as ln V + this: finite, since samplers ignore failures


def penalized(loss: float, vocab_size: int) -> float:
    """The loss, or what a diverged run counts as.

    >>> penalized(2.0, 257), round(penalized(math.nan, 257), 3)
    (2.0, 6.549)
    """
    worst = math.log(vocab_size) + PENALTY
    return loss if math.isfinite(loss) and loss < worst else worst


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """COMPLETE trials that did not diverge, best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    healthy = [t for t in trials if not t.user_attrs.get("diverged")]
    return sorted(healthy, key=lambda t: t.value if t.value is not None else math.inf)


def cell_of(study: optuna.Study) -> Cell:
    """The cell whose study this is; ConfigError for a study that mupgpt did not make."""
    attrs = study.user_attrs
    if "spec" not in attrs:
        raise ConfigError(f"study {study.study_name!r} was not made by mupgpt: it carries no spec")
    spec = parse_spec(attrs["spec"], study.study_name, stored=True)
    return Cell(spec, attrs["structure"], attrs.get("only", ""))
