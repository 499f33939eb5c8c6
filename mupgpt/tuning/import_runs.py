"""Somebody's finished sweep, exported as a table, as a study of ours.

A spec says what was trained and searched; each row of the table is a run, and becomes a trial of
the form that a worker tells (rows that differ in their seed alone are one trial). Nothing is
trained. Nothing is stored unless every row fits.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, create_trial

from mupgpt.config.plain import to_dict
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.tuning.foreign_tables import LOSS, SEED, STATE, Table, find_column, leaves, read_rows
from mupgpt.tuning.space import Dimension
from mupgpt.tuning.spec import Cell, SweepSpec, load_spec
from mupgpt.tuning.study import Sweep, trials_of
from mupgpt.tuning.trial_group import outcome
from mupgpt.tuning.urls import shown

__all__ = ["Imported", "import_sweep"]

FINISHED = ("finished", "complete")
CHECKED = ("model", "base", "rule", "hparams", "schedule", "batch_size", "steps", "grad_clip")
UNKNOWN = {"name": "unknown", "bytes": 0, "sha256": "unknown", "tokenizer": "unknown"}
CORPUS = tuple(f"corpus.{key}" for key in UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a table has become."""

    sweep: Sweep
    rows: int
    trials: int
    """Trials that the table holds."""
    new: int
    """Those that were not in the study yet."""
    columns: Mapping[str, str]
    """Key → the column that it was read from."""
    notes: tuple[str, ...] = ()
    """What the table leaves open and how it was read, and what did not count."""

    def __str__(self) -> str:
        spec = self.sweep.spec
        lines = [
            f"sweep {spec.name}: {self.rows} rows are {self.trials} trials in {len(spec.cells)} "
            f"studies ({self.new} new), in {shown(self.sweep.url)}",
            "read " + ", ".join(f"{key} from {name!r}" for key, name in self.columns.items()),
        ]
        return "\n".join(lines + [f"note: {line}" for line in self.notes])


def import_sweep(
    file: Path | str,
    spec: str | Path | SweepSpec,
    columns: Mapping[str, str] | None = None,
    storage: str | None = None,
) -> Imported:
    """The runs in ``file`` as trials of ``spec``'s studies; importing again adds what is new.

    ``columns`` maps a key (``hparams.lr``, ``model.d_model``, ``loss``, ``seed``) to the name of
    its column, where that is neither the key nor an obvious alias. Losses are nats per token; one
    that is not finite is a diverged run. Raises ConfigError for a column that is missing or
    ambiguous, a row that no study of the spec could have had, and seeds that are not complete.
    """
    spec, rows = load_spec(spec), read_rows(Path(file))
    table = Table(Path(file).name, rows, _match(rows, spec, columns or {}))
    places = _finished(table)
    trials = _trials(table, places, spec)
    sweep = Sweep.create(spec, storage, corpus=_corpus(table))
    new = {cell.name: list(_new(sweep, cell, trials[cell.name])) for cell in spec.cells}
    for name, study in sweep.studies().items():
        study.add_trials(new[name])
    return Imported(
        sweep=sweep,
        rows=len(rows),
        trials=sum(map(len, trials.values())),
        new=sum(map(len, new.values())),
        columns=table.columns,
        notes=(*_assumed(table, spec), *_left(len(rows) - len(places), trials)),
    )


def _match(
    rows: Sequence[Mapping[str, Any]], spec: SweepSpec, given: Mapping[str, str]
) -> dict[str, str]:
    """Key → column, for what the spec needs and for what else the table says about it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    needed = [key for key, values in spec.structure.items() if len(values) > 1]
    needed += [*spec.space, LOSS]
    loose = (*needed, SEED, STATE)
    known = dict.fromkeys([*loose, *CORPUS, *_settings(spec.cells[0])])
    for key, name in given.items():
        if key not in known:
            raise ConfigError(f"--columns {key}={name}: {unknown('key', key, known)}")
        if name not in names:
            raise ConfigError(f"--columns {key}={name}: {unknown('column', name, names)}")
    found = {key: given.get(key) or find_column(key, names, key in loose) for key in known}
    if missing := [key for key in needed if not found[key]]:
        raise ConfigError(
            f"no column for {', '.join(missing)} among {', '.join(names)}; map them: "
            f"--columns {' '.join(f'{key}=NAME' for key in missing)}"
        )
    return {key: name for key, name in found.items() if name}


def _settings(cell: Cell) -> dict[str, Any]:
    """What decides a run of ``cell``, by dotted key: a table's row must not contradict it."""
    config = to_dict(cell.config())
    return dict(leaves({key: config[key] for key in CHECKED})) | dict(cell.values)


