"""Whose a run's folder and its checkpoints are: what is stored for identity is compared."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.verify import checkpoints
from mupgpt.config.fields import differing
from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import ParamTable
from mupgpt.planning.memory import scheme_of
from mupgpt.planning.plan import GIB
from mupgpt.resolve import train_config

__all__ = ["claim", "locked", "require_room", "require_same_run"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or say who holds it; the lock of a dead process is free."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock"
    lock = FileLock(holder, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{folder} is in use by process {holder.read_text(encoding='utf-8').strip() or '?'}; "
            "wait for it, or name another folder with --run"
        ) from error
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def claim(folder: Path, config: TrainConfig) -> None:
    """Write the config, or refuse a folder that belongs to another one."""
    path = folder / "config.json"
    if path.is_file() and checkpoints(folder / "checkpoints"):
        theirs = train_config(load_toml(path))
        for name, there, here in differing(theirs, config, "result"):
            raise ConfigError(
                f"{folder} belongs to another config: {name} is {there!r} there and {here!r} here; "
                "name another folder with --run"
            )
    whole = path.with_suffix(".json.tmp")
    whole.write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")
    whole.replace(path)


def require_room(folder: Path, config: TrainConfig) -> None:
    """Refuse a run whose first checkpoint could not be written, before it has cost anything."""
    root = folder / "checkpoints"
    need = count_params(config.model) * scheme_of(config, config.memory).saved
    if not checkpoints(root) and (free := shutil.disk_usage(folder).free) < 1.1 * need:
        raise ConfigError(
            f"{root}: a checkpoint of this run takes {need / GIB:.1f} GiB and "
            f"{free / GIB:.1f} GiB are free; name a folder on a larger disk with --run"
        )


def require_same_run(checkpoint: Checkpoint, table: ParamTable, facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another table, storage, optimizer or text than ``facts`` say."""
    where, theirs = checkpoint.folder, checkpoint.manifest
    if lines := table.diff(theirs["table"]):
        raise ConfigError(
            f"{where} was written under another table: {lines[0]} "
            f"({len(lines)} differences); name another folder with --run"
        )
    saved, mine = theirs.get("memory", "exact"), facts["memory"]
    if saved != mine:
        raise ConfigError(
            f"memory = {mine!r}: {where} was written under {saved!r}; set memory "
            f"to {saved!r}, or name another folder with --run"
        )
    saved, mine = theirs.get("optimizers", {}), facts["optimizers"]
    if saved != mine:
        raise ConfigError(
            f"optimizers = {mine}: {where} was written under {saved or 'those of the rule'}; give "
            "the same from Python, or name another folder"
        )
    if theirs["corpus"] != facts["corpus"]:
        raise ConfigError(
            f"{where} was trained on another corpus ({theirs['corpus']}); this one is "
            f"{facts['corpus']}; restore the text, or name another folder with --run"
        )
