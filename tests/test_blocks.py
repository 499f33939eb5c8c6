"""Every choice of block: the layout's parameters, K members as K models, generation as training."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.data.corpus import load_corpus
from mupgpt.evidence.coordinates import coord_check
from mupgpt.evidence.probes import activations, generation_gap
from mupgpt.model.gpt import GPT, Cache
from mupgpt.model.init import init_weights
from mupgpt.model.layers import RMSNorm
from mupgpt.model.losses import token_loss
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.layout import count_block_weights, count_params, layout
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize
from mupgpt.planning.flops import flops_per_token
from mupgpt.resolve import train_config
from mupgpt.training.population import Population
from mupgpt.training.step import train_step

TINY = GPTConfig(n_layer=2, d_model=24, n_head=6, d_head=4, vocab_size=13, seq_len=10)
BASE = Base(d_model=12, d_ffn=20.5, n_head=3, d_head=4, n_kv_head=3, n_layer=1)
BLOCKS = {
    "gpt": {},
    "btlm": {"positions": "alibi", "activation": "swiglu"},
    "llama": {
        "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "n_kv_head": 2, "tied": False,
    },
    "qk-norm": {"positions": "rope", "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 3},
    "relu2": {"positions": "none", "activation": "relu2", "qk_norm": True},
}  # fmt: skip
each_block = pytest.mark.parametrize("block", BLOCKS)
slow = pytest.mark.slow
MEMBERS = [
    HParams(init_std=0.3, emb_mult=2.0, output_mult=3.0),
    HParams(init_std=0.1, emb_mult=5.0, attn_mult=0.5),
    HParams(init_std=0.2, emb_mult=1.0, attn_mult=2.0, output_mult=0.5),
]


def shaped(block="gpt", **fields):
    return dataclasses.replace(TINY, **(BLOCKS[block] | fields))


def build(config, hparams=MEMBERS[0], seed=0, members=None):
    model = GPT(config, members=members).double()
    many = [hparams] if members is None else hparams
    tables = [parametrize(config, BASE, hp, "mup") for hp in many]
    init_weights(model, tables[0] if members is None else tables, seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


def shapes(**fields):
    """Any shape with any choice of blocks."""
    choices = {
        "layers": st.integers(1, 3), "kv": st.integers(1, 3), "groups": st.integers(1, 3),
        "half_head": st.integers(1, 4), "d": st.integers(1, 9), "ffn": st.integers(1, 9),
        "bias": st.booleans(), "tied": st.booleans(), "qk_norm": st.booleans(),
        "positions": st.sampled_from(["learned", "alibi", "rope", "none"]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "activation": st.sampled_from(["gelu", "swiglu", "relu2"]),
    }  # fmt: skip
    return st.builds(make_shape, **choices)


def make_shape(layers, kv, groups, half_head, d, ffn, **choices):
    return GPTConfig(
        n_layer=layers, d_model=d, n_head=kv * groups, n_kv_head=kv, d_head=2 * half_head,
        d_ffn=ffn, vocab_size=13, seq_len=6, **choices,
    )  # fmt: skip


@settings(derandomize=True, max_examples=60, deadline=None)
@given(shapes(), st.sampled_from([None, 2]))
def test_parameters_are_the_layout(config, members):
    model = GPT(config, members=members)
    leading = () if members is None else (members,)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert named == {spec.name: (*leading, *spec.shape) for spec in layout(config)}
    assert list(named) == [spec.name for spec in layout(config)]
    solo = sum(p.numel() for p in model.parameters()) // (members or 1)
    assert count_params(config) == solo
    assert flops_per_token(config, "6N") == 6 * solo
    matrices = [s for s in layout(config) if s.role == "hidden"]
    assert config.n_layer * count_block_weights(config) == sum(map(math.prod, shapes_of(matrices)))


def shapes_of(specs):
    return [spec.shape for spec in specs]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(shapes())
def test_members_are_solo_models_and_generation_is_training(config):
    """Losses and gradients of three members; logits through a cache in uneven pieces."""
    together = build(config, MEMBERS, seed=[0, 1, 1], members=3)
    x, y = tokens(3, 2, 6), tokens(3, 2, 6, seed=1)
    loss = together(x, y)
    loss.mean(dim=(1, 2)).sum().backward()
    grads = {name: p.grad for name, p in together.named_parameters()}
    for k, (hparams, seed) in enumerate(zip(MEMBERS, [0, 1, 1], strict=True)):
        solo = build(config, hparams, seed=seed)
        own = solo(x[k], y[k])
        torch.testing.assert_close(loss[k], own, rtol=0, atol=1e-10)
        own.mean().backward()
        for name, p in solo.named_parameters():
            torch.testing.assert_close(grads[name][k], p.grad, rtol=0, atol=1e-10)
        cache = Cache()
        pieces = [solo(piece, cache=cache) for piece in x[k].split([3, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), solo(x[k]), rtol=0, atol=1e-10)
        assert torch.equal(token_loss(solo(x[k]), y[k]), own)
    assert generation_gap(together, (x, y)) < 1e-10


@each_block
def test_a_population_trains_as_its_members_would(block):
    """Ten steps with learning rates, multipliers and seeds of their own, in float64."""
    config = shaped(block)
    rates = zip(MEMBERS, (0.01, 0.02, 0.005), strict=True)
    hparams = [dataclasses.replace(hp, lr=lr) for hp, lr in rates]
    runs = [build(config, hp, seed=k) for k, hp in enumerate(hparams)]
    together = build(config, hparams, seed=[0, 1, 2], members=3)
    x, y = tokens(10, 3, 2, 10), tokens(10, 3, 2, 10, seed=1)
    tables = [parametrize(config, BASE, hp, "mup") for hp in hparams]
    how = {"lr_factor": 1.0, "grad_clip": 1.0}
    optimizer = make_optimizer(together, tables)
    losses = [train_step(together, optimizer, (x[i], y[i]), **how)[0] for i in range(10)]
    for k, model in enumerate(runs):
        optimizer = make_optimizer(model, tables[k])
        for i in range(10):
            loss, _ = train_step(model, optimizer, (x[i, k], y[i, k]), **how)
            torch.testing.assert_close(losses[i][k], loss, rtol=0, atol=1e-10)
    together.keep_members([2, 0])
    torch.testing.assert_close(
        together(x[0, [2, 0]]), torch.stack([runs[2](x[0, 2]), runs[0](x[0, 0])]), rtol=0, atol=1e-9
    )


@slow
@each_block
def test_compiles_in_one_graph(block):
    model, x, y = build(shaped(block)), tokens(2, 10), tokens(2, 10, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), model(x, y), rtol=0, atol=1e-10)


@each_block
@pytest.mark.filterwarnings("error")
def test_mixed_precision_loses_digits_only(block):
    """Under autocast, as on a GPU: finite gradients and a loss near that of float64."""
    config = shaped(block)
    exact, model = build(config), build(config).float()
    x, y = tokens(2, 10), tokens(2, 10, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert (loss.double() - exact(x, y)).abs().max() < 0.05 * exact(x).abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_block
def test_every_rule_has_a_row_for_every_parameter(block):
    config = shaped(block)
    for rule in RULES:
        table = parametrize(config, BASE, HParams(), rule)
        assert list(table.rows) == [name for name, _ in GPT(config).named_parameters()]


@each_block
@pytest.mark.parametrize("zero_init_q", [True, False])
def test_initial_weights_are_the_table_s(block, zero_init_q):
    if BLOCKS[block].get("qk_norm"):
        zero_init_q = False
    config = shaped(block, d_model=192, d_ffn=0, d_head=32, n_head=6, zero_init_q=zero_init_q)
    table = parametrize(config, BASE, HParams(), "mup")
    model = GPT(config)
    init_weights(model, table)
    for name, p in model.named_parameters():
        row = table.rows[name]
        if row.init == "normal":
            few = 4 / math.sqrt(2 * p.numel())
            assert float(p.detach().std()) == pytest.approx(row.init_std, rel=few), name
        else:
            assert (p == (row.init == "ones")).all(), name
    q = model.blocks[0].attn.q.weight
    assert bool((q == 0).all()) == zero_init_q
    assert model(tokens(1, 4)).isfinite().all()


@pytest.mark.parametrize("block", ["btlm", "llama", "qk-norm"])
def test_grouped_heads_are_repeated_heads(block):
    grouped = build(shaped(block, n_kv_head=2))
    full = build(shaped(block, n_kv_head=6))
    state = dict(grouped.named_parameters())
    with torch.no_grad():
        for name, p in full.named_parameters():
            value = state[name]
            if value.shape != p.shape:  # two groups of three query heads
                heads = value.unflatten(0, (2, 4))
                value = heads.repeat_interleave(3, dim=0).flatten(0, 1)
            p.copy_(value)
    x = tokens(2, 10)
    torch.testing.assert_close(full(x), grouped(x), rtol=0, atol=1e-12)


def test_activations_are_their_formulas():
    x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = {
        "gelu": lambda m: F.gelu(m.up(x)),
        "swiglu": lambda m: m.gate(x) * torch.sigmoid(m.gate(x)) * m.up(x),
        "relu2": lambda m: m.up(x).clamp(min=0) ** 2,
    }
    for activation, inside in expected.items():
        mlp = build(shaped(activation=activation)).blocks[0].mlp
        torch.testing.assert_close(mlp(x), mlp.down(inside(mlp)), rtol=0, atol=1e-12)


def test_rmsnorm_is_its_formula():
    norm = RMSNorm(6, members=None).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_rmsnorm_of_two_precisions_is_the_wider_one(weights, inputs):
    """Autocast brings bf16 to fp32 weights, sharding bf16 weights to the fp32 stream."""
    norm = RMSNorm(6, members=None).to(weights)
    torch.nn.init.ones_(norm.weight)
    assert norm(torch.ones(2, 6, dtype=inputs)).dtype == torch.promote_types(weights, inputs)


def test_widths_of_the_mlp():
    """SwiGLU's three matrices have as many weights as two of width 4 d_model."""
    assert shaped(d_ffn=0).d_ffn == 96 and shaped(d_ffn=0, activation="swiglu").d_ffn == 64
    for activation in ("gelu", "swiglu"):
        config = shaped(d_ffn=0, activation=activation, bias=False)
        assert count_block_weights(config) == 12 * 24**2


