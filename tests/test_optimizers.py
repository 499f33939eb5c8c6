"""Each optimizer is its paper's or torch's, for one model and for members; groups are the table."""

import copy

import pytest
import torch

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.clip import clip_gradients
from mupgpt.optim.groups import param_groups
from mupgpt.optim.make import make_optimizer
from mupgpt.optim.members import MemberAdamW, PerMember
from mupgpt.optim.rates import effective_lrs, set_lr
from mupgpt.optim.solo import Joint, Lion
from mupgpt.parametrization.table import parametrize

CONFIG = GPTConfig(n_layer=2, d_model=24, n_head=2, d_ffn=40, vocab_size=13, seq_len=10)
BASE = Base(d_model=12, d_ffn=20, n_head=1, d_head=12, n_kv_head=1, n_layer=1)
HPS = [
    HParams(lr=1e-2, weight_decay=0.3, eps=1e-8),
    HParams(lr=3e-3, weight_decay=0.0, eps=1e-3, beta1=0.8, beta2=0.99),
    HParams(lr=5e-2, weight_decay=0.1, lr_mult_hidden=3.0),
]
TABLES = [parametrize(CONFIG, BASE, hp, "mup") for hp in HPS]


def population():
    model = GPT(CONFIG, members=3).double()
    init_weights(model, TABLES, [0, 1, 2])
    return model


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_member_adamw_is_torch_adamw():
    together = population()
    optimizer = make_optimizer(together, TABLES)
    assert isinstance(optimizer, MemberAdamW)
    solos = []
    for k, table in enumerate(TABLES):
        solo = GPT(CONFIG).double()
        init_weights(solo, table, k)
        groups = param_groups(solo, table)
        solos.append((solo, torch.optim.AdamW(groups, foreach=False, fused=False)))
    for step in range(10):
        gradients(together, step)
        grads = [p.grad.clone() for p in together.parameters()]
        set_lr(optimizer, 1 / (step + 1))
        optimizer.step()
        for k, (solo, reference) in enumerate(solos):
            for p, grad in zip(solo.parameters(), grads, strict=True):
                p.grad = grad[k].clone()
            set_lr(reference, 1 / (step + 1))
            reference.step()
    for k, (solo, _) in enumerate(solos):
        for p, q in zip(together.parameters(), solo.parameters(), strict=True):
            torch.testing.assert_close(p[k], q, rtol=1e-13, atol=1e-14)


def test_groups_are_the_table():
    model = GPT(CONFIG)
    groups = param_groups(model, TABLES[0])
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(TABLES[0].rows)
    for group in groups:
        for name in group["names"]:
            row = TABLES[0].rows[name]
            assert (group["lr"], group["weight_decay"], group["eps"]) == (
                row.lr,
                row.weight_decay,
                row.eps,
            )
    assert {len(group["params"]) == len(group["names"]) for group in groups} == {True}


def test_lr_is_derived_never_accumulated():
    model = GPT(CONFIG)
    init_weights(model, TABLES[0], 0)
    optimizer = make_optimizer(model, TABLES[0])
    for factor in (0.5, 0.1, 0.7):
        set_lr(optimizer, factor)
    lrs = effective_lrs(optimizer)
    assert lrs == {name: row.lr * 0.7 for name, row in TABLES[0].rows.items()}
    assert lrs["wte.weight"] / lrs["blocks.0.attn.q.weight"] == pytest.approx(2.0)


OTHERS = ("mup-sgd", "mup-lion", "mup-muon")


def trained(model, optimizer, steps):
    """Weights after steps on fixed random gradients, the rate halved each step."""
    for step in steps:
        gradients(model, step)
        set_lr(optimizer, 0.5**step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fresh(rule, hp=HPS[0]):
    model = GPT(CONFIG).double()
    table = parametrize(CONFIG, BASE, hp, rule)
    init_weights(model, table, 0)
    return model, table, make_optimizer(model, table)


def test_the_rule_names_the_optimizer():
    kinds = {rule: type(fresh(rule)[2]) for rule in ("mup", *OTHERS)}
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    assert kinds == {"mup": adamw, "mup-sgd": sgd, "mup-lion": Lion, "mup-muon": Joint}


@pytest.mark.parametrize("rule", OTHERS)
def test_rates_are_the_tables_under_every_optimizer(rule):
    model, table, optimizer = fresh(rule)
    for factor in (0.5, 0.7):
        set_lr(optimizer, factor)
    assert effective_lrs(optimizer) == {name: row.lr * 0.7 for name, row in table.rows.items()}
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    for group in optimizer.param_groups:
        assert {table.rows[name].optimizer for name in group["names"]} == {group["optimizer"]}


def test_lion_is_its_papers():
    """Algorithm 2 of arXiv 2302.06675, one number at a time, with weight decay."""
    model, table, optimizer = fresh("mup-lion")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = trained(model, optimizer, range(5))
    generators = [torch.Generator().manual_seed(step) for step in range(5)]
    for name, row in table.rows.items():
        w, m = start[name], torch.zeros_like(start[name])
        for step, generator in enumerate(generators):
            g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            c = 0.9 * m + 0.1 * g
            w = w - row.lr * 0.5**step * (torch.sign(c) + row.weight_decay * w)
            m = 0.95 * m + 0.05 * g
        torch.testing.assert_close(ours[name], w, rtol=1e-13, atol=1e-14)


def test_sgd_has_the_first_moment_as_momentum():
    model, table, optimizer = fresh("mup-sgd", HPS[1])
    assert {group["momentum"] for group in optimizer.param_groups} == {HPS[1].beta1}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = trained(model, optimizer, range(3))
    generators = [torch.Generator().manual_seed(step) for step in range(3)]
    for name, row in table.rows.items():
        w, m = start[name], torch.zeros_like(start[name])
        for step, generator in enumerate(generators):
            m = 0.8 * m + torch.randn(w.shape, generator=generator, dtype=w.dtype)
            w = w - row.lr * 0.5**step * m
        torch.testing.assert_close(ours[name], w, rtol=1e-13, atol=1e-14)


def test_muon_is_torchs_beside_torchs_adamw():
    """Two optimizers of torch, each for its own parameters, make the same weights."""
    model, table, optimizer = fresh("mup-muon")
    ours = trained(model, optimizer, range(4))
    other, _, _ = fresh("mup-muon")
    parts = []
    for kind, make in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
        for name, p in other.named_parameters():
            row = table.rows[name]
            if row.optimizer == kind:
                rest = (
                    {"momentum": 0.9} if kind == "muon" else {"eps": row.eps, "betas": (0.9, 0.95)}
                )
                parts.append((make([p], lr=row.lr, weight_decay=row.weight_decay, **rest), row.lr))
    for step in range(4):
        gradients(other, step)
        for part, lr in parts:
            part.param_groups[0]["lr"] = lr * 0.5**step
            part.step()
    for name, p in other.named_parameters():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["mup", *OTHERS])
