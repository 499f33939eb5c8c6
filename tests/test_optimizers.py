"""A table of optimizers and the laws that each row obeys; what each is, and clipping.

A new optimizer is a new row of `ROWS` (and a line of `UNIT`, if it has a step of its own).
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from ranks import launch
from torch.utils._python_dispatch import TorchDispatchMode

from mupgpt.checkpoint.state import load_model, load_optimizer, state_groups
from mupgpt.checkpoint.writer import save
from mupgpt.config.schema import Base, GPTConfig, HParams, ParallelConfig, TrainConfig
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import Grid
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.shards import local, piece
from mupgpt.optim.clip import clip_gradients
from mupgpt.optim.groups import param_groups
from mupgpt.optim.lean import LeanAdamW, join
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


def decoupled_radam(groups):
    """An optimizer of a user's own."""
    return torch.optim.RAdam(groups, decoupled_weight_decay=True)


@dataclass(frozen=True)
class Row:
    """An optimizer as the tests make it, and what it promises."""

    kind: type
    """Its class for one model."""
    rule: str = "mup"
    memory: str = "exact"
    own: dict = field(default_factory=dict)
    members: type | None = PerMember
    """Its class for members; None where it has none."""
    vectors: bool = False
    """Whether members' values come as vectors, as on a GPU."""
    apart: float = 0.0
    """By how much a member may differ from a solo run; 0 is bit for bit."""
    sharded: float | None = 1e-12
    """By what share of its movement a sharded weight may differ; None where that is not tried."""
    rounded: float = 1e-9
    """Relative error of one step."""


ROWS = {
    "adamw": Row(torch.optim.AdamW, members=MemberAdamW),
    "adamw in vectors": Row(torch.optim.AdamW, members=MemberAdamW, vectors=True, apart=1e-12),
    "sgd": Row(torch.optim.SGD, rule="mup-sgd"),
    "lion": Row(Lion, rule="mup-lion"),
    "muon and adamw, joint": Row(Joint, rule="mup-muon", sharded=0.05),  # it iterates in bf16
    "one's own": Row(torch.optim.RAdam, own={"adamw": decoupled_radam}),
    # tests/test_lean_sharded.py: which numbers round up depends on the slices.
    "split": Row(LeanAdamW, memory="split", members=None, sharded=None, rounded=1e-6),
    "lean": Row(LeanAdamW, memory="lean", members=None, sharded=None, rounded=2**-7),
}
UNIT = {
    "adamw": lambda g, eps: g / (g.abs() + eps),
    "sgd": lambda g, eps: g,
    "lion": lambda g, eps: g.sign(),
    "muon": lambda g, eps: orthogonal(g, "original"),
    "one's own": lambda g, eps: g,  # RAdam's first steps are not rectified
}
"""Optimizer of a row → its first step at rate 1 without decay, of a gradient."""
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
with_members = pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.members], ids=[n for n in ROWS if ROWS[n].members]
)


def fresh(row, hp=HPS[0], seed=0):
    """One model, its table and its optimizer before the first step."""
    model = GPT(CONFIG).to(torch.float64 if row.memory == "exact" else torch.bfloat16)
    table = parametrize(CONFIG, BASE, hp, row.rule)
    init_weights(model, table, seed)
    return model, table, make_optimizer(model, table, row.memory, optimizers=row.own)