def _finished(table: Table) -> list[int]:
    """Places of the rows that count: runs that finished, and runs that diverged."""
    kept = []
    for place in range(len(table.rows)):
        finished = str(table.get(place, STATE) or FINISHED[0]).lower() in FINISHED
        if table.get(place, LOSS) is None:
            remedy = "be there; take the row out, or write nan if the run diverged"
            require(not finished, f"{table.where(place)}: loss", "", remedy)
        elif finished or not math.isfinite(table.number(place, LOSS)):
            kept.append(place)
    return kept


def _trials(table: Table, places: Iterable[int], spec: SweepSpec) -> dict[str, list[FrozenTrial]]:
    """The trials of each study, by its name."""
    settings = {cell.name: _settings(cell) for cell in spec.cells}
    losses: dict[str, dict[tuple[float, ...], dict[int, float]]]
    losses = {cell.name: {} for cell in spec.cells}
    for place in places:
        for cell in _cells(table, place, spec, settings):
            space = cell.search_space.dimensions
            point = tuple(_value(table, place, key, d) for key, d in space.items())
            by_seed = losses[cell.name].setdefault(point, {})
            seed = _seed(table, place, spec, len(by_seed))
            if seed in by_seed:
                raise ConfigError(
                    f"{table.where(place)}: {_shown(space, point)} with seed {seed} is there "
                    "twice; keep one of them"
                )
            by_seed[seed] = table.number(place, LOSS)
    return {
        cell.name: [_trial(table, cell, *item) for item in losses[cell.name].items()]
        for cell in spec.cells
    }


