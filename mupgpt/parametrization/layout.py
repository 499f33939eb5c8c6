"""The one home of parameter names, shapes, roles and fans. Pure numbers: no torch."""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mupgpt.config.schema import Base, GPTConfig
from mupgpt.errors import unknown
from mupgpt.parametrization.words import ROLES, Role

__all__ = [
    "ParamSpec",
    "count_block_weights",
    "count_kept",
    "count_kept_block",
    "count_params",
    "densities",
    "layout",
]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """What a rule must know of one parameter.

    >>> ParamSpec(name="blocks.3.attn.q.weight", role="hidden", shape=(64, 64),
    ...           fan_in=64, fan_out=64).site
    'blocks.*.attn.q.weight'
    """

    name: str
    """Name in the module's ``state_dict``."""
    role: Role
    """What the parameter does to width: see design of the rules."""
    shape: tuple[float, ...]
    """Shape; a base's may be fractional."""
    fan_in: float = 1
    """Width that the parameter sums over (1 for vectors and embeddings)."""
    fan_out: float = 1
    """Width that it produces."""
    residual_out: bool = False
    """Whether it writes into the residual stream at the end of a branch."""
    constant: float | None = None
    """Initial value of a parameter that starts constant (biases 0, gains 1, zero-init q 0)."""
    density: float = 1.0
    """Share of its weights that a static mask keeps."""
    site: str = ""
    """The name with the layer's index as ``*``; target and base are matched by it. Empty means
    that every index in the name is a layer's."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown("role", str(self.role), ROLES)
        if not self.site:
            object.__setattr__(self, "site", re.sub(r"\.\d+\.", ".*.", self.name))

    @property
    def in_block(self) -> bool:
        """Whether each block has one of its own."""
        return self.site != self.name


def layout(model: GPTConfig, dims: Base | None = None) -> list[ParamSpec]:
    """Every parameter of the GPT ``model``, in order; with ``dims``, at those widths and depth.

    >>> model = GPTConfig(n_layer=2, d_model=64, d_head=32, vocab_size=257, seq_len=64)
    >>> [(p.name, p.shape) for p in layout(model)][:2]
    [('wte.weight', (257, 64)), ('wpe.weight', (64, 64))]
    >>> layout(model, Base(d_model=256, d_ffn=682.6, n_head=4, d_head=64, n_kv_head=4,
    ...                    n_layer=1))[-4].fan_in  # mlp.down
    682.6
    """
    at: GPTConfig | Base = dims or model
    d, vocab, seq = at.d_model, model.vocab_size, model.seq_len
    specs = [ParamSpec(name="wte.weight", role="input", shape=(vocab, d), fan_out=d)]
    if model.positions == "learned":
        specs.append(ParamSpec(name="wpe.weight", role="input", shape=(seq, d), fan_out=d))
    for i in range(max(1, int(at.n_layer))):  # a base has every site, whatever its depth
        specs += _block(f"blocks.{i}", model, at)
    specs += _norm("ln_f", d, _shifted(model))
    if not model.tied:
        specs.append(ParamSpec(name="head.weight", role="output", shape=(vocab, d), fan_in=d))
    return specs


def _block(prefix: str, model: GPTConfig, dims: GPTConfig | Base) -> list[ParamSpec]:
    d, f = dims.d_model, dims.d_ffn
    heads, kv = dims.n_head * dims.d_head, dims.n_kv_head * dims.d_head
    q_start = 0.0 if model.zero_init_q else None
    attn, kept = f"{prefix}.attn", densities(dims)
    in_attn = functools.partial(_matrix, density=kept["attn"])
    in_mlp = functools.partial(_matrix, density=kept["mlp"])
    specs = [
        *_norm(f"{prefix}.ln1", d, _shifted(model)),
        in_attn(f"{attn}.q", d, heads, constant=q_start),
        in_attn(f"{attn}.k", d, kv),
        in_attn(f"{attn}.v", d, kv),
        in_attn(f"{attn}.o", heads, d, residual_out=True),
    ]
    if model.qk_norm:
        specs += _norm(f"{attn}.q_norm", dims.d_head, False)
        specs += _norm(f"{attn}.k_norm", dims.d_head, False)
    specs += _norm(f"{prefix}.ln2", d, _shifted(model))
    for name in ("gate", "up") if model.gated else ("up",):
        specs.append(in_mlp(f"{prefix}.mlp.{name}", d, f))
    specs.append(in_mlp(f"{prefix}.mlp.down", f, d, residual_out=True))
    return list(_with_biases(specs)) if model.bias else specs


def _shifted(model: GPTConfig) -> bool:
    """Whether norms have a bias beside their gain."""
    return model.bias and model.norm == "layernorm"


def _matrix(name: str, fan_in: float, fan_out: float, **more: Any) -> ParamSpec:
    """The weight of a linear layer inside a block; ``more`` are further fields of its spec."""
    return ParamSpec(
        name=f"{name}.weight",
        role="hidden",
        shape=(fan_out, fan_in),
        fan_in=fan_in,
        fan_out=fan_out,
        **more,
    )


def _with_biases(specs: Iterable[ParamSpec]) -> Iterator[ParamSpec]:
    """Each matrix followed by the bias of its layer."""
    for spec in specs:
        yield spec
        if spec.role == "hidden":
            name, n = spec.name.removesuffix("weight") + "bias", spec.fan_out
            yield ParamSpec(name=name, role="bias", shape=(n,), fan_out=n, constant=0.0)


def _norm(name: str, d: float, bias: bool) -> list[ParamSpec]:
    gain = ParamSpec(name=f"{name}.weight", role="norm", shape=(d,), fan_out=d, constant=1.0)
    shift = ParamSpec(name=f"{name}.bias", role="norm", shape=(d,), fan_out=d, constant=0.0)
    return [gain, shift] if bias else [gain]


def count_params(model: GPTConfig) -> int:
    """The exact number of parameters, a tied head counted once.

    For the Cerebras-GPT shape this is Vd + Td + L(12d² + 13d) + 2d (arXiv 2304.03208). ALiBi and
    RoPE have no parameters, a gate is a third matrix of the MLP.

    >>> count_params(GPTConfig(n_layer=40, d_model=5120, n_head=40, vocab_size=50257, seq_len=2048))
    12853386240
    """
    d = model.d_model
    kv, wide = model.n_kv_head * model.d_head, 2 if model.gated else 1
    biases = model.d_attn + 2 * kv + 2 * d + wide * model.d_ffn
    norms = d * (2 if _shifted(model) else 1)
    block = count_block_weights(model) + biases * model.bias
    block += 2 * norms + 2 * model.d_head * model.qk_norm
    rows = model.vocab_size * (1 if model.tied else 2)
    rows += model.seq_len * (model.positions == "learned")
    return rows * d + model.n_layer * block + norms


def count_block_weights(model: GPTConfig) -> int:
    """Weights of one block's matrices, masked ones included (12 d² for the GPT-3 shape)."""
    return sum(_block_weights(model).values())


