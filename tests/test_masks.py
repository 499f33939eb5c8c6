"""Static masks: the share that was asked for, the same everywhere, and SµPar's law on them."""

import copy
import dataclasses
import hashlib
import math
import shutil

import numpy as np
import pytest
import torch
from ranks import launch
from scipy.stats import sem
from torch.nn import functional as F

from mupgpt.checkpoint.state import load_model
from mupgpt.checkpoint.verify import load_newest
from mupgpt.config.plain import load_toml
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.data.corpus import Corpus
from mupgpt.errors import CheckpointError, ConfigError
from mupgpt.evidence.coordinates import coord_check
from mupgpt.evidence.memory_trace import trace_peak
from mupgpt.evidence.verdict import judge_sweep
from mupgpt.model.gpt import GPT, Cache
from mupgpt.model.init import BLOCK_ROWS, init_weights, keyed_mask
from mupgpt.model.layers import Linear
from mupgpt.model.shards import piece
from mupgpt.mutransfer.transfer import transfer
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.layout import ParamSpec, count_kept, count_params, layout
from mupgpt.parametrization.table import parametrize, parametrize_layout
from mupgpt.planning.flops import CONVENTIONS, flops_per_token
from mupgpt.planning.memory import moments
from mupgpt.resolve import overlay, train_config
from mupgpt.runs.generate import load_run
from mupgpt.trainer import Trainer
from mupgpt.training.metrics import read_metrics
from mupgpt.training.population import Population
from mupgpt.training.step import train_step
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import parse_spec
from mupgpt.util.bundled import find_bundled

slow = pytest.mark.slow

SHAPE = GPTConfig(n_layer=2, d_model=96, n_head=3, d_ffn=400, vocab_size=50, seq_len=16,
                  density=0.25)  # fmt: skip
GROUPS = dataclasses.replace(SHAPE, activation="swiglu", density=1.0, density_attn=0.5,
                             density_mlp=0.125)  # fmt: skip
DENSE = dataclasses.replace(SHAPE, density=1.0)
HP = HParams(lr=0.01, init_std=0.1, emb_mult=3.0, weight_decay=0.3)
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def table(shape, rule="supar", base=DENSE):
    return parametrize(shape, Base.of(base), HP, rule)


def made(shape, seeds=0, rule="supar", dtype=torch.float64):
    """An initialized model, or one of a member a seed."""
    model = GPT(shape, None if isinstance(seeds, int) else len(seeds)).to(dtype)
    init_weights(model, table(shape, rule), seeds)
    return model


def batch(rows=4, members=None):
    shape = (rows, 17) if members is None else (members, rows, 17)
    tokens = torch.randint(50, shape, generator=torch.Generator().manual_seed(1))
    return tokens[..., :-1], tokens[..., 1:]


def within(share, expected, n, errors=4.0):
    return abs(share - expected) < errors * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("shape", [SHAPE, GROUPS, dataclasses.replace(SHAPE, density=1 / 64)])
def test_masks_keep_the_share_that_was_asked_for(shape):
    """Of each matrix inside blocks, and of nothing else; their sum is what is counted."""
    model, kept, drawn = made(shape), 0, 0
    asked = {"attn": shape.density_attn or shape.density, "mlp": shape.density_mlp or shape.density}
    for name, mask in model.masks().items():
        density = asked[name.split(".")[2]]
        assert within(mask.double().mean().item(), density, mask.numel()), name
        kept, drawn = kept + int(mask.sum()), drawn + mask.numel()
    matrices = {name.rpartition(".")[0].split(".", 2)[2] for name in model.masks()}
    assert matrices == {m for m in MATRICES if m != "mlp.gate" or shape.gated}
    assert drawn == sum(math.prod(s.shape) for s in layout(shape) if s.role == "hidden")
    expected = count_kept(shape) - (count_params(shape) - drawn)
    assert abs(kept - expected) < 4 * math.sqrt(drawn) / 2


def test_one_group_may_stay_dense():
    model = made(dataclasses.replace(SHAPE, density=1.0, density_mlp=0.5))
    assert {name.split(".")[2] for name in model.masks()} == {"mlp"}


def test_density_one_registers_nothing():
    model = made(DENSE)
    assert not list(model.buffers())
    assert [n for n in model.state_dict() if n != "head.weight"] == list(table(DENSE).rows)


