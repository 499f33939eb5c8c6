"""What is measured is what happened, and a run leaves its narrower runs' bands when it should."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mupgpt.training.health as health_module
from mupgpt.cli import run
from mupgpt.config.plain import to_dict
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import overlay, train_config
from mupgpt.trainer import Trainer
from mupgpt.training.health import activations, kind, measure
from mupgpt.training.metrics import read_metrics
from mupgpt.training.step import evaluate, train_step
from mupgpt.training.watch import BIAS, LOSS_MARGIN, TOLERANCE, Watch

BASE = {"d_model": 16, "d_ffn": 64, "n_head": 1, "d_head": 16, "n_kv_head": 1, "n_layer": 2}
RAW = {
    "model": {"n_layer": 2, "d_model": 64, "d_head": 16, "vocab_size": 257, "seq_len": 16},
    "base": BASE,
    "rule": "mup",
    "hparams": {"lr": 0.01, "weight_decay": 0.1},
    "batch_size": 8,
    "steps": 20,
    "precision": "fp64",
    "data": {"source": "text.txt", "eval_tokens": 256},
    "tracking": {"log_every": 1, "eval_every": 2, "wandb": "off"},
}
KINDS = ("input", "hidden", "residual_out", "bias", "norm")


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def config(**changes):
    return train_config(overlay(RAW, changes))


def at_width(width, **changes):
    return config(**overlay({"model": {"d_model": width}}, changes))


def built(c):
    """A model with its optimizer and table."""
    table = parametrize(c.model, c.base, c.hparams, c.rule)
    model = GPT(c.model).to(torch.float64)
    init_weights(model, table, c.seed)
    return model, make_optimizer(model, table), table


def batch(seed, vocab=257):
    drawn = torch.randint(vocab, (4, 17), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def rms(tensors):
    return math.sqrt(torch.cat([t.detach().flatten() for t in tensors]).square().mean())


def test_what_is_measured_is_what_happened():
    """Against differences of weights, kept gradients, and the definition of Adam's v."""
    c = config(hparams={"weight_decay": 3.0, "eps": 1e-3, "beta2": 0.9})
    model, optimizer, table = built(c)
    of = {k: [n for n, row in table.rows.items() if kind(row) == k] for k in KINDS}
    squares = dict.fromkeys(table.rows, 0.0)
    for step in range(1, 5):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        _, norm = train_step(model, optimizer, batch(step), lr_factor=0.7, grad_clip=0.05)
        assert norm > 0.05
        named = dict(model.named_parameters())
        for n, p in named.items():
            squares[n] = 0.9 * squares[n] + 0.1 * p.grad.square()
        found = measure(optimizer, table)
        for k, names in of.items():
            moved = [named[n] - before[n] for n in names]
            eps = table.rows[names[0]].eps
            seen = [(squares[n] / (1 - 0.9**step)).sqrt() for n in names]
            held = [before[n].bfloat16() for n in names]
            stood = [
                ((b.double() + m).bfloat16() == b) & (m != 0)
                for b, m in zip(held, moved, strict=True)
            ]
            expected = {
                "weight_rms": rms(named[n] for n in names),
                "grad_rms": rms(named[n].grad for n in names),
                "update_rms": rms(moved),
                "update_ratio": rms(moved) / rms(named[n] for n in names),
                "eps_ratio": eps / rms(seen),
                "lost_in_bf16": float(torch.cat([s.flatten() for s in stood]).double().mean()),
            }
            for quantity, value in expected.items():
                assert found[f"health/{k}/{quantity}"] == pytest.approx(value, rel=1e-9), (k, step)
    assert len(found) == 6 * len(KINDS)


def test_slices_do_not_change_what_is_measured(monkeypatch):
    model, optimizer, table = built(config())
    train_step(model, optimizer, batch(0), lr_factor=1.0, grad_clip=0.0)
    whole = measure(optimizer, table)
    monkeypatch.setattr(health_module, "SLICE", 1000)
    assert measure(optimizer, table) == pytest.approx(whole, rel=1e-12)


