"""Activation checkpointing: what a block keeps for the backward, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

__all__ = ["recomputed"]

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results ``selective`` keeps: matrix products and attention, the slow ones."""


def recomputed(mode: str, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """``run(*args)``, whose backward computes again what ``mode`` says.

    ``none`` keeps everything; ``selective`` keeps the results of `KEPT` and repeats norms,
    activations and sums; ``full`` keeps the arguments alone and repeats the whole forward.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return run(*args)
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(run, *args, **kwargs)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    keep = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
