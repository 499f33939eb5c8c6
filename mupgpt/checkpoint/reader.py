"""A checkpoint on disk, read into tensors that may be sharded in another way.

A checkpoint is a folder ``step-00000100``: safetensors files and a ``manifest.json`` that hashes
every file, itself included. Of several processes each writes files of its own slices, and the
manifest says where they lie in their tensors; so any number of processes, sharded in any way, reads
just what it needs of them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mupgpt.errors import CheckpointError
from mupgpt.model.shards import Piece, piece

__all__ = ["Checkpoint"]


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
    def _boxes(self, group: str) -> Iterator[dict[str, list["Box"]]]:
        """The saved boxes of each tensor of ``group``, while its files are open."""
        boxes: dict[str, list[Box]] = {}
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
                    boxes.setdefault(name, []).append(Box(data, size, tuple(offset), tuple(shape)))
            yield boxes


@dataclass(frozen=True)
class Box:
    """A box of a tensor in an open file."""

    data: Any
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
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
