"""What one process holds of a tensor that is spread over several: the only reader of placements.

A sharded parameter is torch's DTensor, and what this process holds of it is a box of the whole.
Everything else (initialization, norms, checkpoints) works with boxes and never asks how they came.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed as dist

__all__ = ["Piece", "copies", "global_norm", "is_sharded", "local", "mesh_of", "piece"]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: all of it, unless it is sharded."""

    data: Tensor
    """The elements on this process (shares memory with the parameter; may be empty)."""
    offset: tuple[int, ...]
    """Where the box begins in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor, of which this process holds a part."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # a second of import that one process can spare

    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """The part of ``t`` on this process (all of it, unless it is sharded)."""
    sharded: Any = t
    return sharded.to_local() if is_sharded(t) else t


def mesh_of(t: Tensor) -> Any:
    """The processes that ``t`` is divided among, torch's DeviceMesh; None for an ordinary one."""
    sharded: Any = t
    return sharded.device_mesh if is_sharded(t) else None


def piece(t: Tensor) -> Piece:
    """The box of ``t`` that this process holds.

    >>> piece(torch.zeros(3, 4)).offset
    (0, 0)
    """
    whole, mesh = tuple(t.shape), mesh_of(t)
    if mesh is None:
        return Piece(t.detach(), (0,) * t.dim(), whole)
    offset, size = [0] * t.dim(), list(whole)
    place = mesh.get_coordinate()
    # The last axis cuts first: a `_StridedShard` before a `Shard` means just that.
    for axis, dim in reversed(_cuts(t)):
        ranks = mesh.size(axis)
        chunk = -(-size[dim] // ranks)  # as torch.chunk: the last ones may be smaller, or empty
        start = min(place[axis] * chunk, size[dim])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
    data = local(t).detach()
    assert list(data.shape) == size, f"a shard is {tuple(data.shape)}, not {size}"
    return Piece(data, tuple(offset), whole)


def _cuts(t: Any) -> list[tuple[int, int]]:
    """The mesh axes that divide ``t``, each with the dimension that it divides."""
    # Not `is_shard()`: of a `_StridedShard` that is False.
    return [(axis, p.dim) for axis, p in enumerate(t.placements) if not p.is_replicate()]


def copies(t: Tensor) -> int:
    """How many processes hold the same box of ``t``."""
    mesh = mesh_of(t)
    if mesh is None:
        return 1
    return dist.get_world_size() // math.prod(mesh.size(axis) for axis, _ in _cuts(t))


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of all tensors, wherever they are, each counted once; (), fp32 up.

    torch's ``clip_grad_norm_`` refuses tensors of different meshes.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)  # a bf16 norm has three digits
    norms = torch.stack(torch._foreach_norm([local(t) for t in tensors], dtype=wide))
    if not any(is_sharded(t) for t in tensors):
        return torch.linalg.vector_norm(norms)
    shares = torch.tensor([1.0 / copies(t) for t in tensors], dtype=torch.float64)
    square = (norms.double().square() * shares.to(norms.device)).sum()
    dist.all_reduce(square)
    return square.sqrt().to(norms.dtype)
