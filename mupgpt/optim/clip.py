"""Gradients cut to a norm, per member and over shards."""

import torch
from torch import Tensor

from mupgpt.model.gpt import GPT
from mupgpt.model.shards import global_norm, local
from mupgpt.optim.groups import beside

__all__ = ["clip_gradients"]


@torch.no_grad()
def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """Scale each member's gradient to at most ``max_norm``; returns the norms before, (*K).

    As ``torch.nn.utils.clip_grad_norm_``, per member; 0 measures without clipping. Clipping breaks
    abc-equivalence (a gradient's size depends on the representation), so rules are compared in one
    representation.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if model.members is None:
        norm = global_norm(grads)
    else:
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]
        norm = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # Of members on a GPU none is asked whether it needs it: the answer would hold the GPU up.
    unasked = norm.is_cuda and model.members is not None
    if max_norm and (unasked or bool((coefficient != 1.0).any())):
        _scale(grads, coefficient)
    return norm


def _scale(grads: list[Tensor], coefficient: Tensor) -> None:
    """Multiply gradients by one coefficient, (), or by one a member, (K)."""
    if coefficient.dim() == 0:
        torch._foreach_mul_([local(g) for g in grads], coefficient)
    else:
        for g in grads:
            g.mul_(beside(coefficient, g))
