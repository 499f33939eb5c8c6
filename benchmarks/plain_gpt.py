"""A plain PyTorch GPT with a plain training step: what the sweep benchmark compares with.

Written the usual way: one fused projection for q, k and v, `torch.nn` layers, `torch.optim.AdamW`
with its defaults, `clip_grad_norm_`. Shapes and parameters are those of our proxies, so that a
token costs the same arithmetic.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mupgpt.config.schema import GPTConfig, TrainConfig
from mupgpt.data.corpus import Corpus


class Attention(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model)
        self.out = nn.Linear(c.d_model, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for t in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(c.d_model), Attention(c)
        self.ln2 = nn.LayerNorm(c.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(c.d_model, c.d_ffn), nn.GELU(), nn.Linear(c.d_ffn, c.d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class PlainGPT(nn.Module):
    """A pre-norm GPT with learned positions and a tied head; its forward gives the mean loss."""

    def __init__(self, c: GPTConfig, init_std: float = 0.02) -> None:
        super().__init__()
        assert (c.positions, c.norm, c.activation) == ("learned", "layernorm", "gelu")
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.places = nn.Embedding(c.seq_len, c.d_model)
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        self.ln_f = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=init_std)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float
) -> float:
    """Backward from ``loss`` and one clipped step at ``lr``; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def plain_trial(config: TrainConfig, corpus: Corpus, lr: float, init_std: float) -> float:
    """Train one plain GPT from scratch on random crops; returns its held-out loss."""
    model = PlainGPT(config.model, init_std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rng = np.random.default_rng(config.seed)
    for step in range(config.steps):
        factor = min((step + 1) / (0.1 * config.steps), 1 - step / config.steps)
        plain_step(model, optimizer, model(*crops(corpus.train, config, rng)), lr * factor)
    batches = config.data.eval_tokens // config.tokens_per_step
    with torch.no_grad():
        losses = [float(model(*crops(corpus.val, config, rng))) for _ in range(batches)]
    return sum(losses) / len(losses)


def crops(
    tokens: np.ndarray, config: TrainConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of tokens and targets at random places, each (B, T)."""
    length = config.model.seq_len
    starts = rng.integers(len(tokens) - length - 1, size=config.batch_size)
    rows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]