def _block_weights(model: GPTConfig) -> dict[str, int]:
    d, kv = model.d_model, model.n_kv_head * model.d_head
    return {
        "attn": 2 * d * (model.d_attn + kv),
        "mlp": (3 if model.gated else 2) * d * model.d_ffn,
    }


def densities(dims: GPTConfig | Base) -> dict[str, float]:
    """The share of weights that masks keep in each group of a block's matrices.

    >>> shape = {"n_layer": 2, "d_model": 64, "n_head": 2, "vocab_size": 257, "seq_len": 64}
    >>> densities(GPTConfig(**shape, density=0.5, density_mlp=0.125))
    {'attn': 0.5, 'mlp': 0.125}
    """
    return {"attn": dims.density_attn or dims.density, "mlp": dims.density_mlp or dims.density}


def count_kept_block(model: GPTConfig) -> float:
    """Weights of one block's matrices that masks keep, in expectation."""
    kept = densities(model)
    return sum(kept[group] * n for group, n in _block_weights(model).items())


def count_kept(model: GPTConfig) -> int:
    """Parameters that masks keep, in expectation: of the blocks' matrices their ``densities``.

    >>> shape = {"n_layer": 2, "d_model": 64, "n_head": 2, "vocab_size": 257, "seq_len": 64}
    >>> dense, sparse = GPTConfig(**shape), GPTConfig(**shape, density=0.25)
    >>> count_params(sparse) == count_params(dense) == count_kept(dense)
    True
    >>> count_kept(dense) - count_kept(sparse) == 0.75 * 2 * 12 * 64**2
    True
    """
    dropped = count_block_weights(model) - count_kept_block(model)
    return count_params(model) - round(model.n_layer * dropped)
