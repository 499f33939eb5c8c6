"""ALiBi and RoPE: exact slopes, relative distances only, equal to the naive form, linear memory."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT, Cache
from mupgpt.model.init import init_weights
from mupgpt.model.positions import alibi_slopes, locate
from mupgpt.parametrization.table import parametrize

TINY = GPTConfig(
    n_layer=2, d_model=24, n_head=6, d_head=4, vocab_size=13, seq_len=8, positions="alibi"
)
CPU = torch.device("cpu")


def shaped(**fields):
    return dataclasses.replace(TINY, **fields)


def where(config, start, stop, dtype=torch.float64):
    return locate(config, start, stop, CPU, dtype)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(config, seed=0):
    model = GPT(config).double()
    table = parametrize(config, Base.of(config), HParams(init_std=0.3), "mup")
    init_weights(model, table, seed)
    return model


@pytest.mark.parametrize("n_head", [1, 2, 4, 8, 32, 64])
def test_slopes_of_a_power_of_two_are_geometric(n_head):
    expected = [2 ** (-8 * (i + 1) / n_head) for i in range(n_head)]
    assert alibi_slopes(n_head) == pytest.approx(expected, rel=1e-15)
    assert alibi_slopes(n_head)[-1] == 2**-8


def test_slopes_of_other_head_counts():
    """Twelve heads: the eight of eight, then the first, third, … of sixteen."""
    tail = [0.7071067811865476, 0.35355339059327373, 0.17677669529663687, 0.08838834764831843]
    assert alibi_slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + tail, rel=1e-14)
    assert alibi_slopes(3) == pytest.approx([2**-4, 2**-8, 2**-2])
    assert alibi_slopes(40)[32:] == pytest.approx([2 ** (-(2 * i + 1) / 8) for i in range(8)])
    for n_head in range(1, 50):
        slopes = alibi_slopes(n_head)
        assert len(slopes) == len(set(slopes)) == n_head and all(0 < s < 1 for s in slopes)


def naive(q, k, v, slopes, scaling):
    """softmax(q·k/√E − slope/κ · distance) with every score written out."""
    t, s = q.shape[-2], k.shape[-2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    distance = torch.arange(s - t, s).view(-1, 1) - torch.arange(s)
    slope = torch.tensor(slopes, dtype=q.dtype).view(-1, 1, 1) / scaling
    scores = q @ k.mT / math.sqrt(q.shape[-1]) - slope * distance
    return scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 3, 8]),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([1.0, 2.0, 2.5]),
)
def test_alibi_is_the_naive_bias(groups, per_group, d_head, start, new, scaling):
    """For any head count and grouping, all at once or from a cache."""
    heads = groups * per_group
    config = shaped(n_head=heads, n_kv_head=groups, d_head=d_head, alibi_scaling=scaling)
    q = draw(2, heads, new, d_head)
    k, v = (
        draw(2, groups, start + new, d_head, seed=1),
        draw(2, groups, start + new, d_head, seed=2),
    )
    got = where(config, start, start + new).attend(q, k, v)
    expected = naive(q, k, v, alibi_slopes(heads), scaling)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half a step of the largest slope · place, added up a few times; and bf16's rounding of v.
    [(torch.float32, 6 * 2**-24 * 0.71 * 2048), (torch.bfloat16, 2**-5)],
)
def test_alibi_at_4096_tokens(dtype, tolerance):
    config = shaped(n_head=12, d_head=80, seq_len=4096)
    q, k, v = (draw(1, 12, 4096, 80, seed=i) for i in range(3))
    rows = slice(-64, None)
    expected = naive(q[:, :, rows], k, v, alibi_slopes(12), 1.0)
    got = where(config, 0, 4096, dtype).attend(*(x.to(dtype) for x in (q, k, v)))[:, :, rows]
    assert (got.double() - expected).abs().max() < tolerance


def bias(config, length, dtype=torch.float64):
    """What is taken from the scores of the last query, (H, S), through ``dtype``."""
    place = where(config, 0, length)
    slopes, keys = (x.to(dtype).double() for x in (place.slopes, place.keys))
    marks = slopes.squeeze(1) @ keys.T
    return (marks[:, -1:] - marks) / math.sqrt(config.d_head)


def test_what_is_added_to_heads_survives_bf16():
    config = shaped(n_head=12, d_head=80)
    exact = torch.tensor(alibi_slopes(12), dtype=torch.float64).view(-1, 1) * torch.arange(
        8191.0, -1, -1
    )
    for dtype, rtol in ((torch.float64, 1e-12), (torch.bfloat16, 2**-20)):
        torch.testing.assert_close(bias(config, 8192, dtype), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("scaling", [2, 3, 4])
def test_interpolation_divides_distances(scaling):
    """The bias at κ and distance κ·k is that at 1 and distance k."""
    near, far = bias(TINY, 101), bias(shaped(alibi_scaling=float(scaling)), 100 * scaling + 1)
    torch.testing.assert_close(far[:, ::scaling], near, rtol=1e-12, atol=0)


def test_dynamic_scaling_begins_behind_the_trained_context():
    x = torch.randint(13, (2, 24), generator=torch.Generator().manual_seed(0))
    state = build(TINY).state_dict()

    def logits(tokens, scaling):
        model = build(shaped(alibi_scaling=scaling))
        model.load_state_dict(state)
        return model(tokens)

    assert torch.equal(logits(x[:, :8], 0.0), logits(x[:, :8], 1.0))
    assert torch.equal(logits(x, 0.0), logits(x, 3.0))
    assert not torch.allclose(logits(x, 0.0), logits(x, 1.0))


def test_rope_knows_distances_only():
    config = shaped(positions="rope", d_head=16)
    q, k = draw(1, 2, 5, 16), draw(1, 2, 5, 16, seed=1)
    here, there = where(config, 0, 5), where(config, 1000, 1005)
    scores = [p.rotate(q) @ p.rotate(k).mT for p in (here, there)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-12)
    mixed = there.rotate(q) @ here.rotate(k).mT
    assert not torch.allclose(mixed, scores[0])


def test_rope_turns_pairs_of_elements():
    """As complex numbers: (x_i + i x_{i+E/2}) · exp(i · place · 10000^(−2i/E))."""
    x = draw(1, 2, 7, 16)
    got = where(shaped(positions="rope", d_head=16), 3, 10).rotate(x)
    angle = torch.arange(3.0, 10, dtype=torch.float64).view(-1, 1) * 10000 ** (
        -torch.arange(8, dtype=torch.float64) / 8
    )
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-14)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("positions", ["alibi", "rope"])
def test_generation_works_behind_the_trained_context(positions):
    model = build(shaped(positions=positions))
    x = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = Cache()
    parts = [model(piece, cache=cache) for piece in x.split([7, 1, 5, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=0, atol=1e-10)


def test_order_matters_without_positions():
    """The causal mask alone tells places apart, but not the order of what is past."""
    model = build(shaped(positions="none", n_layer=1))
    x = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    torch.testing.assert_close(model(x)[:, -1], model(swapped)[:, -1], rtol=0, atol=1e-12)
    ordered = build(shaped(n_layer=1))
    assert not torch.allclose(ordered(x)[:, -1], ordered(swapped)[:, -1])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


@pytest.mark.parametrize("positions", ["learned", "alibi", "rope", "none"])
@pytest.mark.parametrize("kv", [6, 2])
def test_no_tensor_grows_as_the_square_of_the_context(positions, kv):
    """Forward and backward, with and without a cache: no mask and no scores in memory."""
    largest = []
    for length in (256, 512):
        model = build(shaped(positions=positions, seq_len=length, n_kv_head=kv))
        x = torch.zeros(1, length, dtype=torch.long)
        with Largest() as mode:
            model(x, x).mean().backward()
            cache = Cache()
            model(x[:, :-1], cache=cache)
            model(x[:, -1:], cache=cache)
        largest.append(mode.numel)
    assert largest[1] <= 2 * largest[0] < 512**2


def test_a_chunk_behind_a_cache_shares_one_mask():
    assert where(TINY, 4, 8).mask.shape == (4, 8)
    assert where(TINY, 7, 8).mask is None and where(TINY, 0, 8).mask is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "rope", "d_head": 3}, r"model\.d_head = 3: must be even"),
        ({"alibi_scaling": 0.5}, r"model\.alibi_scaling = 0\.5: must be >= 1, or 0"),
        ({"positions": "rope", "alibi_scaling": 2.0}, r"must be 1 unless positions = 'alibi'"),
        ({"qk_norm": True, "zero_init_q": True}, r"model\.zero_init_q = True: must be false with"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        shaped(**fields)
