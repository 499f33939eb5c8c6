"""Keyed initialization: each block of rows has its own counter-based stream.

A number depends on (seed, name, row, column) alone: not on members, ranks, layout, device or the
order in which parameters are filled. torch's generators give none of that. Static masks (SµPar,
arXiv 2405.15743: Bernoulli, drawn once, of the blocks' matrices) come from streams of their own
names in the same way.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mupgpt.model.gpt import GPT
from mupgpt.model.own_table import require_own_table
from mupgpt.model.shards import Piece, piece
from mupgpt.parametrization.layout import layout
from mupgpt.parametrization.table import ParamRow, ParamTable

__all__ = ["fill", "init_weights", "keyed_mask", "keyed_normal"]

BLOCK_ROWS = 128
PARALLEL_FROM = 2**22  # elements; below this, threads cost more than they bring

Box = tuple[slice, slice]
"""Rows and columns of a block."""


def keyed_normal(
    seed: int, name: str, block: int, shape: tuple[int, int], truncated: bool = False
) -> np.ndarray:
    """Standard normals of row block ``block`` of parameter ``name``, float32 of ``shape``.

    ``truncated`` draws the elements beyond ±2 again, one by one.

    >>> a = keyed_normal(0, "wte.weight", 0, (128, 32))
    >>> bool((a == keyed_normal(0, "wte.weight", 0, (128, 32))).all())
    True
    """
    stream = _stream(seed, name, block)
    z = stream.standard_normal(shape, dtype=np.float32)
    while truncated and (outside := np.abs(z) > 2.0).any():
        z[outside] = stream.standard_normal(int(outside.sum()), dtype=np.float32)
    return z


def keyed_mask(
    seed: int, name: str, block: int, shape: tuple[int, int], density: float
) -> np.ndarray:
    """Row block ``block`` of mask ``name``: bool of ``shape``, True with probability ``density``.

    What a density keeps, every higher one keeps too.

    >>> quarter, half = (keyed_mask(0, "up.mask", 0, (128, 512), p) for p in (0.25, 0.5))
    >>> bool(half[quarter].all()), round(float(quarter.mean()), 2)
    (True, 0.25)
    """
    return _stream(seed, name, block).random(shape, dtype=np.float32) < density


def _stream(seed: int, name: str, block: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@torch.no_grad()
def init_weights(
    model: GPT,
    tables: ParamTable | Sequence[ParamTable],
    seeds: int | Sequence[int] = 0,
) -> None:
    """Fill every parameter from its row, draw the masks and put the multipliers in place.

    With members, ``tables`` and ``seeds`` may be one for all or one each; members that share a
    seed share their standard normals, scaled by each one's std, and their masks. Weights that a
    mask drops start at zero, where decay and AdamW leave them. Raises `ConfigError` for the table
    of another shape.
    """
    require_own_table(model, tables)
    members = model.members or 1
    per_table = [tables] * members if isinstance(tables, ParamTable) else list(tables)
    per_seed = [seeds] * members if isinstance(seeds, int) else list(seeds)
    assert len(per_table) == len(per_seed) == members, "one table and one seed per member"
    for name, p in model.named_parameters():
        rows = [table.rows[name] for table in per_table]
        if model.members is not None:
            fill(p, rows, per_seed)
        else:
            part = piece(p)
            fill(part.data.unsqueeze(0), rows, per_seed, part.offset, part.shape)
    _draw_masks(model, per_seed)
    model.apply_table(tables if model.members is not None else per_table[0])


def fill(
    weight: Tensor,
    rows: Sequence[ParamRow],
    seeds: Sequence[int],
    offset: Sequence[int] = (0, 0),
    shape: Sequence[int] | None = None,
) -> None:
    """Write the initial values of K members into ``weight`` of shape (K, …).

    Where that is a box of a matrix of ``shape`` only, ``offset`` says where it begins.
    """
    for member, row in enumerate(rows):
        if row.init in ("zeros", "ones"):
            weight[member].fill_(1.0 if row.init == "ones" else 0.0)
    random = [i for i, row in enumerate(rows) if row.init in ("normal", "truncated")]
    if not random or not weight.numel():
        return

    def write(here: Tensor, block: int, of: tuple[int, int], box: Box) -> None:
        drawn: dict[tuple[int, str], Tensor] = {}
        for i in random:
            row, seed = rows[i], seeds[i]
            if (seed, row.init) not in drawn:
                z = keyed_normal(seed, row.name, block, of, row.init == "truncated")
                z = torch.from_numpy(z[box])
                drawn[seed, row.init] = z.double() if here.dtype == torch.float64 else z
            here[i] = (drawn[seed, row.init] * row.init_std).to(here)

    _by_blocks(weight, offset, shape, write)


def _draw_masks(model: GPT, seeds: Sequence[int]) -> None:
    """Draw all masks, and zero the weights that they drop."""
    specs = {spec.name: spec for spec in layout(model.config)}
    for name, mask in model.masks().items():
        of_weight = name.removesuffix("mask") + "weight"
        held, part = piece(mask), piece(model.get_parameter(of_weight))
        _fill_mask(held, name, specs[of_weight].density, seeds)
        # FSDP2 divides a weight further than its mask.
        starts = (a - b for a, b in zip(part.offset, held.offset, strict=True))
        own = tuple(slice(a, a + n) for a, n in zip(starts, part.data.shape, strict=True))
        part.data.mul_(held.data[own])


def _fill_mask(mask: Piece, name: str, density: float, seeds: Sequence[int]) -> None:
    def write(here: Tensor, block: int, of: tuple[int, int], box: Box) -> None:
        drawn = {seed: keyed_mask(seed, name, block, of, density)[box] for seed in set(seeds)}
        for i, seed in enumerate(seeds):
            here[i].copy_(torch.from_numpy(drawn[seed]))

    boxes = mask.data if mask.data.dim() == 3 else mask.data.unsqueeze(0)
    _by_blocks(boxes, mask.offset[-2:], mask.shape[-2:], write)


def _by_blocks(
    boxes: Tensor,
    offset: Sequence[int],
    shape: Sequence[int] | None,
    write: Callable[[Tensor, int, tuple[int, int], Box], None],
) -> None:
    """Fill ``boxes`` (K, …) of matrices of ``shape``, which begin there at ``offset``.

    ``write`` gets the rows that lie in one block, the block's number and shape, and which part of
    it they are.
    """
    (top, left), (rows, columns) = offset, boxes.shape[1:]
    whole = tuple(shape or boxes.shape[1:])

    @torch.no_grad()  # each thread has a mode of its own
    def fill_block(block: int) -> None:
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, whole[0])
        begin, end = max(start, top), min(stop, top + rows)  # the block's rows that are here
        box = slice(begin - start, end - start), slice(left, left + columns)
        write(boxes[:, begin - top : end - top], block, (stop - start, whole[1]), box)

    blocks = range(top // BLOCK_ROWS, -(-(top + rows) // BLOCK_ROWS))
    if boxes.numel() < PARALLEL_FROM:
        for block in blocks:
            fill_block(block)
        return
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(fill_block, blocks))
