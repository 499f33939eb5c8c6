"""The package ``mup`` 1.0.0 as the oracle of rule ``mup-package``: none of its code is ours."""

import math

import mup
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.groups import param_groups
from mupgpt.parametrization.layout import ParamSpec
from mupgpt.parametrization.table import parametrize, parametrize_layout
from mupgpt.training.step import train_step

BASE = GPTConfig(n_layer=2, d_model=16, n_head=2, d_ffn=48, vocab_size=19, seq_len=12, tied=False)
DELTA = GPTConfig(n_layer=2, d_model=24, n_head=3, d_ffn=64, vocab_size=19, seq_len=12, tied=False)
# m_d = 3, m_ffn = 5, and heads twice as wide
WIDE = GPTConfig(n_layer=2, d_model=48, n_head=3, d_ffn=240, vocab_size=19, seq_len=12, tied=False)
HP = HParams(lr=3e-3, init_std=0.2, emb_mult=1.5, output_mult=2.5, weight_decay=0.3)


def table():
    return parametrize(WIDE, Base.of(BASE), HP, "mup-package")


def mup_numbers(model, lr, weight_decay, optimizer=mup.MuAdamW):
    """name → (lr, weight decay) as mup's optimizer assigns them."""
    optimizer = optimizer(model.parameters(), lr=lr, weight_decay=weight_decay)
    of = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: of[p] for name, p in model.named_parameters()}


def test_every_parameter_of_our_gpt():
    model = GPT(WIDE)
    mup.set_base_shapes(model, GPT(BASE), delta=GPT(DELTA), rescale_params=False)
    rows = table().rows
    for name, (lr, decay) in mup_numbers(model, HP.lr, HP.weight_decay).items():
        assert rows[name].lr == pytest.approx(lr, rel=1e-12), name
        assert rows[name].weight_decay == pytest.approx(decay, rel=1e-12), name
    readout = HP.output_mult / model.head.weight.infshape.width_mult()
    assert table().multipliers["readout"].value == pytest.approx(readout, rel=1e-12)


def test_every_rate_of_mup_sgd_is_musgds():
    """The decay too, wherever our rule decays at all (mup's also decays biases and norms)."""
    model = GPT(WIDE)
    mup.set_base_shapes(model, GPT(BASE), delta=GPT(DELTA), rescale_params=False)
    rows = parametrize(WIDE, Base.of(BASE), HP, "mup-sgd").rows
    for name, (lr, decay) in mup_numbers(model, HP.lr, HP.weight_decay, mup.MuSGD).items():
        assert rows[name].lr == pytest.approx(lr, rel=1e-12), name
        if rows[name].role not in ("bias", "norm"):
            assert rows[name].weight_decay == pytest.approx(decay, rel=1e-12), name


def test_init_follows_mup_init():
    model = GPT(WIDE)
    mup.set_base_shapes(model, GPT(BASE), delta=GPT(DELTA), rescale_params=False)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            mup.init.normal_(p, std=HP.init_std)
            ours = table().rows[name].init_std
            assert p.std().item() == pytest.approx(ours, rel=4 / (2 * p.numel()) ** 0.5), name


