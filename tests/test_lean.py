"""Sixteen-bit optimizers: exact masters, unbiased rounding, slices, and the same loss curve."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mupgpt.checkpoint.verify import load_newest
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.shards import global_norm
from mupgpt.optim.groups import param_groups
from mupgpt.optim.lean import LeanAdamW, join, round_stochastic, split
from mupgpt.optim.make import make_optimizer
from mupgpt.optim.rates import set_lr
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.step import train_step

SHAPE = GPTConfig(n_layer=2, d_model=24, n_head=2, d_ffn=40, vocab_size=13, seq_len=10)
BASE = Base(d_model=12, d_ffn=20, n_head=1, d_head=12, n_kv_head=1, n_layer=1)
TABLE = parametrize(SHAPE, BASE, HParams(lr=1e-2, weight_decay=0.3, lr_mult_hidden=3.0), "mup")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(n=200_000):
    """fp32 numbers of all sizes, and the ones where rounding is special."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator(), dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0x3F807FFF, 0x3F808001])
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 3.3e38, torch.inf, -torch.inf])
    return torch.cat([x[x.isfinite()], ties.to(torch.int32).view(torch.float32), ends])


def test_weight_and_remainder_are_the_master():
    x = numbers()
    weight, remainder = torch.empty_like(x, dtype=torch.bfloat16), x.to(torch.int16)
    split(x, weight, remainder)
    assert torch.equal(join(weight, remainder).view(torch.int32), x.view(torch.int32))
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert 3 <= tie.sum() < 20
    assert torch.equal(weight[~tie], x.bfloat16()[~tie])
    assert (weight[tie].double().abs() > x[tie].double().abs()).all()


def half_model():
    model = GPT(SHAPE)
    init_weights(model, TABLE, 0)
    return model.bfloat16()


def gradients(model, step):
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator(step)) * 10.0 ** (step % 7 - 5)).to(p)


