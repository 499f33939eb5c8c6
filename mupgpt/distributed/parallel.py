"""How a model is executed: tensor parallelism, recomputation, compilation, sharding.

Nothing here changes a name, a global shape or a multiplier, so the table applies as before. What is
written for is `GPT`'s blocks, by the names of their layers.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from mupgpt.config.schema import ParallelConfig
from mupgpt.distributed.processes import Grid
from mupgpt.model.gpt import GPT, Block
from mupgpt.model.recompute import recomputed

__all__ = ["materialize", "parallelize"]

BY_OUTPUT = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")  # whole heads, slices of d_ffn
BY_INPUT = ("attn.o", "mlp.down")  # each process has a part of the sum
BY_HEAD = ("attn.q_norm", "attn.k_norm")  # one gain for all heads, applied to one's own


def parallelize(model: GPT, config: ParallelConfig, grid: Grid, half: bool) -> None:
    """Prepare ``model``, which may be on the meta device, to run as ``config`` says on ``grid``.

    ``half`` gathers the blocks' weights in bf16 (compute is then bf16 by autocast) and reduces
    gradients in fp32.
    """
    tensor = grid.mesh["tensor"] if config.tensor > 1 else None  # one object: compiled code asks
    for block in model.blocks:
        assert isinstance(block, Block)
        if tensor is not None:
            _split(block, tensor)
        # Single operations are chosen where the compiler sees them; a whole block is repeated from
        # outside: traced around DTensors it fails in torch 2.13.
        if config.checkpointing == "selective":
            block.forward = functools.partial(recomputed, "selective", block.forward)
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpointing == "full":
            block.forward = functools.partial(recomputed, "full", block.forward)
    if grid.mesh is not None:
        _shard(model, grid, half)


def materialize(model: GPT, device: torch.device) -> None:
    """Give a model on the meta device memory for what this process holds; values come next."""
    assert len(list(model.buffers())) == len(model.masks()), "a buffer's values would be lost"
    model.to_empty(device=device)
    model.tie()


def _shard(model: GPT, grid: Grid, half: bool) -> None:
    """FSDP2: a block is gathered when it runs, embeddings and head around the whole forward.

    These are the same on all tensor-parallel processes, so that they can be divided among all.
    Behind a forward everything is its shard again, so that a parameter is never two things.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    wide = torch.float32 if half else None
    outer = MixedPrecisionPolicy(reduce_dtype=wide)
    inner = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=wide, cast_forward_inputs=False
    )
    data = grid.mesh["data"]
    for block in model.blocks:
        fully_shard(block, mesh=data, mp_policy=inner)
    model.register_forward_hook(lambda _module, _args, loss: loss.clone())  # no view: FSDP warns
    fully_shard(model, mesh=grid.line, mp_policy=outer, reshard_after_forward=True)


def _split(block: Block, mesh: Any) -> None:
    """Divide heads and d_ffn among the tensor-parallel processes (arXiv 1909.08053).

    Inside the layers tensors are DTensors, whose backward sums what has to be summed; between them
    they are this process's own. The residual stream and the norms on it are the same everywhere.
    """
    from torch.distributed.tensor import Replicate, Shard

    for name, layer in block.named_modules():
        if name in BY_OUTPUT:
            _place(layer, mesh, weight=Shard(0), bias=Shard(0))
            layer.register_forward_hook(_leave(Shard(-1)))
        elif name in BY_INPUT:
            _place(layer, mesh, weight=Shard(1), bias=Replicate())
            layer.register_forward_pre_hook(_enter(mesh, Shard(-1)))
            layer.register_forward_hook(_leave(Replicate()))
        elif name in BY_HEAD:
            _place(layer, mesh, weight=Replicate())
            layer.register_forward_pre_hook(_enter(mesh, Shard(-2)))
            layer.register_forward_hook(_leave(Shard(-2)))
    block.attn.register_forward_pre_hook(_own_heads(mesh))
    for module in (block.attn, block.mlp):
        module.register_forward_pre_hook(_enter(mesh, Replicate()))


def _place(layer: nn.Module, mesh: Any, **placements: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    for name, p in list(layer.named_parameters(recurse=False)):
        placed = distribute_tensor(p.detach(), mesh, [placements[name]], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(placed))
    for name, mask in list(layer.named_buffers(recurse=False)):
        placed = distribute_tensor(mask, mesh, [placements["weight"]], src_data_rank=None)
        layer.register_buffer(name, placed)


def _enter(mesh: Any, placement: Any) -> Any:
    """A hook: the first input, of which each process has what ``placement`` says, as one tensor."""
    from torch.distributed.tensor import DTensor

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return DTensor.from_local(args[0], mesh, [placement]), *args[1:]

    return hook


def _leave(placement: Any) -> Any:
    """A hook: this process's part of the output under ``placement``."""

    def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
        return output.redistribute(placements=[placement]).to_local()

    return hook


def _own_heads(mesh: Any) -> Any:
    """A hook: ALiBi's slopes of this process's heads."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, attn_mult, places, cache = args
        if places.slopes is not None:
            own = places.slopes.chunk(mesh.size())[mesh.get_local_rank()]
            places = dataclasses.replace(places, slopes=own)
        return x, attn_mult, places, cache

    return hook