HALF_ULP = [  # (weight in bf16, update, whether bf16 stands still), an ulp of 1.0 being 2⁻⁷
    (1.0, 2.0**-8, True),  # half an ulp: a tie goes to the even number, 1.0
    (1.0, 2.0**-8 * 1.001, False),
    (1.0, -(2.0**-9), True),  # below a power of two an ulp is half as large
    (1.0, -(2.0**-9) * 1.001, False),
    (1.0 + 2.0**-7, 2.0**-8, False),  # a tie goes to the even number, not this one
    (1.0 + 2.0**-7, 2.0**-8 * 0.999, True),
    (-3.0, 2.0**-7 * 0.999, True),
    (-3.0, 2.0**-6, False),
    (0.0, 1e-30, False),
    (0.5, 0.0, False),  # no update, nothing lost
    (2.0**-100, 1e-40, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_updates_are_counted_exactly(dtype):
    for weight, update, stands in [*HALF_ULP, *((-w, -u, s) for w, u, s in HALF_ULP)]:
        assert bool(torch.tensor(weight + update).bfloat16() == weight) is (stands or update == 0)
    weights, updates, lost = (torch.tensor(column) for column in zip(*HALF_ULP, strict=True))
    p = torch.nn.Parameter((weights.double() + updates.double()).to(dtype))
    p.grad = torch.ones_like(p)
    # With β = 0 and v = 1 the step is −lr·m: the update is what stands in m.
    state = {"step": torch.tensor(1.0), "exp_avg": -updates.to(p), "exp_avg_sq": p.grad}
    group = {"params": [p], "names": ["w"], "lr": 1.0, "betas": (0.0, 0.0), "eps": 1e-300}
    planted = torch.optim.AdamW([{**group, "weight_decay": 0.0}])
    planted.state[p] = state
    table = SimpleNamespace(rows={"w": SimpleNamespace(role="hidden", residual_out=False)})
    share = measure(planted, table)["health/hidden/lost_in_bf16"]
    assert share == int(lost.sum()) / len(HALF_ULP)


@pytest.mark.parametrize("rule", ["mup-sgd", "mup-lion", "mup-muon"])
def test_another_optimizer_has_levels_only(rule):
    model, optimizer, table = built(config(rule=rule))
    train_step(model, optimizer, batch(0), lr_factor=1.0, grad_clip=0.0)
    found = measure(optimizer, table)
    assert {key for key in found if "hidden" in key} == {
        "health/hidden/weight_rms", "health/hidden/grad_rms"
    }  # fmt: skip
    assert ("health/norm/eps_ratio" in found) is (rule == "mup-muon")


def test_activations_are_those_that_pass():
    model, _, _ = built(config())
    tokens, targets = batch(0)
    with torch.no_grad():
        x = 10.0 * (model.wte(tokens) + model.wpe(torch.arange(16)))
    with activations(model) as once:
        evaluate(model, (tokens, targets))
    assert once["health/act/emb"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-12)
    with activations(model) as twice:
        evaluate(model, (tokens[:1], targets[:1]))
        evaluate(model, (tokens[1:], targets[1:]))
    assert twice == pytest.approx(once, rel=1e-12)
    model(tokens, targets)
    assert twice == pytest.approx(once, rel=1e-12)  # the hooks are gone


SHARDED = """
import sys, torch
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {folder!r})
from test_health import batch, built, config, json, measure, train_step
from mupgpt.distributed.processes import join_group, leave_group
join_group()
model, optimizer, table = built(config())
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
from mupgpt.optim.make import make_optimizer
optimizer = make_optimizer(model, table)
for step in range(3):
    train_step(model, optimizer, batch(step), lr_factor=1.0, grad_clip=0.5)
found = measure(optimizer, table)
if torch.distributed.get_rank() == 0:
    print(json.dumps(found))
leave_group()
"""


@pytest.mark.slow
def test_sharded_over_three_processes_nothing_else_is_measured(tmp_path):
    """Three do not divide anything evenly: some shards are shorter, some empty."""
    model, optimizer, table = built(config())
    for step in range(3):
        train_step(model, optimizer, batch(step), lr_factor=1.0, grad_clip=0.5)
    (tmp_path / "job.py").write_text(SHARDED.format(folder=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    job = subprocess.run([*launch, "job.py"], capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    out = job.stdout
    assert json.loads(out.splitlines()[-1]) == pytest.approx(measure(optimizer, table), rel=1e-9)


def planted_run(folder, c, records):
    """A run's folder as far as alarms read it."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text(json.dumps(to_dict(c)))
    (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def watching(c, *folders):
    return replace(c, tracking=replace(c.tracking, watch=tuple(folders)))


def test_a_proxys_record_is_widened_by_the_two_tables():
    """From width 16 to 64 under mup: std ÷ √4 and lr ÷ 4 inside blocks; all else stays."""
    narrow, wide = at_width(16), at_width(64)
    start = narrow.hparams.init_std
    before, after = math.hypot(start, 0.4), math.hypot(start / 2, 0.1)
    record = {
        "step": 10,
        "val/loss": 3.0,
        "health/hidden/weight_rms": before,
        "health/hidden/update_ratio": 0.01,
        "health/hidden/eps_ratio": 0.2,
        "health/residual_out/weight_rms": 0.9 * start / 2,  # shrunk: 2L = 4
        "health/input/weight_rms": 2 * start,
        "health/bias/weight_rms": 0.3,
        "health/norm/weight_rms": 0.7,
        "health/act/residual": 5.0,
        "health/hidden/grad_rms": 1.0,
    }
    watch = Watch(watching(wide, planted_run("w16", narrow, [record])))
    expected = {
        "health/hidden/weight_rms": after,
        "health/hidden/update_ratio": 0.01 / 4 * before / after,
        "health/hidden/eps_ratio": 0.2,
        "health/residual_out/weight_rms": 0.9 * start / 4,
        "health/input/weight_rms": 2 * start,
        "health/bias/weight_rms": 0.3,
        "health/norm/weight_rms": 0.7,
        "health/act/residual": 5.0,
    }
    for key, value in expected.items():
        band, factor = watch.band(key, 10), TOLERANCE["act" if "act" in key else key.split("/")[-1]]
        factor *= BIAS if "bias" in key else 1.0
        low = 0.0 if "eps" in key else value / factor
        assert (band.low, band.expected, band.high) == pytest.approx((low, value, value * factor))
    assert watch.band("health/hidden/grad_rms", 10) is None
    loss = watch.band("val/loss", 10)
    assert (loss.expected, loss.high) == pytest.approx((3.0, 3.0 * (1 + LOSS_MARGIN)))


def test_between_records_lies_a_line_and_beyond_them_nothing():
    key, other = "health/act/emb", "health/act/residual"
    records = [{"step": 4, key: 2.0}, {"step": 6, other: 1.0}, {"step": 8, key: 4.0}]
    watch = Watch(watching(config(), planted_run("p", at_width(16), records)))
    assert [watch.band(key, step).expected for step in (4, 5, 8)] == [2.0, 2.5, 4.0]
    assert watch.band(key, 3) is watch.band(key, 9) is watch.band(other, 7) is None
    assert watch.proxies[0].last == 8


def test_a_small_epsilon_is_no_alarm_however_it_moves():
    records = [{"step": 1, "health/hidden/eps_ratio": 1e-6}]
    watch = Watch(watching(config(), planted_run("p", at_width(16), records)))
    assert 5e-3 in watch.band("health/hidden/eps_ratio", 1)
    assert 2e-2 not in watch.band("health/hidden/eps_ratio", 1)


def test_the_loss_is_held_against_the_widest_that_is_not_wider():
    folders = [
        planted_run(f"w{w}-{seed}", at_width(w, seed=seed), [{"step": 2, "val/loss": loss}])
        for w, seed, loss in ((16, 0, 3.5), (32, 0, 3.0), (32, 1, 3.2), (128, 0, 2.0))
    ]
    band = Watch(watching(at_width(64), *folders)).band("val/loss", 2)
    deviation = math.sqrt(2) * 0.1
    assert (band.expected, band.high) == pytest.approx((3.1, 3.1 + 3 * deviation))


def test_steps_that_are_not_as_large_as_their_rate_say_nothing_of_weights():
    record = {
        "step": 1,
        **{f"health/{k}/weight_rms": 0.1 for k in ("hidden", "input")},
        "health/act/emb": 1.0,
    }
    folder = planted_run("p", at_width(16, rule="mup-muon"), [record])
    watch = Watch(watching(config(rule="mup-muon"), folder))
    assert watch.band("health/hidden/weight_rms", 1) is None
    assert watch.band("health/input/weight_rms", 1) is not None
    assert watch.band("health/act/emb", 1).expected == 1.0


def test_each_alarm_is_said_once_and_counted_always():
    record = {"step": 5, "val/loss": 3.0, "health/hidden/weight_rms": 0.08}
    watch = Watch(watching(config(), planted_run("p", at_width(16), [record])))
    here = {**record, "health/hidden/weight_rms": 0.08, "train/loss": 9.9}
    facts, alarms = watch(here)
    (alarm,) = alarms
    for part in ("step 5", "health/hidden/weight_rms is 0.08", "0.032 to 0.05", "initial std"):
        assert part in alarm
    assert facts["watch/hidden/weight_rms"] == pytest.approx(2.0)
    assert facts["watch/val/loss"] == pytest.approx(1.0) and facts["watch/outside"] == 1
    assert watch(here) == (facts, [])
    facts, alarms = watch({**here, "val/loss": 3.1})
    assert facts["watch/outside"] == 2 and "at most 3.03: a wider run should not" in alarms[0]
    assert watch({"step": 6, "val/loss": 99.0}) == ({}, [])


def test_without_proxies_it_is_silent():
    watch = Watch(config())
    assert watch.opening() == [] and watch({"step": 1, "val/loss": 99.0}) == ({}, [])


def test_before_the_run_tables_are_compared():
    folder = planted_run("p", at_width(16), [{"step": 5, "val/loss": 3.0}])
    assert Watch(watching(config(), folder)).opening() == ["held against p up to step 5"]
    other = planted_run("q", at_width(32), [{"step": 4, "val/loss": 3.0}])
    lines = Watch(watching(config(rule="sp"), folder, other)).opening()
    assert lines[:2] == ["held against p up to step 5", "held against q up to step 4"]
    assert lines[2].startswith("beware: the table of this run is not that of p widened: ")
    assert lines[2].endswith(" differences)") and len(lines) == 3


REFUSED = {
    "batch": ({"batch_size": 4}, r"batch_size is 4 there and 8 here"),
    "depth": ({"model": {"n_layer": 1}}, r"model.n_layer is 1 there and 2 here"),
    "text": ({"data": {"eval_tokens": 128}}, r"data.eval_tokens is 128 there and 256 here"),
    "clipping": ({"grad_clip": 0.5}, r"grad_clip is 0.5 there and 1.0 here"),
    "a control": ({"rule": "sp"}, r"its rule sp promises nothing over width, 16 there and 64 here"),
    "schedule": ({"steps": 200, "schedule": {"warmup": 0.5}}, r"nothing to compare; up to step 0,"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_proxy_is_refused(name):
    changes, message = REFUSED[name]
    folder = planted_run("p", at_width(16, **changes), [{"step": 1, "val/loss": 3.0}])
    with pytest.raises(ConfigError, match=message):
        Watch(watching(config(), folder))


def test_folders_that_are_no_runs():
    with pytest.raises(ConfigError, match=r"tracking.watch = 'gone': must be the folder of a run"):
        Watch(watching(config(), "gone"))
    folder = planted_run("p", at_width(16), [])
    with pytest.raises(ConfigError, match=r"up to step 20, .* no record\. A proxy is this config"):
        Watch(watching(config(), folder))


def test_a_longer_run_compares_until_the_schedules_part():
    constant = {"schedule": {"shape": "constant", "warmup_tokens": 512}}
    records = [{"step": s, "val/loss": 3.0} for s in range(1, 21)]
    folder = planted_run("p", at_width(16, **constant), records)
    longer = watching(config(**constant, steps=500), folder)
    assert Watch(longer).proxies[0].last == 20
    # 1 − 0.9 (s − 4)/496 has fallen by 5 % at s = 32: beyond the proxy's end.
    linear = overlay(constant, {"schedule": {"shape": "linear"}, "steps": 100})
    assert Watch(watching(config(**linear), folder)).proxies[0].last == 10


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """Two seeds of a width-16 run, trained once."""
    root = tmp_path_factory.mktemp("proxies")
    (root / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in (0, 1):
            folders.append(str(root / f"w16-{seed}"))
            Trainer(at_width(16, seed=seed), folders[-1]).fit()
    return folders


def train(c, folder, change=None):
    """Train with the rows of the table changed after the config; returns the records."""
    trainer = Trainer(c, folder)
    if change is not None:
        rows = tuple(change(row) for row in trainer.table.params)
        trainer.table = replace(trainer.table, params=rows)
    trainer.fit()
    return read_metrics(Path(folder) / "metrics.jsonl")


def alarms_of(text):
    """The quantities of the alarms in what a run has said."""
    lines = [line for line in text.splitlines() if "from narrower runs" in line]
    return [line.split(": ")[1].split(" ")[0] for line in lines]


@pytest.mark.parametrize("width", [32, 64])
def test_a_wider_run_under_mup_stays_quiet(proxies, capsys, width):
    records = train(watching(at_width(width, seed=2), *proxies), "wide")
    said = capsys.readouterr().err
    assert alarms_of(said) == []
    assert f"held against {proxies[0]} up to step 20" in said
    assert [r["watch/outside"] for r in records] == [0] * 20
    for key in ("watch/hidden/update_ratio", "watch/residual_out/weight_rms"):
        assert all(0.7 < r[key] < 1.4 for r in records)


HIDDEN = ("hidden", "residual_out")
FAULTS = {
    "hidden lr not divided": (
        lambda row: replace(row, lr=row.lr * 4) if row.role == "hidden" else row,
        [f"health/{k}/update_ratio" for k in HIDDEN],
    ),
    "hidden std not divided": (
        lambda row: replace(row, init_std=row.init_std * 2) if row.role == "hidden" else row,
        [f"health/{k}/weight_rms" for k in HIDDEN],
    ),
    "epsilon too large": (
        lambda row: replace(row, eps=row.eps * 1e7),
        [f"health/{k}/eps_ratio" for k in (*HIDDEN, "bias", "norm", "input")],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_said(proxies, capsys, name):
    change, expected = FAULTS[name]
    train(watching(at_width(64, seed=2), *proxies), "wide", change)
    alarms = alarms_of(capsys.readouterr().err)
    assert set(expected) <= set(alarms)
    assert len(set(alarms)) == len(alarms)


def test_under_sp_the_run_leaves_its_proxies(proxies, capsys):
    records = train(watching(at_width(64, rule="sp", seed=2), *proxies), "wide")
    alarms = alarms_of(capsys.readouterr().err)
    assert {f"health/{k}/weight_rms" for k in HIDDEN} <= set(alarms)
    assert len(set(alarms)) == len(alarms)
    assert records[0]["watch/hidden/weight_rms"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.slow
def test_what_is_watched_has_no_slope_in_width_under_mup():
    """log2 of value over expectation against log2 of width, four seeds; under sp it has one."""
    widths, seeds = (16, 32, 64, 128), range(4)
    for seed in seeds:
        Trainer(at_width(16, seed=seed, steps=8), f"p{seed}").fit()
    slopes = {}
    for rule in ("mup", "sp"):
        by_seed = []
        for seed in seeds:
            c = [watching(at_width(w, rule=rule, seed=seed, steps=8), f"p{seed}") for w in widths]
            last = [train(c, f"{rule}-{seed}-{w}")[3] for w, c in zip(widths, c, strict=True)]
            keys = [key for key in last[0] if key.startswith("watch/") and "outside" not in key]
            by_seed.append({key: slope([r[key] for r in last]) for key in keys})
        slopes[rule] = {k: [b[k] for b in by_seed] for k in by_seed[0]}
    for key, found in slopes["mup"].items():
        mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(len(found))
        if "loss" not in key:
            assert abs(mean) < 0.15 + 3 * error, key
    assert all(x > 0.4 for x in slopes["sp"]["watch/hidden/weight_rms"])
    assert all(x > 0.3 for x in slopes["sp"]["watch/act/residual"])


def slope(values):
    x = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64).log2()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_how_often_is_a_setting(tmp_path):
    records = train(config(tracking={"health_every": 6, "eval_every": 20}), "run")
    steps = [r["step"] for r in records if "health/hidden/weight_rms" in r]
    assert steps == [6, 12, 18, 20]
    assert [r["step"] for r in records if "health/act/residual" in r] == [20]


def test_a_continued_run_records_the_same(monkeypatch):
    whole = train(config(tracking={"checkpoint_every": 5}), "whole")
    original, calls = Trainer._train_one, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_one", lambda t: original(t) if next(calls) < 12 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config(tracking={"checkpoint_every": 5}), "broken")
    broken = train(config(tracking={"checkpoint_every": 5}), "broken")
    assert [timeless(r) for r in whole] == [timeless(r) for r in broken]


def timeless(record):
    return {key: value for key, value in record.items() if "perf" not in key}


def test_the_command(proxies, capsys):
    Path("wide.json").write_text(json.dumps(to_dict(at_width(64, rule="sp"))))
    flags = ["--tracking.watch", *proxies, "--steps", "20", "--tracking.eval_every", "1"]
    assert run(["train", "wide.json", *flags]) == 0
    said = capsys.readouterr().err
    assert "beware: the table" in said and "health/hidden/weight_rms" in said
    assert run(["train", "wide.json", "--tracking.watch", "gone", "--run", "other"]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