def masters(optimizer):
    """Parameter → its fp32 master."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: join(p.detach(), optimizer.state[p]["remainder"]) for p in params}


def test_masters_are_adamws_bit_for_bit():
    """fp32 moments and equal gradients: after 60 steps under a schedule every bit is the same."""
    model = half_model()
    reference = GPT(SHAPE)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ours = LeanAdamW(
        param_groups(model, TABLE), remainder=True, moments=torch.float32, slice_size=128
    )
    groups = param_groups(reference, TABLE)
    assert len(groups) > 2
    theirs = torch.optim.AdamW(groups, foreach=False, fused=False)
    for step in range(60):
        gradients(model, step)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad.float()
        for optimizer in (ours, theirs):
            set_lr(optimizer, 1 / (1 + step))
            optimizer.step()
    exact = masters(ours)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(exact[p], q.detach()), name
        assert torch.equal(p, q.bfloat16()), name


def is_rounded(x, stored):
    """``stored`` (bf16) is one of the two neighbours of ``x`` (fp32)."""
    low = x.view(torch.int32) & -0x10000
    ends = [bits.view(torch.float32) for bits in (low, low + 0x10000)]
    return bool(((stored == ends[0]) | (stored == ends[1])).all())


@pytest.mark.parametrize("memory", ["split", "lean"])
def test_each_step_is_adamws_from_what_is_stored(memory):
    """With bf16 moments, too: masters bit for bit, all that is rounded to a neighbour."""
    model = half_model()
    ours = make_optimizer(model, TABLE, memory)
    ours.slice_size = 100
    for step in range(6):
        reference = GPT(SHAPE)
        theirs = torch.optim.AdamW(param_groups(reference, TABLE), foreach=False, fused=False)
        gradients(model, step)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            state = ours.state[p]
            whole = join(p.detach(), state["remainder"]) if "remainder" in state else p.float()
            q.data, q.grad = whole.detach().clone(), p.grad.float()
            if step:
                stored = {key: state[key].float() for key in ("exp_avg", "exp_avg_sq")}
                theirs.state[q] = {"step": torch.tensor(float(step)), **stored}
        ours.step()
        theirs.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            state = ours.state[p]
            if memory == "split":
                assert torch.equal(join(p.detach(), state["remainder"]), q.detach())
            else:
                assert is_rounded(q.detach(), p.detach())
            for key in ("exp_avg", "exp_avg_sq"):
                assert is_rounded(theirs.state[q][key], state[key])


def test_slices_change_nothing():
    results = []
    for size in (2**24, 100, 7):
        model = half_model()
        groups = param_groups(model, TABLE)
        optimizer = LeanAdamW(groups, remainder=True, moments=torch.float32, slice_size=size)
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        results.append(torch.cat([p.flatten() for p in masters(optimizer).values()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_stochastic_rounding_is_unbiased():
    x = torch.randn(64, generator=generator())
    low = (x.view(torch.int32) & -0x10000).view(torch.float32)
    high = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    draws = 20_000
    noise = torch.randint(2**16, (draws, 64), generator=generator(1), dtype=torch.int32)
    out = torch.empty(draws, 64, dtype=torch.bfloat16)
    round_stochastic(x.expand(draws, 64).contiguous(), out, noise)
    assert ((out == low) | (out == high)).all()
    share = (x - low).double() / (high - low)
    se = (high - low).double().abs() * (share * (1 - share) / draws).sqrt()
    off = (out.double().mean(0) - x.double()).abs()
    assert (off <= 4 * se + 1e-12).all()  # 64 draws of a normal stay below 4 but for 0.4 %


def one(value, n, **options):
    p = torch.nn.Parameter(torch.full((n,), value, dtype=torch.bfloat16))
    group = {"params": [p], "names": ["w"], "lr": 1e-4, "table_lr": 1e-4, "eps": 1e-8}
    group |= {"betas": (0.9, 0.95), "weight_decay": 0.0}
    return p, LeanAdamW([group], **options)


def test_the_mean_of_lean_updates_is_the_fp32_update():
    """An update of a fortieth of a bf16 step: 16384 weights go where one fp32 weight goes."""
    n, steps = 2**14, 20
    p, optimizer = one(1.0, n, remainder=False)
    reference = torch.nn.Parameter(torch.ones(1))
    theirs = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        g = 1.0 + 0.1 * step
        p.grad, reference.grad = torch.full_like(p, g), torch.full_like(reference, g)
        optimizer.step()
        theirs.step()
    se = p.detach().double().std() / n**0.5
    there = float(reference.detach())
    assert abs(float(p.detach().double().mean()) - there) < 3.5 * se
    assert (1 - there) / steps < 2**-8 / 40 * 1.1  # rounded to the nearest nothing moves
    assert p.std() > 0


def test_rounding_is_repeated_by_seed_and_step():
    def weights(seed, steps):
        p, optimizer = one(1.0, 2**13, remainder=False, seed=seed)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    assert torch.equal(weights(0, 3), weights(0, 3))
    assert not torch.equal(weights(0, 3), weights(1, 3))
    moves = ((1 - weights(0, 2).float()) * 2**8).round()  # each has a chance of 1 in 40 a step
    assert 250 < (moves == 1).sum() < 600 and (moves == 2).sum() < 30


def test_a_second_moment_in_bf16_falls():
    """β₂ = 0.999 and no gradient: rounded to the nearest it would stay at 1 for ever."""
    p, optimizer = one(1.0, 4096, remainder=True)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    for _ in range(500):
        optimizer.step()
    square = optimizer.state[p]["exp_avg_sq"].double()
    assert abs(square.mean() - 0.999**500) < 3.5 * square.std() / 64
    stuck = torch.ones(1, dtype=torch.bfloat16)
    assert (stuck.float() * 0.999).bfloat16() == stuck


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            own = any(out is a for a in args)  # in place: nothing new
            self.elements = max(self.elements, 0 if own else out.numel())
        return out


@pytest.mark.parametrize("memory", ["split", "lean"])
def test_no_temporary_is_larger_than_a_slice(memory):
    model = half_model()
    optimizer = LeanAdamW(param_groups(model, TABLE), remainder=memory == "split", slice_size=50)
    gradients(model, 0)
    optimizer.step()  # makes the state
    with Largest() as seen:
        optimizer.step()
    assert seen.elements == 50 < max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("memory", ["split", "lean"])
def test_state_has_sixteen_bits(memory):
    model = half_model()
    optimizer = make_optimizer(model, TABLE, memory)
    gradients(model, 0)
    optimizer.step()
    kinds = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "step": torch.float32}
    kinds |= {"remainder": torch.int16} if memory == "split" else {}
    for p in model.parameters():
        assert {key: value.dtype for key, value in optimizer.state[p].items()} == kinds


def test_a_compiled_update_is_one_program_for_all_steps():
    def run(backend):
        model = half_model()
        groups = param_groups(model, TABLE)
        optimizer = LeanAdamW(groups, remainder=True, slice_size=100, backend=backend)
        for step in range(4):
            gradients(model, step)
            set_lr(optimizer, 1 / (1 + step))
            optimizer.step()
        return torch.cat([p.flatten() for p in masters(optimizer).values()])

    torch.compiler.reset()
    counter = CompileCounter()
    torch.testing.assert_close(run(counter), run(None), rtol=1e-5, atol=1e-6)
    eps = {group["eps"] for group in param_groups(half_model(), TABLE)}
    assert counter.frame_count <= 2 * len(eps)


def curve(memory, weights, accumulate=1, steps=120):
    """Losses of a run on one repeated batch, from 2.54 down to 0.6."""
    model = GPT(SHAPE)
    init_weights(model, TABLE, 0)
    optimizer = make_optimizer(model.to(weights), TABLE, memory)
    tokens = torch.randint(13, (8, 11), generator=generator())
    batch = tokens[:, :-1], tokens[:, 1:]
    options = {"lr_factor": 0.2, "grad_clip": 1.0, "accumulate": accumulate}
    return torch.stack([train_step(model, optimizer, batch, **options)[0] for _ in range(steps)])


def test_loss_curves_are_those_of_fp32():
    """Unlike those of AdamW on bf16 weights as they are, which loses updates."""
    exact = curve("exact", torch.float32)
    assert exact[-1] < 0.3 * exact[0]
    for memory in ("split", "lean"):
        assert (curve(memory, torch.bfloat16) - exact).abs().max() < 0.03, memory
    assert (curve("exact", torch.bfloat16) - exact).abs().max() > 0.1


def test_gradients_of_micro_batches_add_up_in_fp32():
    model = half_model()
    optimizer = make_optimizer(model, TABLE, "split")
    tokens = torch.randint(13, (8, 11), generator=generator())
    batch = tokens[:, :-1], tokens[:, 1:]
    train_step(model, optimizer, batch, lr_factor=0.0, grad_clip=0.0, accumulate=8)
    summed = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad, p.grad_dtype = None, torch.bfloat16
    expected = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in summed.items()}
    for x, y in zip(*(t.split(1) for t in batch), strict=True):
        model.zero_grad()
        (model(x, y).mean() / 8).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.float()
    for name, grad in summed.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected[name], rtol=2e-2, atol=1e-4)
    assert curve("lean", torch.bfloat16, accumulate=4, steps=3).isfinite().all()


def test_norm_of_bf16_gradients_is_fp32():
    grads = [torch.full((1000,), 0.01, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    expected = torch.linalg.vector_norm(torch.cat(grads).double())
    torch.testing.assert_close(global_norm(grads).double(), expected, rtol=1e-6, atol=0)


def test_only_adamw_has_sixteen_bits():
    table = dataclasses.replace(
        TABLE, params=tuple(dataclasses.replace(r, optimizer="muon") for r in TABLE.params)
    )
    with pytest.raises(ConfigError, match=r"memory = 'lean': .* asks for muon"):
        make_optimizer(half_model(), table, "lean")


def test_fp32_weights_are_refused():
    model = GPT(SHAPE)
    optimizer = make_optimizer(model, TABLE, "lean")
    gradients(model, 0)
    with pytest.raises(AssertionError, match=r"float32 parameter has no use"):
        optimizer.step()


RUN = {
    "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": 257, "seq_len": 16},
    "parallel": {"checkpointing": "full"},
    "batch_size": 4,
    "accumulate": 2,
    "steps": 6,
    "data": {"source": "text.txt", "eval_tokens": 64},
    "tracking": {"checkpoint_every": 2, "wandb": "off"},
}


class StopAt(Exception):
    """A death at a step boundary."""


@pytest.mark.parametrize("memory", ["split", "lean"])
def test_a_run_is_continued_bit_for_bit(memory, tmp_path, monkeypatch):
    """All that the optimizer keeps is in the checkpoint, the remainder too."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    config = train_config({**RUN, "memory": memory})
    original = Trainer._train_one

    def limited(self):
        if self.step == 3:
            raise StopAt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(StopAt):
        patch.setattr(Trainer, "_train_one", limited)
        Trainer(config, tmp_path / "broken").fit()
    whole, broken = (Trainer(config, tmp_path / name) for name in ("whole", "broken"))
    assert broken.fit() == whole.fit()
    saved = [load_newest(tmp_path / name / "checkpoints") for name in ("whole", "broken")]
    for group in ("model", "optimizer"):
        a, b = (checkpoint.tensors(group) for checkpoint in saved)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    kinds = {name.split(".")[0]: t.dtype for name, t in a.items()}
    expected = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    assert kinds == expected | ({"remainder": torch.int16} if memory == "split" else {})
    with pytest.raises(ConfigError, match=f"'exact': .* was written under '{memory}'"):
        Trainer(train_config({**RUN, "memory": "exact"}), tmp_path / "whole").fit()