def _cells(
    table: Table, place: int, spec: SweepSpec, settings: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """The studies that the row's run belongs to, or an error that says what keeps it out."""
    odd = {
        cell.name: [
            key
            for key, value in settings[cell.name].items()
            if key not in cell.search_space.dimensions and not _agrees(table.get(place, key), value)
        ]
        for cell in spec.cells
    }
    fits = [cell for cell in spec.cells if not odd[cell.name]]
    if not fits:
        nearest = min(odd, key=lambda name: len(odd[name]))
        key = odd[nearest][0]
        expected = spec.structure.get(key, [settings[nearest][key]])
        raise ConfigError(
            f"{table.where(place)}: {key} is {table.get(place, key)!r}, and in the spec "
            f"{' or '.join(map(str, expected))}; take the row out, change the spec, or "
            "rename a column that means something else"
        )
    return fits


def _agrees(there: Any, here: Any) -> bool:
    """Whether a table's value is the config's; an empty one says nothing.

    >>> _agrees("64.0", 64), _agrees("True", True), _agrees("mup", "sp"), _agrees(None, 64)
    (True, True, False, True)
    """
    if there is None or str(there).lower() == str(here).lower():
        return True
    try:
        return math.isclose(float(there), float(here), rel_tol=1e-6)
    except (TypeError, ValueError):
        return False


def _value(table: Table, place: int, key: str, dimension: Dimension) -> float:
    """The row's value of a searched key, which must lie in its range."""
    value, name = table.number(place, key), f"{table.where(place)}: {key}"
    if dimension.values:
        near = min(dimension.values, key=lambda v: abs(v - value))
        require(_agrees(value, near), name, value, f"be one of {dimension.values}; widen [space]")
        return near
    bounds = f"lie in [{dimension.low:g}, {dimension.high:g}]; widen [space]"
    require(dimension.low <= value <= dimension.high, name, value, bounds)
    return value


def _seed(table: Table, place: int, spec: SweepSpec, known: int) -> int:
    """The row's seed; without such a column, the spec's in the order of equal rows."""
    seeds = spec.study.seeds
    if SEED in table.columns:
        seed = table.number(place, SEED)
        among = f"be one of study.seeds {seeds}"
        require(seed in seeds, f"{table.where(place)}: seed", seed, among)
        return int(seed)
    if known == len(seeds):
        raise ConfigError(
            f"{table.where(place)}: this run is there {known + 1} times, study.seeds has {known}, "
            f"and no column tells seeds apart; map one (--columns {SEED}=NAME) or extend the spec"
        )
    return seeds[known]


def _trial(
    table: Table, cell: Cell, point: tuple[float, ...], by_seed: Mapping[int, float]
) -> FrozenTrial:
    """The finished trial as a worker tells it."""
    seeds, space = cell.spec.study.seeds, cell.search_space
    if lacking := [seed for seed in seeds if seed not in by_seed]:
        raise ConfigError(
            f"{table.name}: {_shown(space.dimensions, point)} in {cell.name} lacks seed "
            f"{', '.join(map(str, lacking))} of study.seeds; all points need the same seeds"
        )
    value, attrs = outcome([by_seed[s] for s in seeds], cell.config().model.vocab_size)
    return create_trial(
        params=dict(zip(space.dimensions, point, strict=True)),
        distributions=space.distributions,
        value=value,
        user_attrs={"queued": True, "imported": table.name, **attrs},
        constraints={"diverged": float(attrs["diverged"])},
    )


def _shown(names: Iterable[str], point: Iterable[float]) -> str:
    return ", ".join(f"{key} = {value:g}" for key, value in zip(names, point, strict=True))


def _left(rows: int, trials: Mapping[str, Sequence[FrozenTrial]]) -> Iterator[str]:
    """Rows that did not count, and studies that stay empty."""
    if rows:
        yield f"{rows} rows count for nothing: their runs did not finish"
    if empty := [name for name, found in trials.items() if not found]:
        yield f"{len(empty)} studies stay empty: no row is of {', '.join(empty)}"


def _assumed(table: Table, spec: SweepSpec) -> Iterator[str]:
    """What the table leaves open, and how it was read."""
    for key, values in spec.structure.items():
        if key not in table.columns:
            yield f"{key} is taken as {values[0]}, the spec's only one"
    if SEED not in table.columns:
        seeds = ", ".join(map(str, spec.study.seeds))
        yield f"seeds are taken as {seeds}, in the order of rows with equal values"
    if "corpus.sha256" not in table.columns:
        yield (
            "the corpus is unknown (no column corpus.sha256): these losses compare with no others, "
            "and none is confirmed by training (sweep best and transfer: --seeds 0)"
        )


def _corpus(table: Table) -> dict[str, Any]:
    """The fingerprint of the text that all runs saw; `UNKNOWN` where the table has none."""
    if "corpus.sha256" not in table.columns:
        return UNKNOWN
    found = [
        {key: table.get(place, f"corpus.{key}") or UNKNOWN[key] for key in UNKNOWN}
        for place in range(len(table.rows))
    ]
    for place, corpus in enumerate(found):
        if corpus != found[0]:
            raise ConfigError(
                f"{table.where(place)}: its corpus is {corpus}, that of row 1 {found[0]}; losses "
                "on different text do not compare"
            )
    return {**found[0], "bytes": int(float(found[0]["bytes"]))}


def _new(sweep: Sweep, cell: Cell, trials: Iterable[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Those trials that the study lacks; one that it has with other losses is an error."""
    known = {_key(t): t.user_attrs.get("losses") for t in trials_of(sweep.storage, cell.name)}
    for trial in trials:
        losses = trial.user_attrs["losses"]
        if known.get(_key(trial), losses) != losses:
            raise ConfigError(
                f"study {cell.name!r} has {_shown(trial.params, trial.params.values())} with the "
                f"losses {known[_key(trial)]}, the table with {losses}; import it under another "
                "name (name = … in the spec)"
            )
        if _key(trial) not in known:
            yield trial


def _key(trial: FrozenTrial) -> str:
    return json.dumps(trial.params, sort_keys=True)
