"""One GPT: pre-norm, its blocks by config; the same code for one model and for K members.

Shapes in trailing comments: K members (absent when ``members=None``), B batch, T tokens, S tokens
seen so far, D d_model, H heads, E d_head, V vocabulary. The model knows no exponent: it multiplies
by five named factors that `apply_table` puts in place.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mupgpt.config.schema import GPTConfig
from mupgpt.model.layers import Embedding, LayerNorm, Linear, RMSNorm
from mupgpt.model.losses import chunked_loss, token_loss
from mupgpt.model.own_table import require_own_table
from mupgpt.model.positions import Places, locate
from mupgpt.parametrization.layout import densities
from mupgpt.parametrization.table import ParamTable
from mupgpt.parametrization.words import POINTS
from mupgpt.planning.memory import CHUNK

__all__ = ["GPT", "Block", "Cache"]


class Cache:
    """Keys and values of the tokens seen so far, one pair a layer; starts empty."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return self.layers[0][0].shape[-2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of ``layer`` after adding the new ones, (…, S, E)."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = torch.cat([past_k, k], dim=-2), torch.cat([past_v, v], dim=-2)
        self.layers[layer] = (k, v)
        return k, v


def make_linear(c: GPTConfig, group: str, members: int | None) -> Callable[[int, int], Linear]:
    """What makes the matrices of a group, ``attn`` or ``mlp``, from fan-in and fan-out."""
    masked = densities(c)[group] < 1
    return functools.partial(Linear, bias=c.bias, members=members, masked=masked)


def make_norm(kind: str, d: int, *, bias: bool, members: int | None) -> LayerNorm | RMSNorm:
    """The norm of that kind over ``d`` elements; an RMSNorm has no bias."""
    if kind == "rmsnorm":
        return RMSNorm(d, members=members)
    return LayerNorm(d, bias=bias, members=members)


class Attention(nn.Module):
    """Causal softmax attention; key and value heads may be shared by groups of query heads."""

    def __init__(self, c: GPTConfig, layer: int, members: int | None) -> None:
        super().__init__()
        self.layer, self.d_head = layer, c.d_head
        d_kv, linear = c.n_kv_head * c.d_head, make_linear(c, "attn", members)
        self.q = linear(c.d_model, c.d_attn)
        self.k = linear(c.d_model, d_kv)
        self.v = linear(c.d_model, d_kv)
        self.o = linear(c.d_attn, c.d_model)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            self.q_norm = make_norm(c.norm, c.d_head, bias=False, members=members)
            self.k_norm = make_norm(c.norm, c.d_head, bias=False, members=members)

    def forward(
        self, x: Tensor, attn_mult: "Factor", places: Places, cache: Cache | None
    ) -> Tensor:
        # The multiplier comes after the norm, which would undo it.
        q = self._heads(scale(self._normed(self.q(x), self.q_norm), attn_mult))  # (K·B, H, T, E)
        k = self._heads(self._normed(self.k(x), self.k_norm))
        v = self._heads(self.v(x))
        q, k = places.rotate(q), places.rotate(k)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = places.attend(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2).unflatten(0, x.shape[:-2]))  # (*K, B, T, H·E)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:  # (*K, B, T, H·E)
        return x if norm is None else norm(x.unflatten(-1, (-1, self.d_head))).flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:  # (*K, B, T, H·E) → (K·B, H, T, E)
        return x.flatten(0, -3).unflatten(-1, (-1, self.d_head)).transpose(1, 2)


def relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "swiglu": F.silu,
    "relu2": relu2,
}
"""Activation → its function, of the gate where there is one."""


