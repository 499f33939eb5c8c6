"""What a training step holds in a device's memory: schemes of storage, and bytes by part. No torch.

A step has four moments at which memory may peak. Each is a sum of parts that follow from the shape
alone, so a peak is known before anything runs; `mupgpt plan --trace` counts it a second way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from mupgpt.config.schema import GPTConfig, TrainConfig
from mupgpt.parametrization.layout import count_params, layout

__all__ = [
    "CHECKPOINTING",
    "CHUNK",
    "SCHEMES",
    "SLICE",
    "Need",
    "Scheme",
    "count_masked",
    "moments",
    "scheme_of",
]

SLICE = 2**24
"""Elements that a sixteen-bit optimizer holds in fp32 at a time."""
CHUNK = 2**26
"""Logits (tokens × vocabulary) beyond which the loss is computed in chunks of so many."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bytes per parameter of everything that outlives a forward."""

    weights: int
    remainder: int
    gradients: int
    moments: int
    """Both together."""

    @property
    def saved(self) -> int:
        """Bytes per parameter in a checkpoint."""
        return self.weights + self.remainder + self.moments


SCHEMES = {
    "exact": Scheme(weights=4, remainder=0, gradients=4, moments=8),
    "split": Scheme(weights=2, remainder=2, gradients=2, moments=4),
    "lean": Scheme(weights=2, remainder=0, gradients=2, moments=4),
}
"""How ``memory`` stores a run, the best first.

``exact``: everything in fp32. ``split``: bf16 weights whose other 16 bits lie beside them, the fp32
master exactly; bf16 gradients and moments. ``lean``: the same without the 16 bits, weights rounded
stochastically. Gradients that add up over micro-batches are fp32 in all of them.
"""
WIDE = Scheme(weights=8, remainder=0, gradients=8, moments=16)  # exact under precision fp64

CHECKPOINTING = ("none", "selective", "full")
"""What the backward computes again (`mupgpt.model.recompute`), the fastest first."""


@dataclass(frozen=True)
class Need:
    """Bytes on one device at one moment of a step, by part."""

    moment: str
    """``loss``, ``last block``, ``first block`` (of the backward) or ``optimizer``."""
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Widths:
    """Bytes of one number of each kind."""

    weight: int
    compute: int
    residual: int
    loss: int = 4

    @property
    def autocast(self) -> bool:
        """Whether matrix products take copies of their inputs."""
        return self.compute != self.weight


def scheme_of(config: TrainConfig, memory: str) -> Scheme:
    """Bytes per parameter of ``memory`` at the config's precision."""
    scheme = WIDE if config.precision == "fp64" else SCHEMES[memory]
    added_up = memory != "exact" and config.accumulate > 1
    return replace(scheme, gradients=4) if added_up else scheme


def _widths(config: TrainConfig, memory: str) -> Widths:
    if memory != "exact":
        return Widths(2, 2, 2)
    if config.precision == "fp64":
        return Widths(8, 8, 8, 8)
    return Widths(4, 4, 4) if config.precision == "fp32" else Widths(4, 2, 4)