def test_golden_bits():
    """NumPy does not promise its streams across versions: this says when they changed."""
    bits = keyed_mask(3, "blocks.1.attn.q.mask", 2, (128, 64), 0.3).tobytes()
    digest = hashlib.sha256(bits).hexdigest()
    assert digest == "7693d31dcef8e291e9ae973ac8f840a2238b48b4938d450a6f80d6343da2a13a"


def test_masks_have_streams_of_their_own():
    """By block, layer, matrix and seed; weights that are kept are no larger than others."""
    masks = made(dataclasses.replace(SHAPE, density=0.5)).masks()
    other = made(dataclasses.replace(SHAPE, density=0.5), seeds=1).masks()
    n = BLOCK_ROWS * 96
    up = masks["blocks.0.mlp.up.mask"]
    pairs = [
        (up[:BLOCK_ROWS], up[BLOCK_ROWS : 2 * BLOCK_ROWS]),
        (up[:BLOCK_ROWS], masks["blocks.1.mlp.up.mask"][:BLOCK_ROWS]),
        (up[:BLOCK_ROWS], other["blocks.0.mlp.up.mask"][:BLOCK_ROWS]),
        (up[:96], masks["blocks.0.attn.q.mask"]),
        (up[:96], up[:96].T),
    ]
    for a, b in pairs:
        assert within((a == b).double().mean().item(), 0.5, min(n, a.numel()))
    dense = made(DENSE).get_parameter("blocks.0.mlp.up.weight")
    sizes = dense.abs()
    assert abs(sizes[up].mean() - sizes[~up].mean()) < 4 * sizes.std() * 2 / math.sqrt(up.numel())


def test_a_higher_density_keeps_what_a_lower_one_keeps():
    low, high = (made(dataclasses.replace(SHAPE, density=p)).masks() for p in (0.1, 0.4))
    assert all(bool(high[name][mask].all()) for name, mask in low.items())


