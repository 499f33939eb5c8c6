"""Where a token stands: ALiBi and RoPE, both without a mask as large as the attention matrix.

ALiBi subtracts slope · distance from the scores of a head. Softmax does not see what a whole row
shares, so slope · (place of the key) may be added instead: one more element in each query (the
slope) and each key (its place). That is exact for any head count, members, grouped heads and cache,
and leaves attention to the fused kernels, which take no bias: memory grows with T, not with T².
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mupgpt.config.schema import GPTConfig

__all__ = ["Places", "alibi_slopes", "locate"]

ROPE_BASE = 10000.0
MARKS = 8  # elements added to a head: six are used, and kernels want multiples of eight


def alibi_slopes(n_head: int) -> list[float]:
    """The slope of each head (Press et al. 2022, arXiv 2108.12409).

    Geometric, 2^(−8/n) … 2^−8, where n_head = n is a power of two. Else those of the power of two
    below, followed by every other one of the power of two above, as many as are missing.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> [round(s, 4) for s in alibi_slopes(12)[8:]]
    [0.7071, 0.3536, 0.1768, 0.0884]
    """
    below = 2 ** (n_head.bit_length() - 1)
    return (_geometric(below) + _geometric(2 * below)[::2])[:n_head]


def _geometric(n: int) -> list[float]:
    return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]


@dataclass(frozen=True, eq=False)
class Places:
    """What attention must know of the places of T new tokens after ``start`` others."""

    turn: tuple[Tensor, Tensor] | None = None
    """RoPE: cosines and sines of the new tokens, each (T, E/2)."""
    slopes: Tensor | None = None
    """ALiBi: what queries are extended by, (H, 1, 8)."""
    keys: Tensor | None = None
    """ALiBi: what keys are extended by, (S, 8)."""
    mask: Tensor | None = None
    """Which of S keys each new token may see, (T, S), where neither all nor the causal ones."""
    causal: bool = True
    """Whether the new tokens are all tokens."""

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys (…, T, E) turned by their place (Su et al. 2021, arXiv 2104.09864).

        Elements i and i + E/2 are a pair that turns by place · 10000^(−2i/E).
        """
        if self.turn is None:
            return x
        cos, sin = self.turn
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of new queries (…, H, T, E) to all keys and values (…, G, S, E).

        Heads are grouped where G < H. Scores are q·k/√E − slope · distance.
        """
        d_head, scale = q.shape[-1], None
        if self.slopes is not None and self.keys is not None:
            scale = 1.0 / math.sqrt(d_head)
            q, k = _extend(q, self.slopes), _extend(k, self.keys)
            v = F.pad(v, (0, MARKS))  # fused kernels want one width for all three
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            self.mask,
            is_causal=self.causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y[..., :d_head]


def _extend(x: Tensor, marks: Tensor) -> Tensor:
    return torch.cat([x, marks.to(x.dtype).expand(*x.shape[:-1], MARKS)], dim=-1)


def locate(c: GPTConfig, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Places:
    """The places of tokens ``start`` to ``stop`` in a model of shape ``c``, at least in fp32."""
    dtype = torch.promote_types(dtype, torch.float32)
    turn = slopes = keys = mask = None
    if c.positions == "rope":
        turn = _turns(c.d_head, torch.arange(start, stop, device=device, dtype=dtype))
    if c.positions == "alibi":
        scaling = c.alibi_scaling or max(1.0, stop / c.seq_len)
        slope = torch.tensor(alibi_slopes(c.n_head), device=device, dtype=dtype)
        # Parts that bf16 holds exactly, so that autocast rounds neither slope nor place.
        slope = _parts(slope * (math.sqrt(c.d_head) / scaling), 3)  # (H, 3)
        # Counted from the middle: sums are as exact as slope · place is small.
        place = _parts(torch.arange(stop, device=device, dtype=dtype) - stop // 2, 2)  # (S, 2)
        slopes = F.pad(slope.repeat_interleave(2, dim=-1), (0, MARKS - 6)).unsqueeze(1)
        keys = F.pad(place.repeat(1, 3), (0, MARKS - 6))
    if 0 < start < stop - 1:
        mask = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)
    return Places(turn, slopes, keys, mask, causal=start == 0)


def _turns(d_head: int, place: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, each (T, E/2)."""
    half = torch.arange(0, d_head, 2, device=place.device, dtype=place.dtype)
    angles = place.unsqueeze(-1) * ROPE_BASE ** (-half / d_head)
    return angles.cos(), angles.sin()


def _parts(x: Tensor, n: int) -> Tensor:
    """``n`` numbers that add up to each x, all but the last one rounded to bf16, (…, n)."""
    parts = []
    for _ in range(n - 1):
        parts.append(x.bfloat16().to(x.dtype))
        x = x - parts[-1]
    return torch.stack([*parts, x], dim=-1)
