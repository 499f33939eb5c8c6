"""A sweep as data: what is trained, what is searched, and how much of it."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import HParams, TrainConfig
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.rules import get_rule
from mupgpt.resolve import overlay, train_config
from mupgpt.tuning.space import Dimension, SearchSpace
from mupgpt.util.bundled import find_bundled

__all__ = ["FREE", "Cell", "StudyConfig", "SweepSpec", "load_spec", "parse_spec"]


FREE = ("trials", "columns", "heartbeat")
"""Keys of `StudyConfig` that decide no trial's result."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How a sweep searches."""

    sampler: Literal["tpe", "gp", "carbs", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler; ``grid`` starts around the run's own values and extends itself."""
    trials: int = 32
    """Trials of each study: an exact budget (for ``grid``, an upper bound)."""
    seeds: tuple[int, ...] = (0,)
    """Every trial trains once per seed; all trials share initializations and data."""
    rungs: int = 0
    """How many times a trial may be stopped early (0: never)."""
    pruner: Literal["halving", "hyperband", "median"] = "halving"
    """Who passes a rung: the best 1/reduction, the same per Hyperband bracket, the better half."""
    reduction: int = 3
    """Factor between the steps of two rungs, and of their trials under halving."""
    warm_start: str = ""
    """A sweep whose best trials are tried first, where they lie inside the space."""
    warm_top: int = 3
    """How many of each of its studies."""
    each: bool = False
    """Search every dimension alone, in a study of its own, the others at the run's own values."""
    columns: int = 0
    """Runs that train as one population (0: as memory allows and a short timing finds)."""
    sampler_seed: int = 0
    """Seed of the sampler."""
    heartbeat: int = 10
    """Seconds between two signs of life of a worker; six missed ones free its trials."""

    def __post_init__(self) -> None:
        require(self.trials > 0, "study.trials", self.trials, "be > 0")
        require(len(self.seeds) > 0, "study.seeds", self.seeds, "name at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "study.seeds", self.seeds, "not repeat")
        require(self.rungs >= 0, "study.rungs", self.rungs, "be >= 0")
        require(self.reduction >= 2, "study.reduction", self.reduction, "be >= 2")
        require(self.warm_top >= 1, "study.warm_top", self.warm_top, "be >= 1")
        warm = not self.warm_start or self.sampler != "grid"
        require(warm, "study.warm_start", self.warm_start, "be empty for a grid: it has its points")
        grid_only = self.sampler != "grid" or not self.rungs
        require(grid_only, "study.rungs", self.rungs, "be 0 for a grid: its curves need every end")
        require(self.columns >= 0, "study.columns", self.columns, "be >= 0")
        require(self.heartbeat >= 1, "study.heartbeat", self.heartbeat, "be >= 1")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep: one study for each combination of the values in ``structure``.

    >>> spec = SweepSpec(name="mine", train={"model": "proxy-32"},
    ...                  structure={"model.d_model": [32, 64]},
    ...                  space={"hparams.lr": Dimension(low=1e-4, high=1e-1, log=True)})
    >>> [cell.name for cell in spec.cells]
    ['mine/model.d_model=32', 'mine/model.d_model=64']
    """

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
        """A hash of all that decides a trial's result; budget and columns are not part of it."""
        data = self.to_dict()
        usual = to_dict(StudyConfig())
        for key in FREE:
            data["study"].pop(key)
        # A key that a later version adds leaves the sweeps before it what they are.
        data["study"] = {k: v for k, v in data["study"].items() if v != usual[k]}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


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
        """The run of one column: this cell with the searched values and a seed."""
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


def parse_spec(raw: Mapping[str, Any], origin: str) -> SweepSpec:
    """A spec from plain data; every cell's config is resolved, so a typo fails here."""
    try:
        spec = from_dict(SweepSpec, _flat(dict(raw)))
        _check(spec)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return spec


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """TOML reads an unquoted dotted key as nested tables; undo that below [structure], [space]."""
    for table in ("structure", "space"):
        raw[table] = dict(_leaves(raw.get(table, {}), ""))
    return raw


def _leaves(table: Any, prefix: str) -> list[tuple[str, Any]]:
    dimension = isinstance(table, dict) and {"low", "high", "values"} & table.keys()
    if not isinstance(table, dict) or dimension:
        return [(prefix, table)]
    dotted = [(f"{prefix}.{key}".lstrip("."), below) for key, below in table.items()]
    return [leaf for key, below in dotted for leaf in _leaves(below, key)]


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
    plain = re.fullmatch(r"[\w.+-]+", spec.name) and not spec.name.startswith(".")
    require(bool(plain), "name", spec.name, "be letters, digits, and . _ + -")
    halving = spec.study.reduction**spec.study.rungs
    for cell in spec.cells:
        config = cell.config()
        get_rule(config.rule)
        fits = not spec.study.rungs or halving < config.steps
        most = f"leave reduction**rungs below {config.steps} steps"
        require(fits, "study.rungs", spec.study.rungs, most)
        if spec.study.sampler == "grid" and len(cell.search_space.grid(cell.center())) < 3:
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