def test_a_loaded_state_goes_on_where_it_stopped(rule):
    model, _, optimizer = fresh(rule)
    trained(model, optimizer, range(3))
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    whole = trained(model, optimizer, range(3, 6))
    again, _, other = fresh(rule)
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(saved[name])
    other.load_state_dict(state)
    for name, p in trained(again, other, range(3, 6)).items():
        assert torch.equal(p, whole[name]), name


def gain(update, kind):
    """RMS→RMS norm of a matrix's update: the most by which it changes what it is applied to."""
    w = torch.nn.Parameter(torch.zeros_like(update))
    w.grad = update
    torch.optim.Muon([w], lr=1.0, weight_decay=0.0, adjust_lr_fn=kind).step()
    fan_out, fan_in = update.shape
    return float(torch.linalg.matrix_norm(w.detach(), 2)) * (fan_in / fan_out) ** 0.5


@pytest.mark.parametrize("fan_out", [1, 4])
def test_muons_own_scale_transfers_across_width_and_matching_adam_does_not(fan_out):
    """Why `mup-muon` has no exponent for matrices: `original` steps have one gain at every width;
    those of `match_rms_adamw`, 0.2·√max(out, in) large, gain √width."""
    widths = torch.tensor([64.0, 128.0, 256.0, 512.0])
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(fan_out * int(n), int(n), generator=generator) for n in widths]
    for kind, power in (("original", 0.0), ("match_rms_adamw", 0.5)):
        gains = torch.tensor([gain(update, kind) for update in updates]).log2()
        x = widths.log2() - widths.log2().mean()
        slope = float(x @ gains / (x @ x))
        assert slope == pytest.approx(power, abs=0.05), kind
        if kind == "original":
            assert gains.abs().max() < 0.35  # Newton-Schulz ends between 0.7 and 1.2


def mixed():
    """Members that differ in optimizer, hyperparameters and seed, and their tables."""
    tables = [
        parametrize(CONFIG, BASE, hp, rule)
        for hp, rule in zip(HPS * 2, ("mup", *OTHERS, "mup", "mup-muon"), strict=True)
    ]
    model = GPT(CONFIG, members=6).double()
    init_weights(model, tables, list(range(6)))
    return model, tables


def test_members_with_any_optimizers_are_solo_runs():
    together, tables = mixed()
    optimizer = make_optimizer(together, tables)
    assert isinstance(optimizer, PerMember)
    solos = []
    for k, table in enumerate(tables):
        solo = GPT(CONFIG).double()
        init_weights(solo, table, k)
        solos.append((solo, make_optimizer(solo, table)))
    kept = list(range(6))
    for step in range(8):
        gradients(together, step)
        set_lr(optimizer, 1 / (step + 1))
        for k, (solo, alone) in enumerate(solos):
            if k in kept:
                for p, whole in zip(solo.parameters(), together.parameters(), strict=True):
                    p.grad = whole.grad[kept.index(k)].clone()
                set_lr(alone, 1 / (step + 1))
                alone.step()
        optimizer.step()
        if step == 4:
            kept = [5, 2, 1]
            together.keep_members(kept)
            optimizer.keep(kept)
    for place, k in enumerate(kept):
        for p, q in zip(together.parameters(), solos[k][0].parameters(), strict=True):
            torch.testing.assert_close(p[place], q, rtol=0, atol=1e-12)


def test_clip_is_torchs_for_one_model():
    a, b = GPT(CONFIG).double(), GPT(CONFIG).double()
    for model in (a, b):
        gradients(model, 0)
    norm = clip_gradients(a, 0.5)
    expected = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)


def test_clip_is_per_member_and_zero_only_measures():
    model = population()
    gradients(model, 0)
    for p in model.parameters():
        p.grad[1] *= 1e-6
        p.grad[2] = torch.nan
    before = [p.grad.clone() for p in model.parameters()]
    measured = clip_gradients(model, 0.0)
    assert all(
        torch.equal(p.grad[:2], g[:2]) for p, g in zip(model.parameters(), before, strict=True)
    )
    norms = clip_gradients(model, 1.0)
    torch.testing.assert_close(norms, measured, equal_nan=True)
    after = torch.stack([p.grad.square().flatten(1).sum(1) for p in model.parameters()])
    assert after.sum(0)[0].sqrt().item() == pytest.approx(1.0, rel=1e-5)
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad[1], g[1])
