"""Verified atomic checkpoints: safetensors and JSON, no pickle, manifest last, then one rename.

A checkpoint is a folder ``step-00000100`` with a ``manifest.json`` that hashes every file, itself
included. It is verified before anything is loaded; a damaged one is set aside by name and the next
older one is taken.

Of several processes each writes files of its own slices, and the manifest says where they lie in
their tensors; so any number of processes, sharded in any way, reads just what it needs of them.
"""

import json
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed as dist

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.verify import FORMAT, checkpoints, measure, self_hash
from mupgpt.distributed.processes import gather, is_main, on_main, rank, say, together, world_size
from mupgpt.errors import CheckpointError
from mupgpt.model.shards import Piece, piece
from mupgpt.util.host import free_memory

__all__ = ["Writer", "save"]


PART = 2**32
"""Bytes of a file, unless one tensor takes more: what a save holds on the CPU at a time."""
TIMEOUT = timedelta(hours=1)  # the slowest process's writing

Groups = Mapping[str, Mapping[str, Tensor]]
"""File name → tensor name → tensor, whole or sharded."""


Pieces = dict[str, dict[str, Piece]]


def save(
    root: Path,
    step: int,
    groups: Groups,
    facts: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Write one checkpoint under ``root``; older ones beyond ``keep`` go after it stands.

    ``groups`` maps a file's name to its tensors; ``facts`` is plain data for the manifest. Every
    process of the group must call this, with one and the same ``root``; an error on one of them is
    raised on all, and nothing is left of the attempt.
    """
    return _Shelf(root, keep, ()).write(step, own_pieces(groups), facts)


class Writer:
    """Saves checkpoints in the background, one at a time, from a copy of the state in host memory.

    Where that has no room for a copy, the run waits while its state is written part by part. What
    fails is raised by the next `save`, or by `wait`; leaving the context waits.
    """

    def __init__(self, root: Path, keep: int, keep_steps: Collection[int] = ()) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        # Collectives of two threads in one group would meet each other.
        alone = not dist.is_initialized()
        channel = None if alone else dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._shelf = _Shelf(root, keep, keep_steps, channel)

    def save(self, step: int, groups: Groups, facts: Mapping[str, Any]) -> None:
        """Begin a checkpoint: as `save`, of what the tensors hold now."""
        self.wait()
        own = own_pieces(groups)
        if _bytes(own) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 0.9 * free_memory():
            self._run(step, own, facts)
            return
        copied = {
            name: {
                key: Piece(p.data.to("cpu", copy=True), p.offset, p.shape)
                for key, p in pieces.items()
            }
            for name, pieces in own.items()
        }
        self._thread = threading.Thread(target=self._run, args=(step, copied, facts))
        self._thread.start()

    def _run(self, step: int, pieces: Pieces, facts: Mapping[str, Any]) -> None:
        try:
            self._shelf.write(step, pieces, facts)
        except Exception as error:
            self._failure = error

    def wait(self) -> None:
        """Return when nothing is being written; raises what failed."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            say(f"and the last checkpoint failed: {error}")


def own_pieces(groups: Groups) -> Pieces:
    """What this process writes: the boxes that none of a lower rank holds too."""
    pieces = {key: {name: piece(t) for name, t in group.items()} for key, group in groups.items()}
    boxes = {_box(key, n, p) for key, group in pieces.items() for n, p in group.items()}
    taken = set().union(*gather(boxes)[: rank()])
    return {
        key: {n: p for n, p in group.items() if _box(key, n, p) not in taken and p.data.numel()}
        for key, group in pieces.items()
    }


def _box(key: str, name: str, p: Piece) -> tuple[Any, ...]:
    return key, name, p.offset, tuple(p.data.shape)


@dataclass(frozen=True)
class _Shelf:
    """Where checkpoints stand, and which of them stay."""

    root: Path
    keep: int
    keep_steps: Collection[int]
    channel: Any = None
    """The process group in which the writers agree; None is the default one."""

    def write(self, step: int, own: Pieces, facts: Mapping[str, Any]) -> Checkpoint:
        """One checkpoint of every process's pieces, whole or not at all."""
        root, channel = self.root, self.channel
        final, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
        try:
            need = sum(gather(_bytes(own), channel))
            on_main(lambda: _prepare(root, temporary, need), channel)
            manifest = {"format": FORMAT, "step": step, **self._written(temporary, own), **facts}
            manifest["sha256"] = self_hash(manifest)
            on_main(lambda: _commit(temporary, final, manifest), channel)
        except (OSError, SafetensorError) as error:
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot write {final}: {error}") from error
        on_main(lambda: _prune(root, self.keep, self.keep_steps), channel)
        return Checkpoint(final, manifest)

    def _written(self, folder: Path, own: Pieces) -> dict[str, Any]:
        """What the manifest says of all processes' files, this one's written now."""
        files: dict[str, Any] = {}
        slices: dict[str, Any] = {}
        mine = together(lambda: _write_own(folder, own), self.channel)
        for written, placed in gather(mine, self.channel):
            files |= written
            slices |= placed
        return {"files": files, "slices": slices} if slices else {"files": files}


def _bytes(pieces: Pieces) -> int:
    return sum(p.data.nbytes for group in pieces.values() for p in group.values())


def _prepare(root: Path, temporary: Path, need: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < 1.1 * need:
        raise CheckpointError(
            f"{root}: a checkpoint needs {need / 2**30:.2f} GiB and less is free; "
            "free some space (the run's last checkpoint is untouched)"
        )
    for left in root.glob(".tmp-step-*"):  # of writers that were killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()


def _write_own(folder: Path, own: Pieces) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write this process's files; returns size and hash of each, and where its slices lie."""
    files: dict[str, Any] = {}
    slices: dict[str, Any] = {}
    for key, pieces in own.items():
        if not pieces and world_size() > 1:
            continue
        stem = key if world_size() == 1 else f"{key}-{rank():05d}"
        for number, part in enumerate(_parts(pieces)):
            file = f"{stem}-part{number}.safetensors" if number else f"{stem}.safetensors"
            save_file({name: p.data.cpu().contiguous() for name, p in part.items()}, folder / file)
            _fsync(folder / file)
            files[file] = measure(folder / file)
            cut = {n: (p.offset, p.shape) for n, p in part.items() if p.data.shape != p.shape}
            slices |= {file: cut} if cut else {}
    return files, slices


def _parts(pieces: dict[str, Piece]) -> Iterator[dict[str, Piece]]:
    """The pieces in parts of about `PART` bytes; one part, maybe empty, at least."""
    part: dict[str, Piece] = {}
    size = 0
    for name, p in pieces.items():
        if part and size + p.data.nbytes > PART:
            yield part
            part, size = {}, 0
        part[name] = p
        size += p.data.nbytes
    yield part


def _commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    _fsync(temporary / "manifest.json")
    _fsync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _fsync(final.parent)


def _prune(root: Path, keep: int, keep_steps: Collection[int]) -> None:
    wanted = {f"step-{kept:08d}" for kept in keep_steps}
    for old in [path for path in checkpoints(root) if path.name not in wanted][keep:]:
        shutil.rmtree(old)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
