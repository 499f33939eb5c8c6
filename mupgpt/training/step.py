"""One training step and one evaluation: the same for one model and for K members."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mupgpt.distributed.processes import global_mean
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.losses import IGNORED
from mupgpt.model.shards import is_sharded
from mupgpt.optim.clip import clip_gradients
from mupgpt.optim.rates import set_lr

__all__ = ["Batch", "evaluate", "sum_in_fp32", "token_losses", "train_step", "update"]


Batch = tuple[Tensor, Tensor]
"""Tokens and targets, each (*K, B, T) integers; a target of −100 is not counted."""


EVAL_TOKENS = 8192  # at most so many tokens, members counted, in one forward of an evaluation


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    lr_factor: float,
    grad_clip: float,
    accumulate: int = 1,
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the mean loss in nats per token and the gradient norm, (*K).

    The mean is over the targets that are counted, in all micro-batches and on all processes.
    ``lr_factor`` multiplies every learning rate of the table. The batch is cut into ``accumulate``
    equal micro-batches. Members do not mix: their losses are summed, so each parameter sees the
    gradient of its own member alone.

    >>> from mupgpt import Base, GPTConfig, HParams, parametrize
    >>> shape = GPTConfig(n_layer=1, d_model=8, d_head=8, vocab_size=9, seq_len=4)
    >>> table = parametrize(shape, Base.of(shape), HParams(), "mup")
    >>> from mupgpt import init_weights, make_optimizer
    >>> model = GPT(shape)
    >>> init_weights(model, table, 0)
    >>> optimizer = make_optimizer(model, table)
    >>> batch = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    >>> losses = [float(train_step(model, optimizer, batch, lr_factor=1.0, grad_clip=1.0)[0])
    ...           for _ in range(3)]
    >>> losses == sorted(losses, reverse=True)
    True
    """
    set_lr(optimizer, lr_factor)
    return update(model, optimizer, batch, grad_clip, accumulate)


def update(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    grad_clip: float,
    accumulate: int = 1,
) -> tuple[Tensor, Tensor]:
    """What `train_step` does at the learning rates that the optimizer has."""
    optimizer.zero_grad(set_to_none=True)
    if accumulate > 1:
        sum_in_fp32(model)
    losses, share = [], _counted(batch[1])
    if any(is_sharded(p) for p in model.parameters()):
        share = global_mean(share)  # as gradients are averaged over processes
    for tokens, targets in micro_batches(batch, accumulate):
        loss = model(tokens, targets)
        loss = loss.sum(dim=(-2, -1)) / share.to(loss.dtype)
        loss.sum().backward()
        losses.append(loss.detach())
    norm = clip_gradients(model, grad_clip)
    optimizer.step()
    return torch.stack(losses).sum(0), norm


def sum_in_fp32(model: GPT) -> None:
    """bf16 weights get fp32 gradients, since a sum of many stops growing in bf16."""
    for p in model.parameters():
        if p.dtype == torch.bfloat16:
            if is_sharded(p):
                raise ConfigError(
                    "accumulate > 1 with sixteen-bit weights on several devices: FSDP2 would add "
                    "gradients up in bf16; use accumulate = 1 or memory = 'exact'"
                )
            p.grad_dtype = torch.float32


def micro_batches(batch: Batch, pieces: int) -> Iterator[Batch]:
    """The batch in ``pieces`` equal parts along its sequences."""
    return zip(*(t.chunk(pieces, dim=-2) for t in batch), strict=True)


def evaluate(model: GPT, batch: Batch) -> Tensor:
    """Mean loss of ``batch`` in nats per counted token, (*K) float64.

    Without a readout a model knows nothing: its loss is the logarithm of the vocabulary's size.

    >>> import math
    >>> from mupgpt import Base, GPTConfig, HParams, init_weights, parametrize
    >>> shape = GPTConfig(n_layer=1, d_model=8, d_head=8, vocab_size=9, seq_len=4)
    >>> model = GPT(shape)
    >>> init_weights(model, parametrize(shape, Base.of(shape), HParams(output_mult=1e-9), "mup"), 0)
    >>> batch = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    >>> math.isclose(float(evaluate(model, batch)), math.log(9), rel_tol=1e-6)
    True
    """
    return token_losses(model, batch).sum(dim=(-2, -1)) / _counted(batch[1])


def _counted(targets: Tensor) -> Tensor:
    """The number of targets that are counted, (*K) float64; never 0, so that nothing is 0 nats."""
    return (targets != IGNORED).sum(dim=(-2, -1)).double().clamp(min=1e-9)


@torch.no_grad()
def token_losses(model: GPT, batch: Batch) -> Tensor:
    """Loss of each token of ``batch``, (*K, B, T) float64, in pieces that fit the cache."""
    tokens, targets = batch
    rows = max(1, EVAL_TOKENS // (tokens.shape[-1] * (model.members or 1)))
    pieces = zip(tokens.split(rows, dim=-2), targets.split(rows, dim=-2), strict=True)
    return torch.cat([model(x, y) for x, y in pieces], dim=-2).double()
