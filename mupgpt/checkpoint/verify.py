"""A checkpoint against its manifest: every file by its hash, the manifest by its own."""

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.distributed.processes import gather, on_main, rank, say, together, world_size
from mupgpt.errors import CheckpointError

__all__ = ["FORMAT", "checkpoints", "load_newest", "measure", "self_hash", "verify"]


FORMAT = 1


CHUNK = 2**22


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` after every byte of it was compared with its manifest.

    In a process group each process compares its share of the files.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or unreadable ({error})") from error
    if stated != self_hash(manifest):
        raise CheckpointError(f"{path} does not match its own hash")
    if manifest["format"] != FORMAT or folder.name != f"step-{manifest['step']:08d}":
        raise CheckpointError(f"{path} is of another format or step")
    present = {p.name for p in folder.iterdir()} - {"manifest.json"}
    if odd := sorted(present ^ manifest["files"].keys()):
        raise CheckpointError(f"{folder}: {odd[0]} is missing or was added")
    for name in sorted(present)[rank() :: world_size()]:
        if measure(folder / name) != manifest["files"][name]:
            raise CheckpointError(f"{folder / name} is damaged")
    return Checkpoint(folder, manifest)


def measure(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: ``size`` in bytes and ``sha256``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def self_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, which must not hold its own yet."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, newest first, verified or not."""
    return sorted((p for p in root.glob("step-????????") if p.is_dir()), reverse=True)


def load_newest(root: Path, set_aside: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there is no checkpoint at all.

    A damaged one is named on stderr and renamed to ``bad-…`` (unless the folder is another's). When
    all are damaged, that is an error: starting over silently would lose the run. Every process of
    the group must call this; each verifies its share of the files.
    """
    found = gather(checkpoints(root))[0]
    for folder in found:
        try:
            return together(functools.partial(verify, folder))
        except CheckpointError as error:
            say(f"checkpoint refused: {error}")
            if set_aside:
                on_main(functools.partial(_set_aside, folder))
    if found:
        raise CheckpointError(
            f"{root}: none of {len(found)} checkpoints verifies. "
            "Restore one from a backup, or remove the folder to start over"
        )
    return None


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"bad-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    say(f"set aside as {aside.name}")