class PeerAttention(nn.Module):
    """Attention as mup's README asks for: scores × √d_head,base / d_head."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.k, self.v = (nn.Linear(c.d_model, c.d_attn) for _ in range(3))
        self.o = nn.Linear(c.d_attn, c.d_model)

    def forward(self, x):
        c = self.c
        q, k, v = (
            layer(x).unflatten(-1, (c.n_head, c.d_head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        scores = q @ k.mT * (math.sqrt(BASE.d_head) / c.d_head)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -math.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PeerBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
        self.attn = PeerAttention(c)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(c.d_model, c.d_ffn), "down": nn.Linear(c.d_ffn, c.d_model)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.ln2(x))))


class PeerGPT(nn.Module):
    """The same GPT from torch's layers and mup's readout."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(12, c.d_model)
        self.blocks = nn.ModuleList(PeerBlock(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.d_model)
        self.head = mup.MuReadout(c.d_model, c.vocab_size, bias=False, output_mult=HP.output_mult)

    def forward(self, tokens):
        x = (self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]) * HP.emb_mult
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def test_twenty_steps_equal_mups_own_layers():
    ours, peer = GPT(WIDE).double(), PeerGPT(WIDE).double()
    init_weights(ours, table(), 0)
    base, delta = PeerGPT(BASE), PeerGPT(DELTA)
    mup.set_base_shapes(peer, base, delta=delta, rescale_params=False)
    with torch.no_grad():
        named = dict(ours.named_parameters())
        for name, p in peer.named_parameters():
            p.copy_(named[name])
    optimizer = torch.optim.AdamW(param_groups(ours, table()))
    reference = mup.MuAdamW(
        peer.parameters(), lr=HP.lr, betas=(HP.beta1, HP.beta2), eps=HP.eps,
        weight_decay=HP.weight_decay,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = torch.randint(19, (2, 4, 12), generator=generator)
        loss, _ = train_step(ours, optimizer, (x, y), lr_factor=1.0, grad_clip=0.0)
        reference.zero_grad()
        expected = F.cross_entropy(peer(x).flatten(0, 1), y.flatten())
        expected.backward()
        reference.step()
        assert abs(loss.item() - expected.item()) < 1e-9
    for name, p in peer.named_parameters():
        torch.testing.assert_close(named[name], p, rtol=0, atol=1e-9)


def mlp_layout(width, hidden):
    return [
        ParamSpec(name="0.weight", role="input", shape=(width, 7), fan_in=1, fan_out=width),
        ParamSpec(name="0.bias", role="bias", shape=(width,), fan_out=width, constant=0.0),
        ParamSpec(
            name="2.weight", role="hidden", shape=(hidden, width), fan_in=width, fan_out=hidden
        ),
        ParamSpec(name="4.weight", role="output", shape=(3, hidden), fan_in=hidden),
    ]


def mlp(width, hidden):
    return nn.Sequential(
        nn.Linear(7, width),
        nn.ReLU(),
        nn.Linear(width, hidden, bias=False),
        nn.ReLU(),
        mup.MuReadout(hidden, 3, bias=False, output_mult=2.5),
    )


MLP_HP = HParams(lr=0.01, weight_decay=0.2, output_mult=2.5)


def mlp_peer():
    """mup's MLP with its base shapes set, m_in = 4 inside and 5 at the readout."""
    model = mlp(64, 160)
    mup.set_base_shapes(model, mlp(16, 32), delta=mlp(24, 40), rescale_params=False)
    return model


def mlp_table():
    quantities = {"m_d": 5.0, "m_L": 1.0, "m_dh": 1.0, "d_head": 1.0, "2L": 2.0}
    layouts = mlp_layout(64, 160), mlp_layout(16, 32)
    return parametrize_layout(*layouts, quantities, MLP_HP, "mup-package")


def test_every_parameter_of_an_mlp():
    model, ours = mlp_peer(), mlp_table()
    numbers = mup_numbers(model, 0.01, 0.2)
    assert set(numbers) == set(ours.rows)
    for name, (lr, decay) in numbers.items():
        assert (ours.rows[name].lr, ours.rows[name].weight_decay) == pytest.approx((lr, decay))
    readout = model[4].output_mult / model[4].width_mult()
    assert ours.multipliers["readout"].value == pytest.approx(readout)


def test_twenty_steps_of_an_mlp_equal_mups():
    """Plain layers under our table, against mup's layers and optimizer."""
    torch.manual_seed(0)
    peer, table = mlp_peer().double(), mlp_table()
    ours = nn.Sequential(
        nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 160, bias=False), nn.ReLU(),
        nn.Linear(160, 3, bias=False),
    ).double()  # fmt: skip
    ours.load_state_dict({name: p.detach().clone() for name, p in peer.named_parameters()})
    optimizer = torch.optim.AdamW(param_groups(ours, table))
    reference = mup.MuAdamW(
        peer.parameters(), lr=MLP_HP.lr, betas=table.betas, eps=MLP_HP.eps, weight_decay=0.2
    )
    readout = table.multipliers["readout"].value
    for step in range(20):
        x = torch.randn(16, 7, dtype=torch.float64)
        y = torch.randint(3, (16,))
        losses = F.cross_entropy(ours[4](ours[:4](x) * readout), y), F.cross_entropy(peer(x), y)
        for loss, updated in zip(losses, (optimizer, reference), strict=True):
            updated.zero_grad()
            loss.backward()
            updated.step()
        assert abs(losses[0].item() - losses[1].item()) < 1e-9, step
    for p, q in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
