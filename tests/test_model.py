"""The GPT: it is causal, and K members are K models. What depends on blocks is in test_blocks."""

import copy
import dataclasses

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT, Cache
from mupgpt.model.init import init_weights
from mupgpt.parametrization.table import parametrize

TINY = GPTConfig(n_layer=2, d_model=24, n_head=2, d_head=8, d_ffn=40, vocab_size=13, seq_len=10)
BASE = Base(d_model=12, d_ffn=20, n_head=1, d_head=4, n_kv_head=1, n_layer=1)
HP = HParams(init_std=0.3, emb_mult=2.0, output_mult=3.0)


def build(config=TINY, hparams=HP, seed=0, rule="mup", members=None):
    model = GPT(config, members=members).double()
    many = hparams if members is not None else [hparams]
    tables = [parametrize(config, BASE, hp, rule) for hp in many]
    init_weights(model, tables if members is not None else tables[0], seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


def test_13b_on_meta():
    config = GPTConfig(n_layer=40, d_model=5120, n_head=40, vocab_size=50257, seq_len=2048)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 12853386240


def test_a_later_token_never_changes_an_earlier_logit():
    model = build()
    x = tokens(3, 10)
    y = x.clone()
    y[:, 6] = (y[:, 6] + 1) % 13
    a, b = model(x), model(y)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("kv", [1, 2])
def test_cache_continues_exactly(kv):
    model = build(dataclasses.replace(TINY, n_kv_head=kv))
    x = tokens(2, 10)
    cache = Cache()
    parts = [model(piece, cache=cache) for piece in x.split([4, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"model\.seq_len = 10"):
        model(x[:, :1], cache=cache)


def test_grouped_heads_are_repeated_heads():
    grouped = build(dataclasses.replace(TINY, n_kv_head=1))
    full = build(TINY)
    state = dict(grouped.named_parameters())
    with torch.no_grad():
        for name, p in full.named_parameters():
            same = state[name].shape == p.shape
            p.copy_(state[name] if same else torch.cat([state[name], state[name]]))
    x = tokens(2, 10)
    torch.testing.assert_close(full(x), grouped(x), rtol=0, atol=1e-12)


def test_losses_are_the_logits_cross_entropy_and_training_is_generation():
    model = build()
    x, y = tokens(2, 9), tokens(2, 9, seed=1)
    expected = torch.nn.functional.cross_entropy(
        model(x).flatten(0, 1), y.flatten(), reduction="none"
    ).view(2, 9)
    assert torch.equal(model(x, y), expected)


def test_losses_are_fp32_even_under_bf16():
    model = build().bfloat16()
    assert model(tokens(1, 5), tokens(1, 5)).dtype == torch.float32


def test_no_silent_sp():
    with pytest.raises(RuntimeError, match="no table applied"):
        GPT(TINY)(tokens(1, 3))


def test_multipliers_survive_deepcopy_and_assign():
    model = build()
    twin = copy.deepcopy(model)
    twin.load_state_dict(
        {k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True
    )
    x = tokens(2, 7)
    assert torch.equal(model(x), twin(x))


def test_every_parameter_has_a_gradient():
    model = build(dataclasses.replace(TINY, tied=False))
    model(tokens(2, 10), tokens(2, 10, seed=1)).mean().backward()
    for name, p in model.named_parameters():
        # A key's bias shifts all scores of a query alike, which softmax does not see.
        if not name.endswith("attn.k.bias"):
            assert p.grad is not None and p.grad.abs().max() > 0, name


MEMBERS = [
    HParams(init_std=0.3, emb_mult=2.0, output_mult=3.0),
    HParams(init_std=0.1, emb_mult=5.0, output_mult=1.0, attn_mult=0.5),
    HParams(init_std=0.2, emb_mult=1.0, output_mult=0.5, attn_mult=2.0),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_members_are_solo_models(tied, bias):
    config = dataclasses.replace(TINY, tied=tied, bias=bias)
    together = build(config, MEMBERS, seed=[0, 1, 1], members=3)
    x, y = tokens(3, 2, 10), tokens(3, 2, 10, seed=1)
    loss = together(x, y)
    loss.mean(dim=(1, 2)).sum().backward()
    for k, (hparams, seed) in enumerate(zip(MEMBERS, [0, 1, 1], strict=True)):
        solo = build(config, hparams, seed=seed)
        own = solo(x[k], y[k])
        torch.testing.assert_close(loss[k], own, rtol=0, atol=1e-12)
        own.mean().backward()
        grads = dict(together.named_parameters())
        for name, p in solo.named_parameters():
            torch.testing.assert_close(grads[name].grad[k], p.grad, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_members_are_vmap_of_functional_call():
    solos = [build(seed=seed) for seed in range(3)]
    together = build(TINY, [HP] * 3, seed=[0, 1, 2], members=3)
    params, buffers = stack_module_state(solos)
    x = tokens(3, 2, 10)
    expected = vmap(lambda p, b, t: functional_call(solos[0], (p, b), (t,)))(params, buffers, x)
    torch.testing.assert_close(together(x), expected, rtol=0, atol=1e-12)


def test_a_nan_member_leaves_the_others_bitwise_unchanged():
    clean = build(TINY, MEMBERS, seed=[0, 1, 2], members=3)
    broken = build(TINY, MEMBERS, seed=[0, 1, 2], members=3)
    with torch.no_grad():
        broken.blocks[0].mlp.up.weight[1] = torch.nan
    x, y = tokens(3, 2, 10), tokens(3, 2, 10, seed=1)
    for model in (clean, broken):
        model(x, y).mean(dim=(1, 2)).sum().backward()
    assert broken(x)[1].isnan().all()
    for (name, a), b in zip(clean.named_parameters(), broken.parameters(), strict=True):
        for k in (0, 2):
            assert torch.equal(a.grad[k], b.grad[k]), name


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"model.n_head = 5 does not divide 24.*4, 6"):
        GPTConfig(n_layer=1, d_model=24, n_head=5, vocab_size=5, seq_len=4)
    with pytest.raises(ConfigError, match=r"model.n_kv_head = 2 does not divide 3"):
        GPTConfig(n_layer=1, d_model=24, n_head=3, n_kv_head=2, vocab_size=5, seq_len=4)
    with pytest.raises(ConfigError, match="give n_head or d_head"):
        GPTConfig(n_layer=1, d_model=24, vocab_size=5, seq_len=4)


def test_widen_keeps_ratios():
    config = GPTConfig(
        n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_ffn=160, vocab_size=9, seq_len=8
    )
    wide = config.widen(256)
    assert (wide.n_head, wide.n_kv_head, wide.d_head, wide.d_ffn) == (16, 8, 16, 640)
