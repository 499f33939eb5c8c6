"""Tables that others export: their rows, and which column is what."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupgpt.errors import ConfigError, require, unknown

__all__ = ["LOSS", "SEED", "STATE", "Table", "find_column", "leaves", "read_rows"]

LOSS, SEED, STATE = "loss", "seed", "state"
ALIASES = {
    LOSS: "val.loss val_loss valid_loss validation_loss eval.loss eval_loss final_loss value",
    SEED: "random_seed",
    "rule": "parametrization",
    "model.d_model": "width n_embd hidden_size embed_dim",
    "model.n_layer": "depth n_layers num_layers num_hidden_layers",
    "model.seq_len": "context_length block_size",
    "batch_size": "batch",
    "steps": "max_steps train_steps num_steps",
    "hparams.lr": "learning_rate peak_lr max_lr",
    "hparams.weight_decay": "wd",
    "hparams.init_std": "initializer_range",
    "hparams.beta1": "adam_beta1",
    "hparams.beta2": "adam_beta2",
    "hparams.eps": "epsilon adam_eps adam_epsilon",
}
"""Key → what others call it, beside the key itself and its last part."""
PREFIXES = ("config.", "summary.", "params_", "user_attrs_")  # wandb's, Optuna's

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSON or JSON-lines file, nested names joined by dots.

    JSON is a list of objects, or wandb's ``{"columns": […], "data": [[…], …]}``.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise unknown("kind of table", path.suffix, readers)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [dict(leaves(row)) for row in readers[path.suffix](text)]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    require(bool(rows), str(path), "no rows", "hold at least one run")
    return rows


def _csv(text: str) -> Iterator[Row]:
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = reader.fieldnames or []
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not {len(names)} fields")
        yield row


def _json(text: str) -> Iterator[Row]:
    data = json.loads(text)
    if isinstance(data, dict) and {"columns", "data"} <= data.keys():
        data = [dict(zip(data["columns"], row, strict=True)) for row in data["data"]]
    yield from _objects(data)


def _json_lines(text: str) -> Iterator[Row]:
    yield from _objects([json.loads(line) for line in text.splitlines() if line.strip()])


def _objects(data: Any) -> list[Row]:
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError("expected a list of objects, one a run")
    return data


def leaves(table: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below nested tables, with its name joined by dots.

    >>> dict(leaves({"config": {"hparams": {"lr": 0.01}}, "state": "finished"}))
    {'config.hparams.lr': 0.01, 'state': 'finished'}
    """
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Table:
    """The rows of a file, and the column of each key that has one."""

    name: str
    rows: Sequence[Row]
    columns: Mapping[str, str]

    def where(self, place: int) -> str:
        """How a row is called in a message."""
        return f"{self.name}, row {place + 1}"

    def get(self, place: int, key: str) -> Any:
        """The row's entry for a key; None where it has none."""
        value = self.rows[place].get(self.columns.get(key, ""))
        return None if value == "" else value

    def number(self, place: int, key: str) -> float:
        """The row's entry for a key as a number, or an error that says where none stands."""
        value = self.get(place, key)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{self.where(place)}: {key} = {value!r} must be a number") from None


def find_column(key: str, names: Sequence[str], loosely: bool) -> str:
    """The column of that key (``loosely``: or of that meaning), empty where there is none.

    What the spec does not need counts under its full name only: "depth" could be anything.
    """
    fits = [name for name in names if _plain(name) == key]
    if loosely and not (fits and "." in key):
        alike = {key, key.rpartition(".")[2], *ALIASES.get(key, "").split()}
        fits = [name for name in names if _plain(name) in alike]
    if len(fits) > 1:
        raise ConfigError(
            f"{key} could be any of the columns {', '.join(map(repr, fits))}; say which: "
            f"--columns '{key}={fits[0]}'"
        )
    return fits[0] if fits else ""


def _plain(name: str) -> str:
    """A column's name as keys are written, without what wandb and Optuna put in front.

    >>> _plain("config.hparams.lr"), _plain("Learning Rate"), _plain("summary.val/loss")
    ('hparams.lr', 'learning_rate', 'val.loss')
    """
    name = name.lower().replace("/", ".").replace(" ", "_").replace("-", "_")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
