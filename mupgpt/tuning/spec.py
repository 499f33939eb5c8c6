"""A sweep as data: what is trained, what is searched, and how much of it."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mupgpt.config.fields import SEED, decided, decides, differing
from mupgpt.config.plain import from_dict, load_toml, settle, to_dict
from mupgpt.config.schema import HParams, TrainConfig
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.rules import get_rule
from mupgpt.resolve import overlay, train_config
from mupgpt.tuning.space import Dimension, SearchSpace
from mupgpt.util.bundled import find_bundled

__all__ = ["Cell", "StudyConfig", "SweepSpec", "differences", "load_spec", "parse_spec"]


RENAMED = {"columns": "members"}
"""Keys of `StudyConfig` as they once were, in files and in studies, → as they are."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How a sweep searches."""

    sampler: Literal["tpe", "gp", "carbs", "qmc", "random", "grid"] = field(
        default="tpe", metadata=decides("result")
    )
    """Optuna's sampler; ``grid`` starts around the run's own values and extends itself."""
    trials: int = field(default=32, metadata=decides("execution", above=0, high=10**6))
    """Trials of each study: an exact budget (for ``grid``, an upper bound)."""
    seeds: tuple[int, ...] = field(default=(0,), metadata=decides("result", 0, SEED))
    """Every trial trains once per seed; all trials share initializations and data."""
    rungs: int = field(default=0, metadata=decides("result", 0, 30))
    """How many times a trial may be stopped early (0: never)."""
    pruner: Literal["halving", "hyperband", "median"] = field(
        default="halving", metadata=decides("result")
    )
    """Who passes a rung: the best 1/reduction, the same per Hyperband bracket, the better half."""
    reduction: int = field(default=3, metadata=decides("result", 2, 1000))
    """Factor between the steps of two rungs, and of their trials under halving."""
    warm_start: str = field(default="", metadata=decides("result"))
    """A sweep whose best trials are tried first, where they lie inside the space."""
    warm_top: int = field(default=3, metadata=decides("result", 1, 10**6))
    """How many of each of its studies."""
    each: bool = field(default=False, metadata=decides("result"))
    """Search every dimension alone, in a study of its own, the others at the run's own values."""
    members: int = field(default=0, metadata=decides("execution", 0, 10**6))
    """Runs that train as one population (0: as memory allows and a short timing finds)."""
    sampler_seed: int = field(default=0, metadata=decides("result", 0, 2**32 - 1))
    """Seed of the sampler."""
    heartbeat: int = field(default=10, metadata=decides("execution", 1, 86_400))
    """Seconds between two signs of life of a worker; six missed ones free its trials."""

    def __post_init__(self) -> None:
        settle(self, "study")
        require(len(self.seeds) > 0, "study.seeds", self.seeds, "name at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "study.seeds", self.seeds, "not repeat")
        warm = not self.warm_start or self.sampler != "grid"
        require(warm, "study.warm_start", self.warm_start, "be empty for a grid: it has its points")
        grid_only = self.sampler != "grid" or not self.rungs
        require(grid_only, "study.rungs", self.rungs, "be 0 for a grid: its curves need every end")


DECIDING = decided(StudyConfig, "result")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep: one study for each combination of the values in ``structure``."""

    name: str
    """Name of its folder and prefix of its studies."""
    study: StudyConfig = field(default_factory=StudyConfig)
    """How to search."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any key of `TrainConfig`."""
    structure: dict[str, Any] = field(default_factory=dict)
    """Dotted key → values: what a population cannot mix (widths), or should not (rules)."""
    space: dict[str, Dimension] = field(default_factory=dict)
    """Dotted key → dimension."""

    @cached_property
    def cells(self) -> "list[Cell]":
        """Every combination of ``structure``, in order; for each dimension, if it is alone."""
        keys = list(self.structure)
        combinations = itertools.product(*self.structure.values())
        return [
            Cell(self, dict(zip(keys, values, strict=True)), only)
            for values in combinations
            for only in (self.space if self.study.each else [""])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `parse_spec` accepts back."""
        return to_dict(self)

    @property
    def identity(self) -> str:
        """A hash of all that decides a trial's result; budget and group size are not part of it."""
        data, usual = self.to_dict(), to_dict(StudyConfig())
        # A key that a later version adds leaves the sweeps before it what they are.
        data["study"] = {k: data["study"][k] for k in DECIDING if data["study"][k] != usual[k]}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two specs (plain data) differ of what decides a trial's result, key by key.

    >>> differences({"study": {"trials": 5}, "space": {"hparams.lr": {"low": 0.1}}},
    ...             {"study": {"trials": 9}, "space": {"hparams.lr": {"low": 0.2}}})
    ['space.hparams.lr.low: 0.1 there, 0.2 here']
    """
    usual = to_dict(StudyConfig())
    there, here = (
        dict(_leaves({**spec, "study": {k: spec["study"].get(k, usual[k]) for k in DECIDING}}, ""))
        for spec in (old, new)
    )
    changed = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return [f"{key}: {_said(there, key)} there, {_said(here, key)} here" for key in changed]


def _said(leaves: Mapping[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"


@dataclass(frozen=True)
class Cell:
    """One study of a sweep: the spec at one combination of structure values."""

    spec: SweepSpec
    values: Mapping[str, Any]
    only: str = ""
    """The one dimension that is searched; empty: all of them."""

    @property
    def name(self) -> str:
        """The study's name: the sweep's, each structure value, and what is searched alone."""
        parts = [f"{k}={v}" for k, v in self.values.items()] + [self.only] * bool(self.only)
        return "/".join([self.spec.name, *parts])

    @property
    def search_space(self) -> SearchSpace:
        """The searched dimensions."""
        space = self.spec.space
        return SearchSpace({self.only: space[self.only]} if self.only else space)

    def config(self, params: Mapping[str, Any] | None = None, seed: int = 0) -> TrainConfig:
        """The run of one member: this cell with the searched values and a seed."""
        raw: dict[str, Any] = dict(self.spec.train)
        for key, value in {**self.values, **(params or {}), "seed": seed}.items():
            raw = put(raw, key, value)
        return train_config(raw)

    def own(self) -> dict[str, float]:
        """The run's own value of each searched key."""
        hparams = self.config().hparams
        return {
            key: getattr(hparams, key.removeprefix("hparams."))
            for key in self.search_space.dimensions
        }

    def center(self) -> dict[str, float]:
        """The value of each searched key that its dimension starts from, or the run's own."""
        own = self.own()
        return {key: d.center or own[key] for key, d in self.search_space.dimensions.items()}


def put(raw: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """``raw`` with one dotted key set; a model given by name becomes a table with that preset.

    >>> put({"model": "proxy-64"}, "model.d_model", 128)
    {'model': {'preset': 'proxy-64', 'd_model': 128}}
    """
    head, _, rest = dotted.partition(".")
    if not rest:
        return {**raw, head: value}
    below = raw.get(head, {})
    if head == "model" and isinstance(below, str):
        below = {"preset": below}
    return overlay(raw, {head: put(below if isinstance(below, dict) else {}, rest, value)})


def load_spec(name: str | Path | SweepSpec) -> SweepSpec:
    """The sweep of that name (shipped) or file, validated as a whole.

    >>> load_spec("smoke").study.sampler
    'tpe'
    """
    if isinstance(name, SweepSpec):
        return name
    path = find_bundled(str(name))
    return parse_spec({"name": path.stem, **load_toml(path)}, str(path))


def parse_spec(raw: Mapping[str, Any], origin: str, stored: bool = False) -> SweepSpec:
    """A spec from plain data; every cell's config is resolved, so a typo fails here.

    One that is ``stored`` with its trials opens though it says what would now be refused for having
    no effect: its trials are none the worse for it.
    """
    try:
        spec = from_dict(SweepSpec, _flat(_renamed(raw)))
        _check(spec)
        if not stored:
            _check_effect(spec)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return spec


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with today's keys, where it has old ones."""
    study = raw.get("study", {})
    if not isinstance(study, Mapping):
        return dict(raw)
    for old, new in RENAMED.items():
        if old in study and new in study:
            raise ConfigError(f"study.{old} = {study[old]!r}: is study.{new} by now; leave one")
    return {**raw, "study": {RENAMED.get(key, key): value for key, value in study.items()}}


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """TOML reads an unquoted dotted key as nested tables; undo that below [structure], [space]."""
    for table in ("structure", "space"):
        raw[table] = dict(_leaves(raw.get(table, {}), "", whole=table == "space"))
    for key, dimension in raw["space"].items():
        given = isinstance(dimension, dict | Dimension)
        other = given and isinstance(dimension, dict) and {"min", "max"} & dimension.keys()
        require(given and not other, f"space.{key}", dimension,
                "be a range { low = …, high = … } or { values = […] }")  # fmt: skip
    return raw


def _leaves(table: Any, prefix: str, whole: bool = False) -> list[tuple[str, Any]]:
    """Dotted key → value of nested tables; ``whole`` leaves the lowest ones (dimensions) whole."""
    if not isinstance(table, dict):
        return [(prefix, table)]
    if (
        whole
        and prefix
        and not any(isinstance(below, dict | Dimension) for below in table.values())
    ):
        return [(prefix, table)]
    dotted = [(f"{prefix}.{key}".lstrip("."), below) for key, below in table.items()]
    return [leaf for key, below in dotted for leaf in _leaves(below, key, whole)]


def _check(spec: SweepSpec) -> None:
    if not spec.space:
        raise ConfigError('[space] is empty: search something, e.g. "hparams.lr" = {…}')
    searchable = [f"hparams.{name}" for name in HParams.__dataclass_fields__]
    for key in spec.space:
        if key not in searchable:
            hint = "" if key.startswith("hparams.") else " (what changes shapes is [structure])"
            raise ConfigError(f"{unknown('searched key', key, searchable)}{hint}")
    for key, values in spec.structure.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"structure.{key} = {values!r}: expected a list of values")
    studies = math.prod(map(len, spec.structure.values())) * (len(spec.space) ** spec.study.each)
    require(studies <= MOST_STUDIES, "structure", f"{studies:,} studies",
            f"make at most {MOST_STUDIES:,} of them")  # fmt: skip
    plain = re.fullmatch(r"[\w.+-]+", spec.name) and not spec.name.startswith(".")
    require(bool(plain), "name", spec.name, "be letters, digits, and . _ + -")
    halving = spec.study.reduction**spec.study.rungs
    for cell in spec.cells:
        config = cell.config()
        get_rule(config.rule)
        fits = not spec.study.rungs or halving < config.steps
        most = f"leave reduction**rungs below {config.steps} steps"
        require(fits, "study.rungs", spec.study.rungs, most)
        points = cell.search_space.size(cell.center()) if spec.study.sampler == "grid" else 3
        require(points <= MOST_POINTS, "space", f"a grid of {points:,} points",
                f"make at most {MOST_POINTS:,}, or search each alone (study.each)")  # fmt: skip
        if points < 3:
            raise ConfigError(
                f"{cell.name}: fewer than three grid points around the run's own values "
                f"{cell.center()}; widen [space] or move [train.hparams]"
            )
        for key, dimension in cell.search_space.dimensions.items():
            for value in dimension.values or (dimension.low, dimension.high):
                cell.config({key: value})
    own = spec.study.warm_start != spec.name
    require(own, "study.warm_start", spec.study.warm_start, "be another sweep's name")
    if spec.train.get("seed") is not None:
        raise ConfigError("train.seed: a sweep's seeds are study.seeds")


MOST_STUDIES, MOST_POINTS = 10_000, 100_000  # what is listed before anything trains

HONOURED = ("accumulate",)
"""What decides the execution or the record of a run, and a population takes as it is said."""
ANYWAY = {"memory": "exact", "parallel.checkpointing": "none"}
"""What a population does whatever is said."""


ALONE = (
    "be left out: a sweep trains its runs side by side in one process, in exact memory, and "
    "records their losses alone"
)


def _check_effect(spec: SweepSpec) -> None:
    """Refuse what would have no effect: one who wrote it expects one."""
    for key, values in spec.structure.items():
        require(not _repeats(values), f"structure.{key}", values, "name each value once")
    for key, dimension in spec.space.items():
        require(not _repeats(dimension.values), f"space.{key}.values", dimension.values,
                "name each value once")  # fmt: skip
        for name in ("low", "high", "log", "ratio", "points") if dimension.values else ():
            value, usual = getattr(dimension, name), getattr(Dimension(values=(0.0,)), name)
            require(value == usual, f"space.{key}.{name}", value, "be left out beside values")
    for cell in spec.cells:
        _check_executed(cell.config())


def _repeats(values: Sequence[Any]) -> bool:
    return any(value in values[:i] for i, value in enumerate(values))


def _check_executed(config: TrainConfig) -> None:
    """Refuse a run that says how it is executed or recorded alone: it is one of a population."""
    usual = TrainConfig(model=config.model, base=config.base)
    for name, _, here in differing(usual, config, "execution", "record", apart=HONOURED):
        require(here == ANYWAY.get(name), name, here, ALONE)
