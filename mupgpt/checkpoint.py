"""Verified atomic checkpoints: safetensors and JSON, no pickle, manifest last, then one rename.

A checkpoint is a folder ``step-00000100`` with a ``manifest.json`` that hashes every file, itself
included. It is verified before anything is loaded; a damaged one is set aside by name and the next
older one is taken.

Of several processes each writes files of its own slices, and the manifest says where they lie in
their tensors; so any number of processes, sharded in any way, reads just what it needs of them.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed as dist

from mupgpt.distributed import gather, is_main, on_main, rank, say, together, world_size
from mupgpt.shards import Piece, piece

__all__ = ["Checkpoint", "CheckpointError", "Writer", "load_newest", "save"]

FORMAT = 1
CHUNK = 2**22
PART = (
    2**32
)  # bytes of a file, unless one tensor takes more: what a save holds on the CPU at a time
TIMEOUT = timedelta(hours=1)  # the slowest process's writing


class CheckpointError(RuntimeError):
    """No checkpoint could be written, or none could be read."""


Groups = Mapping[str, Mapping[str, Tensor]]
"""File name → tensor name → tensor, whole or sharded."""
Pieces = dict[str, dict[str, Piece]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors saved under ``group``, by name, whole and on the CPU."""
        with self._boxes(group) as boxes:
            whole = {
                name: torch.empty(found[0].shape, dtype=found[0].dtype)
                for name, found in boxes.items()
            }
        self.load(group, whole)
        return whole

    def dtypes(self, group: str) -> dict[str, torch.dtype]:
        """The names saved under ``group``, and the dtype of each."""
        with self._boxes(group) as boxes:
            return {name: found[0].dtype for name, found in boxes.items()}

    @torch.no_grad()
    def load(self, group: str, into: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or sharded, from those of ``group``, reading only what they need.

        Names and shapes must be the saved ones, or CheckpointError; values take the tensor's dtype.
        """
        with self._boxes(group) as boxes:
            if odd := sorted(boxes.keys() ^ into.keys()):
                where = "not in it" if odd[0] in into else "only there"
                raise CheckpointError(f"{self.folder}: {group} {odd[0]!r} is {where}")
            for name, tensor in into.items():
                mine = piece(tensor)
                filled = 0
                for box in boxes[name]:
                    if box.shape != mine.shape:
                        raise CheckpointError(
                            f"{self.folder}: {group} {name!r} is {box.shape}, not {mine.shape}"
                        )
                    filled += box.copy_to(mine)
                assert filled == mine.data.numel(), f"{name}: the slices leave a hole"

    @contextmanager
    def _boxes(self, group: str) -> Iterator[dict[str, list["_Box"]]]:
        """The saved boxes of each tensor of ``group``, while its files are open."""
        boxes: dict[str, list[_Box]] = {}
        with ExitStack() as stack:
            for file in self.manifest["files"]:
                if file.partition(".")[0].partition("-")[0] != group:
                    continue
                content = stack.enter_context(safe_open(self.folder / file, "pt"))
                placed = self.manifest.get("slices", {}).get(file, {})
                for name in sorted(content.keys()):
                    data = content.get_slice(name)
                    size = tuple(data.get_shape())
                    offset, shape = placed.get(name, ((0,) * len(size), size))
                    boxes.setdefault(name, []).append(_Box(data, size, tuple(offset), tuple(shape)))
            yield boxes


@dataclass(frozen=True)
class _Box:
    """A box of a tensor in an open file."""

    data: Any
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.data[:0].dtype

    def copy_to(self, mine: Piece) -> int:
        """Write what both boxes hold into ``mine``; returns how many elements."""
        low = [max(a, b) for a, b in zip(self.offset, mine.offset, strict=True)]
        ends = zip(self.offset, self.size, mine.offset, mine.data.shape, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if any(start >= stop for start, stop in zip(low, high, strict=True)):
            return 0
        theirs, ours = (
            tuple(
                slice(start - o, stop - o) for start, stop, o in zip(low, high, offset, strict=True)
            )
            for offset in (self.offset, mine.offset)
        )
        mine.data[ours].copy_(self.data[theirs])
        return math.prod(stop - start for start, stop in zip(low, high, strict=True))


def save(
    root: Path,
    step: int,
    groups: Groups,
    facts: Mapping[str, Any],
    keep: int,
    keep_steps: Collection[int] = (),
) -> Checkpoint:
    """Write one checkpoint under ``root``; older ones beyond ``keep`` go after it stands.

    ``groups`` maps a file's name to its tensors; ``facts`` is plain data for the manifest. Those of
    ``keep_steps`` neither go nor count. Every process of the group must call this, with one and the
    same ``root``; an error on one of them is raised on all, and nothing is left of the attempt.
    """
    return _write(root, step, _own(groups), facts, keep, keep_steps)


class Writer:
    """Saves checkpoints in the background, one at a time, from a copy of the state in host memory.

    Where that has no room for a copy, the run waits while its state is written part by part. What
    fails is raised by the next `save`, or by `wait`; leaving the context waits.
    """

    def __init__(self, root: Path, keep: int, keep_steps: Collection[int] = ()) -> None:
        self._root, self._keep, self._keep_steps = root, keep, keep_steps
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        # Collectives of two threads in one group would meet each other.
        alone = not dist.is_initialized()
        self._channel = None if alone else dist.new_group(backend="gloo", timeout=TIMEOUT)

    def save(self, step: int, groups: Groups, facts: Mapping[str, Any]) -> None:
        """Begin a checkpoint: as `save`, of what the tensors hold now."""
        self.wait()
        own = _own(groups)
        if _bytes(own) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 0.9 * _host_memory():
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
            _write(self._root, step, pieces, facts, self._keep, self._keep_steps, self._channel)
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


def _own(groups: Groups) -> Pieces:
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


def _write(
    root: Path,
    step: int,
    own: Pieces,
    facts: Mapping[str, Any],
    keep: int,
    keep_steps: Collection[int],
    channel: Any = None,
) -> Checkpoint:
    final, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    try:
        need = sum(gather(_bytes(own), channel))
        on_main(lambda: _prepare(root, temporary, need), channel)
        files: dict[str, Any] = {}
        slices: dict[str, Any] = {}
        mine = together(lambda: _write_own(temporary, own), channel)
        for written, placed in gather(mine, channel):
            files |= written
            slices |= placed
        manifest = {"format": FORMAT, "step": step, "files": files, **facts}
        manifest |= {"slices": slices} if slices else {}
        manifest["sha256"] = _self_hash(manifest)
        on_main(lambda: _commit(temporary, final, manifest), channel)
    except (OSError, SafetensorError) as error:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {final}: {error}") from error
    on_main(lambda: _prune(root, keep, keep_steps), channel)
    return Checkpoint(final, manifest)


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
            files[file] = _measure(folder / file)
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


def _host_memory() -> float:
    """Bytes that this machine can still give; without limit where it does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return free[0] if free else math.inf


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
    if stated != _self_hash(manifest):
        raise CheckpointError(f"{path} does not match its own hash")
    if manifest["format"] != FORMAT or folder.name != f"step-{manifest['step']:08d}":
        raise CheckpointError(f"{path} is of another format or step")
    present = {p.name for p in folder.iterdir()} - {"manifest.json"}
    if odd := sorted(present ^ manifest["files"].keys()):
        raise CheckpointError(f"{folder}: {odd[0]} is missing or was added")
    for name in sorted(present)[rank() :: world_size()]:
        if _measure(folder / name) != manifest["files"][name]:
            raise CheckpointError(f"{folder / name} is damaged")
    return Checkpoint(folder, manifest)


def _measure(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _self_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