class MLP(nn.Module):
    """down(f(up x)), or down(f(gate x) · up x)."""

    def __init__(self, c: GPTConfig, members: int | None) -> None:
        super().__init__()
        self.f, linear = ACTIVATIONS[c.activation], make_linear(c, "mlp", members)
        self.gate = linear(c.d_model, c.d_ffn) if c.gated else None
        self.up = linear(c.d_model, c.d_ffn)
        self.down = linear(c.d_ffn, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.f(self.up(x)))
        return self.down(self.f(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + a·attn(norm x), then x + m·mlp(norm x)."""

    def __init__(self, c: GPTConfig, layer: int, members: int | None) -> None:
        super().__init__()
        self.ln1 = make_norm(c.norm, c.d_model, bias=c.bias, members=members)
        self.attn = Attention(c, layer, members)
        self.ln2 = make_norm(c.norm, c.d_model, bias=c.bias, members=members)
        self.mlp = MLP(c, members)

    def forward(
        self, x: Tensor, factors: dict[str, "Factor"], places: Places, cache: Cache | None
    ) -> Tensor:
        branch = self.attn(self.ln1(x), factors["attn"], places, cache)
        x = x + scale(branch, factors["residual.attn"])
        return x + scale(self.mlp(self.ln2(x)), factors["residual.mlp"])


class GPT(nn.Module):
    """A GPT of the shape ``config``, or ``members`` of them side by side.

    Parameters are uninitialized: `mupgpt.init_weights` fills them from a table.

    >>> from mupgpt.resolve import get_preset
    >>> model = GPT(get_preset("proxy-32").shape)
    >>> model(torch.zeros(1, 4, dtype=torch.long))
    Traceback (most recent call last):
    RuntimeError: no table applied: call model.apply_table(table) or init_weights first
    """

    def __init__(self, config: GPTConfig, members: int | None = None) -> None:
        super().__init__()
        c = config
        self.config = config
        self.members = members
        self.wte = Embedding(c.vocab_size, c.d_model, members=members)
        learned = c.positions == "learned"
        self.wpe = Embedding(c.seq_len, c.d_model, members=members) if learned else None
        self.blocks = nn.ModuleList([Block(c, i, members) for i in range(c.n_layer)])
        self.ln_f = make_norm(c.norm, c.d_model, bias=c.bias, members=members)
        self.head = Linear(c.d_model, c.vocab_size, bias=False, members=members)
        self.tie()
        self._floats: dict[str, float] | None = None

    def tie(self) -> None:
        """Let the head share the token embedding's weight, where the config says so."""
        if self.config.tied:
            self.head.weight = self.wte.weight

    def masks(self) -> dict[str, Tensor]:
        """The static masks of the blocks' matrices by name: none at density 1."""
        return {name: m for name, m in self.named_buffers() if name.endswith(".mask")}

    def apply_table(self, tables: ParamTable | Sequence[ParamTable]) -> None:
        """Put the multipliers of a table (of one table per member) in place.

        Raises `ConfigError` for the table of another shape.
        """
        require_own_table(self, tables)
        if self.members is None:
            assert isinstance(tables, ParamTable), "one model takes one table"
            self._floats = {point: tables.multipliers[point].value for point in POINTS}
            return
        tables = [tables] * self.members if isinstance(tables, ParamTable) else tables
        assert len(tables) == self.members, f"{len(tables)} tables for {self.members} members"
        self._floats = {}
        for point in POINTS:
            values = [table.multipliers[point].value for table in tables]
            if len(set(values)) == 1:
                self._floats[point] = values[0]
                continue
            column = torch.tensor(values, dtype=self.wte.weight.dtype).view(-1, 1, 1, 1)
            self.register_buffer(_buffer(point), column.to(self.wte.weight.device), False)

    def keep_members(self, members: Sequence[int]) -> None:
        """Cut the member axis down to these places, in this order."""
        places = torch.tensor(list(members), device=self.wte.weight.device)
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data = tensor.data[places]
            tensor.grad = None
        self.members = len(places)

    @torch.no_grad()
    def put_members(self, members: Sequence[int], other: "GPT") -> None:
        """Copy the members of ``other`` to these places; the multipliers are the next table's."""
        places = torch.tensor(list(members), device=self.wte.weight.device)
        theirs = {**dict(other.named_parameters()), **other.masks()}
        for name, tensor in (*self.named_parameters(), *self.masks().items()):
            tensor[places] = theirs[name]
            tensor.grad = None

    def factors(self) -> dict[str, "Factor"]:
        """The five multipliers by point: a float, or a (K, 1, 1, 1) tensor where members differ."""
        if self._floats is None:
            raise RuntimeError(
                "no table applied: call model.apply_table(table) or init_weights first"
            )
        floats = self._floats
        return {p: floats[p] if p in floats else getattr(self, _buffer(p)) for p in POINTS}

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits (*K, B, T, V), or with ``targets`` the fp32 loss of each token (*K, B, T).

        ``tokens`` and ``targets`` are (*K, B, T) integers. With a ``cache`` the tokens continue
        those it holds. Learned positions end at ``seq_len``: a longer context is a `ValueError`.
        """
        factors = self.factors()
        start = cache.length if cache is not None else 0
        stop = start + tokens.shape[-1]
        x = scale(self._embed(tokens, start, stop), factors["emb"])  # (*K, B, T, D)
        where = locate(self.config, start, stop, tokens.device, self.wte.weight.dtype)
        for block in self.blocks:
            x = block(x, factors, where, cache)
        h = self.ln_f(x)
        if targets is None:
            return self.readout(h)
        if self.members is None and targets.numel() * self.config.vocab_size > CHUNK:
            return chunked_loss(h, self.head.weight, targets, factors["readout"], CHUNK)
        return token_loss(self.readout(h), targets)

    def _embed(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        x = self.wte(tokens)
        if self.wpe is None:
            return x
        if stop > self.config.seq_len:
            raise ValueError(f"{stop} tokens, but model.seq_len = {self.config.seq_len}")
        positions = torch.arange(start, stop, device=tokens.device)
        if self.members is not None:
            positions = positions.expand(self.members, 1, -1)
        return x + self.wpe(positions)

    def readout(self, h: Tensor) -> Tensor:
        """Logits of the normalized residual stream, (*K, B, T, D) → (*K, B, T, V)."""
        return self.head(scale(h, self.factors()["readout"]))


Factor = float | Tensor


def scale(x: Tensor, factor: Factor) -> Tensor:
    """``x`` times a multiplier; no pass over memory when it is 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x * factor


def _buffer(point: str) -> str:
    return "mult_" + point.replace(".", "_")