def moments(config: TrainConfig, memory: str, checkpointing: str, gpus: int = 1) -> Iterator[Need]:
    """What each of ``gpus`` devices holds at each moment of a step of ``config``.

    State is divided among all devices, heads and d_ffn among those of ``parallel.tensor``.
    Precision ``auto`` counts as bf16, which it is on an accelerator.

    >>> from mupgpt.resolve import train_config
    >>> config = train_config({"model": "cerebras-gpt-13b", "batch_size": 4})
    >>> peak = max(moments(config, "lean", "full"), key=lambda need: need.total)
    >>> peak.moment, round(peak.parts["weights"] / 2**30, 1)
    ('first block', 23.9)
    """
    whole, tensor = config.model, config.parallel.tensor
    m = replace(
        whole,
        n_head=whole.n_head // tensor,
        n_kv_head=whole.n_kv_head // tensor,
        d_ffn=whole.d_ffn // tensor,
    )
    rows = max(1, gpus // tensor) * config.accumulate
    tokens = max(-(-phase.batch_size // rows) * phase.seq_len for phase in config.course)
    w, scheme, n = _widths(config, memory), scheme_of(config, memory), count_params(whole) / gpus
    several, first_time = config.accumulate > 1, config.accumulate == 1
    cached = _linears(m) - count_masked(m)  # autocast keeps copies of parameters, not of products
    state = {
        "weights": n * scheme.weights,
        "remainder": n * scheme.remainder,
        "moments": n * scheme.moments,
        "masks": count_masked(m),  # not divided by FSDP2
        "bf16 copies": w.autocast * w.compute * (cached * (gpus == 1) + _head(m, tokens)),
    }
    early, late, at_last = _gathered(m, w) if gpus > 1 else (0.0, 0.0, 0.0)
    gradients, head = n * scheme.gradients, m.vocab_size * m.d_model / gpus * scheme.gradients
    products = w.compute * count_masked(m) / m.n_layer  # W∘M of one block
    kept, all_of_it = (
        tokens * _kept(m, w, mode) + products * (mode == "none") for mode in (checkpointing, "none")
    )
    block = max(0.0, all_of_it - kept) + tokens * _working(m, w)
    parts = {
        "loss": {
            "gradients": gradients * several,
            "activations": m.n_layer * kept,
            "loss": _loss(m, w, tokens),
            "gathered": early,
        },
        "last block": {
            "gradients": gradients if several else head,
            "activations": m.n_layer * kept + block,
            "gathered": late,
        },
        "first block": {
            "gradients": gradients,
            "activations": kept + block,
            # Autocast copied each weight once, before the first micro-batch: in the backward of a
            # later one these copies' gradients wait for the end.
            "bf16 copies": state["bf16 copies"] * (1 if first_time else 2),
            "gathered": at_last,
        },
        "optimizer": {"gradients": gradients, "slices": _slices(whole, scheme, gpus)},
    }
    for moment, own in parts.items():
        yield Need(moment, {part: size for part, size in (state | own).items() if size})


def _kept(m: GPTConfig, w: Widths, checkpointing: str) -> float:
    """Bytes that one block keeps of one token for its backward."""
    d, kv, up = m.d_model, m.n_kv_head * m.d_head, m.d_ffn * (2 if m.gated else 1)
    if checkpointing == "full":
        return w.residual * d
    attention = 2 * m.d_attn + 2 * kv  # queries, keys, values, output
    normalizers = 4 * m.n_head
    if checkpointing == "selective":
        return w.residual * d + w.compute * (attention + 2 * d + up) + normalizers
    readers = 4 + m.gated if w.autocast else 2  # each casts the output of its norm anew
    inside = attention + readers * d + up + m.d_ffn * (2 if m.gated else 1)
    return 2 * w.residual * d + w.compute * inside + normalizers + 16  # means and deviations


def _working(m: GPTConfig, w: Widths) -> float:
    """Bytes of gradients of one token inside the widest part of a block's backward."""
    return w.compute * m.d_ffn * 2 + w.residual * m.d_model * 2


def _chunked(m: GPTConfig, tokens: int) -> bool:
    return tokens * m.vocab_size > CHUNK


def _loss(m: GPTConfig, w: Widths, tokens: int) -> float:
    """Bytes of final norm, logits, loss and the head's gradient as the backward begins."""
    final = tokens * m.d_model * (w.residual + w.compute)
    if not _chunked(m, tokens):
        return final + 3 * w.loss * tokens * m.vocab_size
    logits, weight = max(CHUNK, m.vocab_size), m.vocab_size * m.d_model
    copy = weight * w.compute * w.autocast
    error = max(logits * w.loss, weight * w.compute) + logits * w.compute
    return final + copy + weight * w.loss + error + tokens * m.d_model * w.residual


def _head(m: GPTConfig, tokens: int) -> int:
    """Elements of the head that autocast keeps a copy of."""
    return 0 if _chunked(m, tokens) else m.vocab_size * m.d_model


@lru_cache(maxsize=8)
def _linears(m: GPTConfig) -> int:
    """Elements of all linear layers inside blocks."""
    return int(sum(math.prod(p.shape) for p in layout(m) if p.role in ("hidden", "bias")))


@lru_cache(maxsize=8)
def count_masked(m: GPTConfig) -> int:
    """Elements of all matrices with a mask."""
    return int(sum(math.prod(p.shape) for p in layout(m) if p.density < 1))


@lru_cache(maxsize=8)
def _largest(m: GPTConfig) -> int:
    """Elements of the largest parameter."""
    return max(int(math.prod(p.shape)) for p in layout(m))


def _gathered(m: GPTConfig, w: Widths) -> tuple[float, float, float]:
    """Bytes of what FSDP2 puts together: before the backward, in it, and at its end.

    Embeddings and one block. In the backward the next block is on its way, but at the end there is
    none; gradients come on top, and a buffer in which those of one group are reduced in fp32.
    """
    block = _linears(m) / m.n_layer
    outer = count_params(m) - block * m.n_layer
    before = w.weight * outer + w.compute * block
    last = (w.compute + 4) * block
    late, at_last = (w.weight * outer + max(x, 4 * outer) for x in (w.compute * block + last, last))
    return before, before + late, before + at_last


def _slices(m: GPTConfig, scheme: Scheme, gpus: int) -> float:
    """Bytes of what the optimizer makes of one slice: fp32 tensors, and noise for what is rounded.

    Five are there at once, six where the gradient is copied too or a remainder is worked out.
    """
    if scheme.weights != 2:
        return 0.0
    tensors = 5 + (scheme.remainder > 0 or scheme.gradients == 2)
    noise = 2 if scheme.remainder else 3
    return 4.0 * (tensors + noise) * min(SLICE, _largest(m) / gpus)