def same_masks(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == torch.bool and torch.equal(a[name], b[name]), name


def test_the_mask_is_state():
    """Of copies, of reloaded models, of members and those that are left, in any dtype."""
    solo = {seed: made(SHAPE, seed) for seed in (4, 5)}
    same_masks(copy.deepcopy(solo[4]).masks(), solo[4].masks())
    same_masks(made(SHAPE, 4, dtype=torch.bfloat16).masks(), solo[4].masks())
    reloaded = GPT(SHAPE).double()
    reloaded.load_state_dict(solo[4].state_dict())
    reloaded.apply_table(table(SHAPE))
    same_masks(reloaded.masks(), solo[4].masks())
    assert torch.equal(reloaded(*batch()), solo[4](*batch()))
    together = made(SHAPE, [4, 5, 5, 4])
    for members in ([4, 5, 5, 4], [5, 4]):
        for k, seed in enumerate(members):
            same_masks({n: m[k] for n, m in together.masks().items()}, solo[seed].masks())
            for name, p in solo[seed].named_parameters():
                assert torch.equal(together.get_parameter(name)[k], p)
        if len(members) == 4:
            together.keep_members([2, 3])
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks.0.attn.q.mask"):
        reloaded.load_state_dict(made(DENSE, 4).state_dict())


@pytest.mark.parametrize("shape", [SHAPE, GROUPS])
def test_the_forward_is_that_of_a_dense_model_of_the_kept_weights(shape):
    """Logits, losses and generation through a cache, bit for bit; so are the kept gradients."""
    model = made(shape)
    dense_shape = dataclasses.replace(shape, density=1.0, density_attn=1.0, density_mlp=1.0)
    dense = GPT(dense_shape).double()
    dense.load_state_dict({n: t for n, t in model.state_dict().items() if n[-4:] != "mask"})
    dense.apply_table(table(shape))
    with torch.no_grad():  # what is stored in dropped places must not matter
        for name, mask in model.masks().items():
            model.get_parameter(name.removesuffix("mask") + "weight")[~mask] = 7.0
    x, y = batch()
    losses = [m(x, y) for m in (model, dense)]
    assert torch.equal(*losses)
    cache = Cache()
    pieces = [model(piece, cache=cache) for piece in x.split(6, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), dense(x), rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.mean().backward()
    masks = model.masks()
    for name, p in model.named_parameters():
        expected = dense.get_parameter(name).grad
        if (mask := masks.get(name.removesuffix("weight") + "mask")) is not None:
            assert bool((expected[~mask] != 0).any())
            expected = expected * mask
        assert torch.equal(p.grad, expected), name


@pytest.mark.parametrize("rule", ["supar", "mup-lion", "mup-sgd"])
@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_dropped_weights_start_at_zero_and_stay(rule, seeds):
    """Under decay and clipping; the kept ones move, all of them."""
    model = made(SHAPE, seeds, rule)
    optimizer = make_optimizer(model, table(SHAPE, rule))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = batch(members=None if isinstance(seeds, int) else 2)
    for _ in range(3):
        train_step(model, optimizer, data, lr_factor=1.0, grad_clip=0.1)
    for name, mask in model.masks().items():
        name = name.removesuffix("mask") + "weight"
        weight = model.get_parameter(name)
        assert not weight[~mask].any() and not weight.grad[~mask].any()
        assert bool((weight != start[name])[mask].all())


@pytest.mark.parametrize("memory", ["split", "lean"])
def test_rounding_moves_no_dropped_weight(memory):
    """Sixteen-bit weights under an optimizer that rounds at random."""
    model = made(SHAPE, dtype=torch.bfloat16)
    optimizer = make_optimizer(model, table(SHAPE), memory)
    for _ in range(3):
        train_step(model, optimizer, batch(), lr_factor=1.0, grad_clip=0.1)
    for name, mask in model.masks().items():
        weight = model.get_parameter(name.removesuffix("mask") + "weight")
        assert not weight[~mask].any() and bool(weight[mask].all())


@slow
@pytest.mark.parametrize("members", [None, 2])
def test_a_compiled_step_is_the_eager_one(members):
    seeds = 0 if members is None else [0, 1]
    eager, compiled = made(SHAPE, seeds), made(SHAPE, seeds)
    compiled.compile(backend="aot_eager")
    for model in (eager, compiled):
        model(*batch(members=members)).mean().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_each_group_has_a_ratio_of_its_own():
    one = dataclasses.replace(GROUPS, density_attn=1.0, density_mlp=1.0)
    rows, dense, own = (
        {row.site: row for row, _ in table(shape, base=base).sites()}
        for shape, base in ((GROUPS, DENSE), (one, DENSE), (GROUPS, GROUPS))
    )
    for site, row in rows.items():
        share = {"attn": 0.5, "mlp": 0.125}[site.split(".")[2]] if row.role == "hidden" else 1.0
        assert row.lr == dense[site].lr / share
        assert row.weight_decay == dense[site].weight_decay * share
        assert row.init_std == pytest.approx(dense[site].init_std / math.sqrt(share))
        assert own[site].lr == 0.01


@pytest.mark.parametrize("convention", sorted(CONVENTIONS.keys() - {"6N-stored"}))
def test_flops_and_counts_know_the_groups(convention):
    dropped = 2 * (0.5 * 4 * 96**2 + 0.875 * 3 * 96 * 400)
    dense = dataclasses.replace(GROUPS, density_attn=0.0, density_mlp=0.0)
    assert count_kept(dense) - count_kept(GROUPS) == dropped
    saved = flops_per_token(dense, convention) - flops_per_token(GROUPS, convention)
    assert saved == pytest.approx(6 * dropped, rel=1e-12)


def config(home, changes=None):
    """A run of a few steps; halves of a weight's rows are no whole blocks."""
    (home / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))
    raw = {
        "model": {"n_layer": 2, "d_model": 24, "n_head": 4, "d_ffn": 290, "vocab_size": 257,
                  "seq_len": 16, "density": 0.5, "density_mlp": 0.25},
        "base": {"d_model": 24, "d_ffn": 290, "n_head": 4, "d_head": 6, "n_kv_head": 4,
                 "n_layer": 2},
        "rule": "supar", "batch_size": 8, "steps": 6, "precision": "fp64", "seed": 3,
        "data": {"tokenizer": "bytes", "eval_tokens": 80, "source": f"{home}/text.txt"},
        "tracking": {"log_every": 1, "eval_every": 3, "checkpoint_every": 3, "wandb": "off"},
    }  # fmt: skip
    return train_config(overlay(raw, changes or {}))


@pytest.mark.parametrize(("memory", "way"), [("lean", "full"), ("exact", "none")])
def test_plan_counts_masks(tmp_path, memory, way):
    """A byte a masked weight and, where nothing is computed again, the products."""
    shape = {"n_layer": 3, "d_model": 512, "n_head": 4, "d_ffn": 2048, "vocab_size": 300,
             "seq_len": 32, "density": 0.25, "density_mlp": 0.0}  # fmt: skip
    run = config(tmp_path, {"model": shape, "memory": memory, "precision": "auto",
                            "parallel": {"checkpointing": way}})  # fmt: skip
    traced = trace_peak(run)
    peak = max(moments(run, memory, way), key=lambda need: need.total)
    assert traced["Buffer"] == peak.parts["masks"] == 3 * 12 * 512**2
    assert peak.total == pytest.approx(traced["Total"], rel=0.06)


def test_a_run_keeps_its_masks(tmp_path):
    """The seed's; continued bit for bit; sampled from; and no dense checkpoint is taken for one."""
    made_here = Trainer(config(tmp_path), tmp_path / "whole")
    whole = made_here.fit()
    drawn = GPT(made_here.config.model)
    init_weights(drawn, made_here.table, 3)
    same_masks(made_here.model.masks(), drawn.masks())
    Trainer(config(tmp_path, {"steps": 6}), tmp_path / "cut")
    part = Trainer(config(tmp_path), tmp_path / "cut")
    part._lr_factor = stop_at(part, 4)
    with pytest.raises(StopIteration):
        part.fit()
    again = Trainer(config(tmp_path), tmp_path / "cut")
    assert again.fit() == whole
    model, _ = load_run(tmp_path / "cut")
    same_masks(model.masks(), drawn.masks())
    saved = load_newest(tmp_path / "cut" / "checkpoints").tensors("model")
    for name, mask in model.masks().items():
        assert torch.equal(saved[name], mask)
        assert not saved[name.removesuffix("mask") + "weight"][~mask].any()
    Trainer(config(tmp_path, DENSE_RUN), tmp_path / "dense").fit()
    with pytest.raises(CheckpointError, match=r"model 'blocks.0.attn.k.mask' is not in it"):
        load_model(drawn, load_newest(tmp_path / "dense" / "checkpoints"))


DENSE_RUN = {"model": {"density": 1.0, "density_mlp": 0.0}, "steps": 2}


def stop_at(trainer, step):
    """A learning rate that ends the run in front of ``step``, as if it had been killed."""
    original = trainer._lr_factor

    def factor(at):
        if at == trainer.step == step:
            raise StopIteration
        return original(at)

    return factor


RNG = np.random.default_rng(0)
CORPUS = Corpus(
    name="planted",
    train=RNG.integers(0, 50, 4000).astype(np.uint16),
    val=RNG.integers(0, 50, 800).astype(np.uint16),
    tokenizer="bytes",
    sha256="0" * 64,
    bytes=4800,
    bytes_per_token=1.0,
)


def test_members_are_solo_runs(tmp_path):
    """Each with the mask of its own seed, before and after another one has gone."""
    runs = [
        config(tmp_path, {"model": {"vocab_size": 50}, "steps": 12, "seed": seed, "rule": rule,
                          "data": {"eval_tokens": 64}})
        for seed, rule in ((0, "supar"), (1, "mup"), (0, "mup"), (2, "supar"))
    ]  # fmt: skip
    together = Population(runs, CORPUS)
    together.train(6)
    together.keep([3, 1, 2])
    together.train()
    losses = together.evaluate()
    for place, k in enumerate((3, 1, 2)):
        alone = Population([runs[k]], CORPUS)
        alone.train()
        assert losses[k] == pytest.approx(alone.evaluate()[0], abs=1e-10)
        one = {name: mask[0] for name, mask in alone.model.masks().items()}
        same_masks({n: m[place] for n, m in together.model.masks().items()}, one)
    with pytest.raises(ConfigError, match=r"model.vocab_size differs .*\[structure\]"):
        Population([runs[0], config(tmp_path)], CORPUS)


def sharded(home, changes, name):
    """Compare this process's boxes with a whole model's, train, and load what was saved."""
    run = Trainer(config(home, changes), home / name)
    run._build()
    whole = GPT(run.config.model).double()
    init_weights(whole, run.table, run.config.seed)
    for key, mask in run.model.masks().items():
        mine = piece(mask)
        ends = zip(mine.offset, mine.data.shape, strict=True)
        box = whole.masks()[key][tuple(slice(a, a + n) for a, n in ends)]
        assert mine.data.dtype == torch.bool and torch.equal(mine.data, box), key
        assert mine.data.numel() * run.config.parallel.tensor == whole.masks()[key].numel()
    for key, p in run.model.named_parameters():
        assert torch.equal(p.full_tensor(), whole.get_parameter(key)), key
    run.fit()
    again = Trainer(run.config, home / name)
    again._build()
    with torch.no_grad():
        for mask in again.model.masks().values():
            piece(mask).data.fill_(True)
    again._restore(load_newest(home / name / "checkpoints"))
    for key, mask in again.model.masks().items():
        assert torch.equal(piece(mask).data, piece(run.model.masks()[key]).data), key
    for key, p in run.model.named_parameters():
        if key.removesuffix("weight") + "mask" in whole.masks():
            kept = whole.masks()[key.removesuffix("weight") + "mask"]
            assert not p.full_tensor()[~kept].any(), key


@slow
@pytest.mark.parametrize(
    ("world", "how"),
    [
        (2, {"parallel": {"checkpointing": "selective"}}),
        (2, {"parallel": {"tensor": 2}}),
        (4, {"parallel": {"tensor": 2, "checkpointing": "full"}}),
    ],
)
def test_a_sharded_model_has_the_same_masks(tmp_path, world, how):
    """FSDP2, tensor parallel and both: masks, records and checkpoints of one process, which can
    go on with a run of several."""
    launch(world, sharded, tmp_path, how, "shards")
    Trainer(config(tmp_path), tmp_path / "one").fit()
    shutil.copytree(tmp_path / "shards", tmp_path / "resharded")
    shutil.rmtree(tmp_path / "resharded" / "checkpoints" / "step-00000006")
    Trainer(config(tmp_path), tmp_path / "resharded").fit()
    whole = load_newest(tmp_path / "one" / "checkpoints").tensors("model")
    for name in ("shards", "resharded"):
        for mine, one in zip(*(read_metrics(tmp_path / n / "metrics.jsonl") for n in (name, "one")),
                             strict=True):  # fmt: skip
            for key in mine.keys() & {"train/loss", "train/grad_norm", "val/loss"}:
                assert mine[key] == pytest.approx(one[key], rel=1e-10), (name, key)
        saved = load_newest(tmp_path / name / "checkpoints").tensors("model")
        same_masks(*({n: t for n, t in s.items() if n.endswith("mask")} for s in (saved, whole)))


D = 1024


def levels(rule, density, seed):
    """Mean |h| of both hidden layers of an MLP at initialization, and |Δh| after ten Adam steps."""
    spec = {"role": "hidden", "shape": (D, D), "fan_in": D, "fan_out": D}
    specs = [ParamSpec(name=f"{n}.weight", density=density, **spec) for n in ("one", "two")]
    dense = [dataclasses.replace(s, density=1.0) for s in specs]
    hparams = HParams(lr=2**-12, init_std=D**-0.5)
    quantities = {"m_d": 1.0, "m_L": 1.0, "m_dh": 1.0, "2L": 1.0, "d_head": 1.0}
    rows = parametrize_layout(specs, dense, quantities, hparams, rule).params
    stream = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(16, D, generator=stream) for _ in range(2))
    layers = [Linear(D, D, bias=False, members=None, masked=True) for _ in rows]
    for layer, row in zip(layers, rows, strict=True):
        layer.weight.data.normal_(0.0, row.init_std, generator=stream)
        layer.mask.copy_(torch.from_numpy(keyed_mask(seed, row.name, 0, (D, D), density)))

    def hidden():
        one = layers[0](x)
        return one, layers[1](F.relu(one))

    groups = [{"params": [p.weight], "lr": r.lr} for p, r in zip(layers, rows, strict=True)]
    adam = torch.optim.Adam(groups, eps=1e-12)
    start = [h.detach() for h in hidden()]
    for _ in range(10):
        adam.zero_grad()
        (hidden()[1] * y).mean().backward()
        adam.step()
    end = hidden()
    moved = [(b - a).abs().mean().item() for a, b in zip(start, end, strict=True)]
    return [h.abs().mean().item() for h in start], moved


