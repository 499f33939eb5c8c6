"""Leaf layers with an optional leading member axis: the only code that knows of it.

With ``members=None`` these are the ordinary layers. With ``members=K`` each parameter has a
leading axis K, and so do input and output: K layers that share nothing but the call.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Embedding", "LayerNorm", "Linear", "RMSNorm"]


def _empty(members: int | None, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*(() if members is None else (members,)), *shape))


class Linear(nn.Module):
    """y = x Wᵀ + b, W of shape (*K, fan_out, fan_in).

    A ``masked`` one has a bool buffer ``mask`` M of the same shape, and y = x (W∘M)ᵀ + b: what M
    drops has no gradient, and its stored value has no effect.
    """

    mask: Tensor | None

    def __init__(
        self, fan_in: int, fan_out: int, *, bias: bool, members: int | None, masked: bool = False
    ) -> None:
        super().__init__()
        self.weight = _empty(members, fan_out, fan_in)
        self.bias = _empty(members, fan_out) if bias else None
        mask = torch.zeros_like(self.weight, dtype=torch.bool) if masked else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # (*K, …, fan_in) → (*K, …, fan_out)
        weight = self.weight if self.mask is None else self.weight * self.mask
        if weight.dim() == 2:
            return F.linear(x, weight, self.bias)
        rows = x.flatten(1, -2)  # (K, N, fan_in)
        if self.bias is None:
            y = torch.bmm(rows, weight.mT)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, weight.mT)
        return y.unflatten(1, x.shape[1:-1])


class Embedding(nn.Module):
    """Rows of a (*K, n, d) table."""

    def __init__(self, n: int, d: int, *, members: int | None) -> None:
        super().__init__()
        self.weight = _empty(members, n, d)

    def forward(self, index: Tensor) -> Tensor:  # (*K, …) → (*K, …, d)
        if self.weight.dim() == 2:
            return F.embedding(index, self.weight)
        members, n, _ = self.weight.shape
        first = torch.arange(0, members * n, n, device=index.device)
        first = first.view(members, *[1] * (index.dim() - 1))
        return F.embedding(index + first, self.weight.flatten(0, 1))


class LayerNorm(nn.Module):
    """(x − mean)/√(var + 1e-5) · gain + bias over the last axis."""

    eps = 1e-5

    def __init__(self, d: int, *, bias: bool, members: int | None) -> None:
        super().__init__()
        self.weight = _empty(members, d)
        self.bias = _empty(members, d) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (*K, …, d)
        if self.weight.dim() == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        gain = _beside(self.weight, x)
        return y * gain if self.bias is None else torch.addcmul(_beside(self.bias, x), y, gain)


class RMSNorm(nn.Module):
    """x/√(mean x² + 1e-5) · gain over the last axis (arXiv 1910.07467)."""

    eps = 1e-5

    def __init__(self, d: int, *, members: int | None) -> None:
        super().__init__()
        self.weight = _empty(members, d)

    def forward(self, x: Tensor) -> Tensor:  # (*K, …, d)
        # Autocast widens a layer_norm by itself, but not this.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        x, gain = x.to(wide), self.weight.to(wide)
        if gain.dim() == 1:
            return F.rms_norm(x, gain.shape, gain, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * _beside(gain, x)


def _beside(vector: Tensor, x: Tensor) -> Tensor:
    """Members' vectors (K, d) in as many dimensions as ``x`` (K, …, d) has."""
    return vector.view(len(vector), *[1] * (x.dim() - 2), -1)
