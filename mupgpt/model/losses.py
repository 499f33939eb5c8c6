"""Cross-entropy of every token; for large vocabularies without ever holding all logits.

At a vocabulary of 50257 the logits of 8192 tokens take 1.6 GB in fp32, and the plain path holds
three such tensors. The chunked one computes logits, loss and gradient of a few tokens at a time,
and the logits once more in the backward. Its loss is fp32 whatever the weights are, and so is the
sum of the weight's gradient over chunks: a chunked loss that adds up in bf16 is wrong in the second
decimal.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["IGNORED", "chunked_loss", "token_loss"]

IGNORED = -100
"""A target that is not counted, as in torch and Hugging Face: its loss is 0."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, at least fp32, in the shape of ``targets``; 0 for those
    that are `IGNORED`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(targets.shape)


def chunked_loss(h: Tensor, weight: Tensor, targets: Tensor, factor: Any, size: int) -> Tensor:
    """`token_loss` of the logits factor · h Wᵀ, at most ``size`` of them at a time.

    ``h`` is (…, D), ``weight`` (V, D), ``targets`` (…) integers, ``factor`` a number. Under
    autocast products are in its dtype, as a linear layer's.

    >>> h, w, y = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    >>> torch.allclose(chunked_loss(h, w, y, 0.5, size=20), token_loss(0.5 * h @ w.T, y))
    True
    """
    device, dtype = h.device.type, h.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = max(1, size // weight.shape[0])
    loss: Any = _ChunkedLoss.apply(h.flatten(0, -2), weight, targets.flatten(), factor, rows, dtype)
    return loss.view(targets.shape)


class _ChunkedLoss(torch.autograd.Function):
    """(N, D), (V, D), (N) → (N); keeps its inputs and each token's log-normalizer."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, factor: float, rows: int, dtype: Any
    ) -> Tensor:
        low = weight.to(dtype)
        norms, losses = [], []
        for x, y in zip(h.split(rows), targets.split(rows), strict=True):
            logits = _logits(x, low, factor)
            target = logits.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            top = logits.amax(dim=-1)
            norms.append(logits.sub_(top.unsqueeze(-1)).exp_().sum(dim=-1).log_().add_(top))
            losses.append(norms[-1] - target)
            del logits  # before the next ones are made
        norm, loss = torch.cat(norms), torch.cat(losses).masked_fill_(targets == IGNORED, 0.0)
        ctx.save_for_backward(h, weight, targets, norm)
        ctx.factor, ctx.rows, ctx.dtype = factor, rows, dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight, targets, norm = ctx.saved_tensors
        low, factor = weight.to(ctx.dtype), ctx.factor
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad = grad.masked_fill(targets == IGNORED, 0.0)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide)
        chunks = (t.split(ctx.rows) for t in (h, targets, norm, grad, grad_h))
        for x, y, z, g, out in zip(*chunks, strict=True):
            error = _logits(x, low, factor).sub_(z.unsqueeze(-1)).exp_()  # softmax
            error.scatter_add_(-1, y.clamp(min=0).unsqueeze(-1), -torch.ones_like(z).unsqueeze(-1))
            error = error.mul_(g.unsqueeze(-1) * factor).to(ctx.dtype)
            out.copy_(error @ low)
            grad_weight += error.mT @ x.to(ctx.dtype)
            del error  # before the next one is made
        return grad_h, grad_weight, None, None, None, None


def _logits(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Logits of a few tokens, at least fp32."""
    logits = (x * factor).to(weight.dtype) @ weight.mT
    return logits if logits.dtype == torch.float64 else logits.float()