def test_supar_keeps_activations_and_their_changes_down_to_a_64th():
    """Under mup they fall: |h| as √ρ a layer, and changes faster."""
    densities = (1.0, 1 / 4, 1 / 16, 1 / 64)
    found = {
        rule: np.log2([levels(rule, density, 0) for density in densities])
        for rule in ("supar", "mup")
    }  # (densities, init or change, layers)
    octaves = np.log2(densities)
    (init, change), (mup_init, mup_change) = (
        np.polyfit(octaves, values.reshape(4, -1), 1)[0].reshape(2, 2) for values in found.values()
    )
    ratio = 2 ** (found["supar"] - found["supar"][0])[..., 1]  # of the second layer to a dense one
    assert abs(ratio[:, 0] - 1).max() < 0.1 and abs(ratio[:, 1] - 1).max() < 0.25
    assert init == pytest.approx([0.0, 0.0], abs=0.03)
    # Rows of 16 weights see single tokens, not their mean: changes are a little larger.
    assert change.min() > -0.2 and change.max() < 0.0
    assert mup_init == pytest.approx([0.5, 1.0], abs=0.03)
    assert mup_change[0] > 0.7 and mup_change[1] > 1.3


@slow
def test_the_coordinate_check_over_density():
    """It passes; under mup sparser models have smaller activations and smaller changes."""
    density = {"axis": "density", "sizes": (0.125, 0.25, 1.0), "seeds": range(4)}
    assert coord_check("supar", **density).passed
    mup = coord_check("mup", **density)
    assert set(mup.suspects) == {"lr.hidden", "init_std.hidden"}
    change = next(s for s in mup.slopes if (s.measure, s.probe) == ("change", "residual.last"))
    assert change.slope > 0.5