def together(row, hps, seeds):
    """As many members, their tables and their optimizer."""
    model = GPT(CONFIG, members=len(hps)).double()
    tables = [parametrize(CONFIG, BASE, hp, row.rule) for hp in hps]
    init_weights(model, tables, seeds)
    if row.vectors:
        return model, tables, MemberAdamW(param_groups(model, tables), vectors=True)
    return model, tables, make_optimizer(model, tables, optimizers=row.own)


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def trained(model, optimizer, steps):
    """Weights after steps on fixed random gradients, the rate halved each step."""
    for step in steps:
        gradients(model, step)
        set_lr(optimizer, 0.5**step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def exact(p, optimizer):
    """A weight as its optimizer knows it."""
    state = optimizer.state[p]
    return join(p.detach(), state["remainder"]) if "remainder" in state else p.detach()


@rows
def test_the_rule_names_the_optimizer(row):
    assert type(fresh(row)[2]) is row.kind
    if row.members:
        assert type(together(row, HPS, [0, 1, 2])[2]) is row.members


@rows
def test_every_row_of_the_table_is_stepped_at_its_rate(row):
    """Derived anew at every step, whatever it was before; and schedulers find the base's rate."""
    model, table, optimizer = fresh(row)
    for factor in (0.5, 0.1, 0.7):
        set_lr(optimizer, factor)
    assert effective_lrs(optimizer) == {name: r.lr * 0.7 for name, r in table.rows.items()}
    assert set(effective_lrs(optimizer)) == set(dict(model.named_parameters()))
    assert optimizer.defaults["lr"] == table.lr == HPS[0].lr


BIG = HParams(lr=0.1, weight_decay=2.0)  # steps that sixteen bits can tell


@rows
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_step_has_the_tables_rate_and_decay(row, factor):
    """w₁ = −f·η·unit(g) from 0, and 1 − f·η·λ from 1 without a gradient, parameter by parameter."""
    model, table, optimizer = fresh(row, BIG)
    gradients(model, 0)
    stepped_from(0.0, model, optimizer, factor)
    for name, p in model.named_parameters():
        r = table.rows[name]
        unit = UNIT["one's own" if row.own else r.optimizer]
        expected = -factor * r.lr * unit(p.grad.double(), r.eps)
        torch.testing.assert_close(exact(p, optimizer).double(), expected, rtol=row.rounded, atol=0)
    model, table, optimizer = fresh(row, BIG)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stepped_from(1.0, model, optimizer, factor)
    for name, p in model.named_parameters():
        kept = 1 - factor * table.rows[name].lr_wd
        found = exact(p, optimizer).double()
        torch.testing.assert_close(found, torch.full_like(found, kept), rtol=row.rounded, atol=0)
        assert kept < 1 or bool((found == 1).all())


def stepped_from(value, model, optimizer, factor):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    set_lr(optimizer, factor)
    optimizer.step()


class Zeros(TorchDispatchMode):
    """Counts the tensors of zeros that are made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += "zeros" in str(func)
        return func(*args, **(kwargs or {}))


@rows
def test_state_is_made_once(row):
    pairs = [fresh(row)] + ([together(row, HPS, [0, 1, 2])] if row.members else [])
    for model, _, optimizer in pairs:
        counts = []
        for step in range(3):
            gradients(model, step)
            with Zeros() as seen:
                optimizer.step()
            counts.append(seen.made)
        assert counts[1:] == [0, 0]
        assert counts[0] > 0 or row.kind is torch.optim.SGD  # whose first momentum is the gradient


@rows
@pytest.mark.parametrize("through", ["state_dict", "checkpoint"])
def test_a_continued_run_is_the_unbroken_one(row, through, tmp_path):
    model, _, optimizer = fresh(row)
    trained(model, optimizer, range(3))
    again, _, other = fresh(row, seed=7)
    if through == "state_dict":
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        saved = save(tmp_path, 3, state_groups(model, optimizer), {}, keep=1)
        load_model(again, saved)
        load_optimizer(other, saved)
    whole = trained(model, optimizer, range(3, 6))
    for name, p in trained(again, other, range(3, 6)).items():
        assert torch.equal(p, whole[name]), name
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][key].dtype
            assert torch.equal(value, other.state[q][key]), key


@with_members
def test_a_member_is_a_solo_run(row):
    """Each at a rate of its own; after others have gone; and where another one began anew."""
    model, tables, optimizer = together(row, HPS, [0, 1, 2])
    solos = [fresh(row, hp, seed) for seed, hp in enumerate(HPS)]
    here = [0, 1, 2]
    for step in range(9):
        if step == 3:
            here = [2, 0]
            model.keep_members(here)
            optimizer.keep(here)
        if step == 6:  # the first of the two gives its place to a run of the second's values
            solos.append(fresh(row, HPS[1], 5))
            here = [3, 0]
            tables = [solos[k][1] for k in here]
            model.put_members([0], together(row, [HPS[1]], [5])[0])
            model.apply_table(tables)
            optimizer.renew([0], model, tables)
        factors = [1 / (1 + step + k) for k in here]
        gradients(model, step)
        whole = [p.grad.clone() for p in model.parameters()]
        set_lr(optimizer, factors)
        optimizer.step()
        for place, (k, factor) in enumerate(zip(here, factors, strict=True)):
            alone, _, its = solos[k]
            for p, grad in zip(alone.parameters(), whole, strict=True):
                p.grad = grad[place].clone()
            set_lr(its, factor)
            its.step()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p[place], q, rtol=0, atol=row.apart)


@pytest.mark.slow
def test_shards_are_stepped_as_the_whole():
    launch(2, step_shards)


def step_shards():
    """Each row on this process's part of a model, beside the whole of it."""
    device = torch.device("cpu")
    grid = Grid.of(TrainConfig(model=CONFIG, base=BASE, batch_size=2), device)
    for name, row in ROWS.items():
        if row.sharded is None:
            continue
        whole, table, alone = fresh(row)
        with torch.device("meta"):
            model = GPT(CONFIG).double()
        parallelize(model, ParallelConfig(), grid, half=False)
        materialize(model, device)
        init_weights(model, table, 0)
        optimizer = make_optimizer(model, table, optimizers=row.own)
        start = {name: local(p).detach().clone() for name, p in model.named_parameters()}
        for step in range(4):
            gradients(whole, step)
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                p.grad = torch.empty_like(p)
                local(p.grad).copy_(part(p, q.grad))
            for each in (optimizer, alone):
                set_lr(each, 0.5**step)
                each.step()
        for (site, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            found, expected = local(p).detach(), part(p, q.detach())
            moved = (expected - start[site]).square().mean().sqrt()
            off = (found - expected).square().mean().sqrt()
            assert off <= row.sharded * moved, (name, site, float(off / moved))


def part(p, whole):
    """What this process holds of ``whole``, of which ``p`` is the sharded form."""
    mine = piece(p)
    ends = zip(mine.offset, mine.data.shape, strict=True)
    return whole[tuple(slice(a, a + n) for a, n in ends)]


def test_an_optimizer_of_ones_own_steps_what_it_is_given():
    made = {"adamw": lambda groups: torch.optim.RAdam(groups[:1])}
    with pytest.raises(ConfigError, match=r"optimizers\['adamw'\] made RAdam: must be .* as they"):
        fresh(Row(torch.optim.RAdam, own=made))
    with pytest.raises(ConfigError, match=r"unknown optimizer 'adam'; did you mean 'adamw'"):
        fresh(Row(torch.optim.RAdam, own={"adam": decoupled_radam}))
    with pytest.raises(ConfigError, match=r"memory = 'split': .* optimizers names another adamw"):
        fresh(Row(torch.optim.RAdam, own={"adamw": decoupled_radam}, memory="split"))


def test_what_a_checkpoint_cannot_hold_is_refused_by_name():
    model, _, optimizer = fresh(Row(torch.optim.NAdam, own={"adamw": torch.optim.NAdam}))
    trained(model, optimizer, range(1))
    with pytest.raises(ConfigError, match=r"'mu_product' of wte.weight is a tensor \(\); must be"):
        state_groups(model, optimizer)


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


def test_member_adamw_is_torch_adamw():
    members, _, optimizer = together(ROWS["adamw"], HPS, [0, 1, 2])
    solos = []
    for k, table in enumerate(TABLES):
        solo = GPT(CONFIG).double()
        init_weights(solo, table, k)
        groups = param_groups(solo, table)
        solos.append((solo, torch.optim.AdamW(groups, foreach=False, fused=False)))
    for step in range(10):
        gradients(members, step)
        grads = [p.grad.clone() for p in members.parameters()]
        set_lr(optimizer, 1 / (step + 1))
        optimizer.step()
        for k, (solo, reference) in enumerate(solos):
            for p, grad in zip(solo.parameters(), grads, strict=True):
                p.grad = grad[k].clone()
            set_lr(reference, 1 / (step + 1))
            reference.step()
    for k, (solo, _) in enumerate(solos):
        for p, q in zip(members.parameters(), solo.parameters(), strict=True):
            torch.testing.assert_close(p[k], q, rtol=1e-13, atol=1e-14)


def test_lion_is_its_papers():
    """Algorithm 2 of arXiv 2302.06675, one number at a time, with weight decay."""
    model, table, optimizer = fresh(ROWS["lion"])
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
    model, table, optimizer = fresh(ROWS["sgd"], HPS[1])
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
    model, table, optimizer = fresh(ROWS["muon and adamw, joint"])
    ours = trained(model, optimizer, range(4))
    other, _, _ = fresh(ROWS["muon and adamw, joint"])
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


def orthogonal(grad, kind):
    """Muon's step at rate 1: ``grad`` with all singular values alike, scaled as ``kind`` says."""
    w = torch.nn.Parameter(torch.zeros_like(grad))
    w.grad = grad
    torch.optim.Muon([w], lr=1.0, weight_decay=0.0, momentum=0.9, adjust_lr_fn=kind).step()
    return -w.detach()


def gain(update, kind):
    """RMS→RMS norm of a matrix's update: the most by which it changes what it is applied to."""
    fan_out, fan_in = update.shape
    step = orthogonal(update, kind)
    return float(torch.linalg.matrix_norm(step, 2)) * (fan_in / fan_out) ** 0.5


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


MIXED = ("mup", "mup-sgd", "mup-lion", "mup-muon", "mup", "mup-muon")


def mixed():
    """Members that differ in optimizer, hyperparameters and seed, and their tables."""
    tables = [parametrize(CONFIG, BASE, hp, rule) for hp, rule in zip(HPS * 2, MIXED, strict=True)]
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
    model = together(ROWS["adamw"], HPS, [0, 1, 2])[0]
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