def scores(config, scale=1.0, attn_mult=1.5):
    """Attention logits of all layers, with queries' and keys' weights multiplied by ``scale``."""
    model = build(config, [HParams(init_std=0.5, attn_mult=attn_mult)], members=1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(scale)
            block.attn.k.weight.mul_(scale)
    return activations(model, (tokens(1, 2, 10), tokens(1, 2, 10, seed=1)))["scores"]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("d_head", [4, 16])
def test_qk_norm_bounds_scores_at_every_d_head(norm, d_head):
    """By attn_mult times √d_head of the base (here 4), whatever the weights are."""
    config = shaped(qk_norm=True, norm=norm, bias=False, d_head=d_head)
    for scale in (1.0, 100.0):
        assert scores(config, scale).abs().max() <= 1.5 * math.sqrt(BASE.d_head)
    torch.testing.assert_close(scores(config), scores(config, 100.0), rtol=1e-3, atol=1e-3)
    first = dataclasses.replace(config, n_layer=1)  # the next one's input has moved, too
    torch.testing.assert_close(scores(first, attn_mult=3.0), 2 * scores(first))
    assert scores(dataclasses.replace(config, qk_norm=False), 100.0).abs().max() > 100


@each_block
def test_multipliers_reach_every_block(block):
    """Each named point changes the logits, in training and through a cache alike."""
    config, x = shaped(block), tokens(2, 10)
    plain = build(config)
    table = parametrize(config, BASE, MEMBERS[0], "mup")
    for point in table.multipliers:
        model = build(config)
        more = dataclasses.replace(
            table.multipliers[point], value=2.0 * table.multipliers[point].value
        )
        model.apply_table(
            dataclasses.replace(table, multipliers={**table.multipliers, point: more})
        )
        assert (model(x) - plain(x)).abs().max() > 1e-3, point  # more than a norm's ε lets through
        first = Cache()
        cached = torch.cat([model(piece, cache=first) for piece in x.split(5, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(x), rtol=0, atol=1e-10)


def test_a_population_of_another_block_takes_the_ordinary_door(tmp_path):
    """From plain data to trained members: one field of the model is all that changes."""
    (tmp_path / "a.txt").write_text("spam and eggs, " * 400)
    raw = {
        "model": {"preset": "proxy-32", **BLOCKS["btlm"]}, "steps": 3, "batch_size": 2,
        "data": {"source": str(tmp_path / "a.txt"), "eval_tokens": 128},
    }  # fmt: skip
    configs = [train_config(raw | {"seed": seed}) for seed in (0, 1)]
    population = Population(configs, load_corpus(configs[0].data))
    assert population.train().isfinite().all()
    assert len(population.evaluate()) == 2


CHECKED = {
    "alibi, κ = 2": {"positions": "alibi", "alibi_scaling": 2.0},
    "btlm": BLOCKS["btlm"],
    "grouped heads": {"n_head": 4, "n_kv_head": 2},
    "llama": {**BLOCKS["llama"], "n_head": 4, "n_kv_head": 2},
    "no biases": {"bias": False},
    "no positions": {"positions": "none"},
    "qk-norm": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"positions": "rope"},
    "swiglu of any width": {"activation": "swiglu", "d_ffn": 48},
}
WHOLE = ("btlm", "llama")  # of the others' parts


@pytest.mark.parametrize(
    "block", [b if b in WHOLE else pytest.param(b, marks=slow) for b in CHECKED]
)
def test_each_block_passes_its_check_under_mup_alone(block):
    sizes = {"sizes": (32, 64, 128), "seeds": range(4), "shape": CHECKED[block]}
    check = coord_check("mup", **sizes)
    assert check.passed and not check.suspects, str(check)
    control = coord_check("sp", **sizes)
    assert not control.passed
    assert {"lr.hidden", "forward.readout", "init_std.hidden"} <= set(control.suspects)


@slow
@pytest.mark.parametrize("block", CHECKED)
def test_each_block_passes_over_depth_under_completep_alone(block):
    sizes = {"axis": "depth", "sizes": (2, 4, 8), "seeds": range(4), "shape": CHECKED[block]}
    check = coord_check("completep", **sizes)
    assert check.passed and not check.suspects, str(check)
    assert "lr.hidden" in coord_check("mup", **sizes).suspects


@slow
def test_a_gate_at_another_learning_rate_is_seen():
    """The check sees the blocks' own matrices: with a constant lr of matrices it fails."""
    wrong = dataclasses.replace(RULES["mup"], lr={})
    check = coord_check("mup", wrong, sizes=(32, 64, 128), seeds=range(4), shape=CHECKED["btlm"])
    assert not check.passed and "lr.hidden" in check.suspects