@slow
@pytest.mark.timeout(900)
def test_the_best_learning_rate_stays_put_under_supar_alone():
    """The sweep `density` at its ends, 1 and 1/16, on three seeds that all runs share."""
    raw = {"name": "ends", **load_toml(find_bundled("density"))}
    ends = {
        "study": {"seeds": [0, 1, 2]},
        "structure": {"model.density": [1.0, 0.0625]},
        "space": {"hparams.lr": {"points": 3}},
    }
    run_sweep(parse_spec(overlay(raw, ends), "ends"), workers=2)
    drifts = judge_sweep("ends", axis="density").rules
    kept, moved = (np.array(drifts[rule].shifts) for rule in ("supar", "mup"))
    assert abs(kept.mean()) + 3 * sem(kept) < 0.2
    assert (kept - moved).mean() > max(0.2, 3 * sem(kept - moved))
    assert drifts["supar"].regret < 0.015 < drifts["mup"].regret


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.0}, r"model.density = 0.0: must be > 0"),
        ({"density_mlp": 1.5}, r"model.density_mlp = 1.5: must be <= 1"),
        ({"density_attn": math.nan}, r"model.density_attn = nan: must be a number"),
    ],
)
def test_what_is_no_share_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SHAPE, **changes)
    with pytest.raises(ConfigError, match=r"base.density_mlp = -1.0: must be >= 0"):
        dataclasses.replace(Base.of(SHAPE), density_mlp=-1)


def test_a_transfer_sees_the_groups():
    proxy = train_config({"model": "proxy-32", "rule": "supar"})
    plan = transfer(proxy, {"model": {"preset": "proxy-32", "density_mlp": 0.25}})
    (axis,) = plan.axes[:1]
    assert (axis.name, axis.source, axis.target) == ("density", 1.0, "attn 1, mlp 0.25")
    rates = [plan.table.site(f"blocks.*.{name}.weight").lr for name in ("mlp.up", "attn.q")]
    assert rates[0] == pytest.approx(4 * rates[1])
    with pytest.raises(ConfigError, match=r"rule mup does not cover: density 1 → attn 1, mlp 0.25"):
        transfer(dataclasses.replace(proxy, rule="mup"),
                 {"model": {"preset": "proxy-32", "density_mlp": 0.25}})  # fmt: skip
