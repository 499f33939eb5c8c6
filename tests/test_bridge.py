"""Rungs: a plan that costs what it says, go or no-go from paired seeds, continued where stopped."""

import dataclasses
import json
import math
import signal
import tomllib

import numpy as np
import pytest

import mupgpt.evidence.bridge_verdict as rungs_module
import mupgpt.evidence.ladder as ladder_module
from mupgpt.cli import run
from mupgpt.errors import ConfigError
from mupgpt.evidence.bridge_verdict import judge_bridge, run_bridge
from mupgpt.evidence.ladder import Rung
from mupgpt.mutransfer.bridge import LR_FACTORS, plan_bridge, with_lr
from mupgpt.mutransfer.transfer import transfer
from mupgpt.planning.flops import flops_per_token
from mupgpt.resolve import overlay, train_config
from mupgpt.training.population import Population

TINY = {
    "model": {"n_layer": 1, "d_model": 8, "d_head": 8, "vocab_size": 257, "seq_len": 16},
    "steps": 30, "batch_size": 2, "hparams": {"beta2": 0.9},
    "data": {"source": "text.txt", "eval_tokens": 64},
}  # fmt: skip
WIDE = {"model": {"d_model": 40}}


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def planned(target=WIDE, source=None, max_share=20.0, **given):
    config = overlay(TINY, source or {})
    given = {"seeds": (0, 1), **given}
    return plan_bridge(train_config(config), overlay(config, target), max_share=max_share, **given)


def thirteen_b(**given):
    return plan_bridge(train_config({"model": "cerebras-gpt-40m"}), "cerebras-gpt-13b", **given)


# The plan


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2, 3, 4)])
def test_the_plan_costs_the_sum_of_its_runs_and_stays_within_its_share(share, seeds):
    plan = thirteen_b(max_share=share, seeds=seeds)
    whole = flops_per_token(plan.target.model, "palm") * plan.target.tokens
    each = [flops_per_token(c.model, "palm") * c.steps * c.batch_size * 2048 for c in plan.rungs]
    assert plan.flops == pytest.approx(3 * len(seeds) * sum(each), rel=1e-12)
    assert plan.share == pytest.approx(plan.flops / whole)
    assert 0.9 * share < plan.share <= share  # and no more is left than a step or a width
    record = plan.to_dict()
    assert sum(rung["flops"] for rung in record["rungs"]) == pytest.approx(record["flops"])


def test_a_rung_is_the_target_but_for_width_and_steps():
    plan = thirteen_b()
    assert plan.target == transfer(plan.source, "cerebras-gpt-13b").config
    for c in plan.rungs:
        as_target = dataclasses.replace(
            plan.target, model=plan.target.model.widen(c.model.d_model), steps=c.steps,
            schedule=c.schedule,
        )  # fmt: skip
        assert c == as_target
        assert c.model.d_head == 128 and 256 < c.model.d_model < 5120
        assert plan.source.steps <= c.steps == plan.rungs[0].steps < plan.target.steps
        assert c.schedule.shape == plan.target.schedule.shape


def test_decay_and_warmup_move_as_in_any_transfer():
    """lr·λ·steps stays, and Adam's second moment gets its 2/(1 − β₂) steps."""
    plan = planned({**WIDE, "steps": 1000}, {"hparams": {"weight_decay": 0.2, "beta2": 0.9}})
    for c in plan.rungs:
        assert c.hparams.weight_decay * c.steps == pytest.approx(0.2 * 30)
        assert c.hparams.lr == plan.source.hparams.lr and c.base == plan.source.base
        assert c.schedule.warmup * c.steps == pytest.approx(max(20, 0.1 * c.steps))


def test_widths_are_spread_evenly_and_grow_in_number_with_the_ratio():
    free = thirteen_b(max_share=30.0)
    widths = [c.model.d_model for c in free.rungs]
    assert widths == [512, 1152, 2432] and free.shrunk == ()
    assert {c.steps for c in free.rungs} == {free.target.steps}
    steps = np.diff(np.log([256, *widths, 5120]))
    assert steps.max() - steps.min() < 0.25  # multiples of 128 cannot be quite even
    source = train_config({"model": "cerebras-gpt-40m"})
    near = plan_bridge(source, "cerebras-gpt-256m", max_share=30.0)
    widths = [c.model.d_model for c in near.rungs]
    assert len(widths) == 2 and all(w % 64 == 0 and 256 < w < 1088 for w in widths)


def test_steps_shrink_first_then_widths_and_the_plan_says_so():
    steps, widths = thirteen_b(max_share=0.05), thirteen_b(max_share=0.01)
    assert [s.split()[0] for s in steps.shrunk] == ["steps"]
    assert [s.split()[0] for s in widths.shrunk] == ["widths", "steps"]
    assert widths.rungs[-1].model.d_model < steps.rungs[-1].model.d_model == 2432
    assert widths.rungs[-1].steps >= widths.source.steps
    assert all(line in str(widths) for line in widths.shrunk)
    assert "1 % of the target's FLOPs" in str(widths) and "FLOPs (palm)" in str(widths)
    assert planned({**WIDE, "steps": 30}).shrunk == ()


def test_what_does_not_fit_says_how_much_would():
    with pytest.raises(ConfigError, match=r"allow that much: --max-share ([\d.]+)") as found:
        planned(max_share=1e-3)
    share = float(str(found.value).rpartition(" ")[2])
    assert [c.model.d_model for c in planned(max_share=share).rungs] == [16]
    with pytest.raises(ConfigError, match="allow that much"):
        planned(max_share=share - 0.002)


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ({"model": {"d_model": 16}}, {}, "no width between the proxy's 8 and the target's 16"),
        ({}, {}, "no width between"),
        (WIDE, {"seeds": (0,)}, "two or more"),
        (WIDE, {"seeds": (1, 1)}, "none twice"),
        (WIDE, {"max_share": 0.0}, "max_share"),
    ],
)
def test_bad_questions(target, given, message):
    with pytest.raises(ConfigError, match=message):
        planned(target, **given)


@pytest.mark.parametrize(("share", "phases"), [(0.74, [43]), (1.25, [45, 9]), (2.0, [42])])
def test_phases_are_cut_short_and_counted_as_they_are(share, phases):
    """A step of the second phase costs three of the first."""
    parts = [{"steps": 45}, {"steps": 15, "batch_size": 6}]
    plan = planned({**WIDE, "phases": parts, "steps": 60}, max_share=share)
    for config in plan.rungs:
        assert [phase.steps for phase in config.phases] == phases
        assert config.steps == sum(phases) < plan.target.steps == 60
    one_more = plan.target.tokens_at(plan.rungs[0].steps + 1) / plan.rungs[0].tokens
    assert plan.share <= share < plan.share * one_more


def test_a_rung_runs_in_one_process():
    target = {"model": {"d_model": 64}, "parallel": {"tensor": 8}}
    plan = planned(target)
    assert plan.target.parallel.tensor == 8
    assert {(c.model.n_head, c.parallel.tensor) for c in plan.rungs} == {(2, 1), (4, 1)}


def test_grouped_heads_stay_grouped():
    plan = planned({"model": {"d_model": 64, "n_kv_head": 2}})
    assert {c.model.n_head / c.model.n_kv_head for c in plan.rungs} == {4.0}


# The verdict


def judged(moves, noise=0.0, seeds=(0, 1, 2), curve=0.1):
    """The verdict on rungs whose loss is a parabola around log2 = moves[i], with seed noise."""
    plan = planned({"model": {"d_model": 64}}, seeds=seeds)
    rng = np.random.default_rng(0)
    rungs = []
    for config, move in zip(plan.rungs, moves, strict=True):
        x = np.log2(LR_FACTORS)[:, None]
        losses = 2.0 + curve * (x - move) ** 2 + 5.0 * rng.normal(size=len(seeds))
        losses = losses + noise * rng.normal(size=losses.shape)
        rungs.append(Rung(config=config, seeds=seeds, lr_factors=LR_FACTORS, corpus={}, seconds=0,
                          losses=tuple(np.minimum(losses, 6.0).ravel().tolist())))  # fmt: skip
    return judge_bridge(plan, tuple(rungs))


def test_a_planted_optimum_is_recovered():
    """A seed's own level (here far larger than the curve) cancels: it is the same at every rate."""
    found = judged((-0.2, 0.3), curve=1e-3)
    levels = found.rungs[0].losses.mean(axis=0)
    assert np.ptp(levels) > 1
    for rung, move in zip(found.rungs, (-0.2, 0.3), strict=True):
        assert rung.optimum == pytest.approx((move, 0), abs=1e-6)
        assert rung.gains[2.0][0] == pytest.approx(1e-3 * (move**2 - (1 - move) ** 2), abs=1e-9)
    assert found.go and [r.status for r in found.rungs] == ["best", "best"]


@pytest.mark.parametrize(
    ("moves", "go", "direction"),
    [
        ((0.0, 0.0), True, None),
        ((0.45, -0.45), True, None),
        ((0.0, -0.55), False, "down"),
        ((-0.55, 0.0), False, "down"),
        ((0.0, 0.55), False, "up"),
        ((0.9, 2.0), False, "up"),
    ],
)
def test_no_go_where_a_neighbour_is_better(moves, go, direction):
    """The neighbour wins from half an octave on: there the parabola is as low at either."""
    found = judged(moves)
    assert (found.go, found.direction) == (go, direction)
    assert str(found).count("NO-GO") == (not go)
    assert bool(found.remedy) == (not go)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_noise_explains_is_a_go_with_a_warning():
    loud, quiet = judged((0.0, -0.6), noise=0.3), judged((0.0, -0.6), noise=1e-4)
    assert not quiet.go and quiet.rungs[1].status == "lower"
    assert loud.go and "within noise" in {r.status for r in loud.rungs}
    assert loud.warnings and all(line in str(loud) for line in loud.warnings)


def test_the_interval_is_students_over_paired_seeds():
    found = judged((0.0, 0.0), noise=0.1).rungs[0]
    d = found.losses[1] - found.losses[2]
    assert found.gains[2.0][0] == pytest.approx(d.mean())
    assert found.gains[2.0][1] == pytest.approx(4.302652729911275 * d.std(ddof=1) / math.sqrt(3))


def test_a_diverged_run_counts_as_bad_not_as_missing():
    plan = planned({"model": {"d_model": 64}})
    rungs = tuple(
        Rung(config=c, seeds=(0, 1), lr_factors=LR_FACTORS, corpus={}, seconds=0,
             losses=(2.1, 2.2, 2.0, 2.1, math.nan, math.inf))
        for c in plan.rungs
    )  # fmt: skip
    found = judge_bridge(plan, rungs)
    assert found.go and found.rungs[0].losses[2].tolist() == [math.log(257) + 1] * 2
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_no_go_names_what_else_changed():
    plan = planned({"model": {"d_model": 64, "n_layer": 3}, "batch_size": 4})
    rungs = tuple(
        Rung(config=c, seeds=(0, 1), lr_factors=LR_FACTORS, corpus={}, seconds=0,
             losses=(1.0, 1.0, 2.0, 2.0, 3.0, 3.0))
        for c in plan.rungs
    )  # fmt: skip
    text = str(judge_bridge(plan, rungs))
    assert "depth 1 → 3" in text and "batch 2 → 4" in text
    assert "coord-check --rule mup" in text and "lower" in text


# Running


def test_a_rung_is_its_runs_side_by_side(tmp_path):
    plan = planned(max_share=5.0)
    found = run_bridge(plan, tmp_path / "r")
    rung, config = found.rungs[0], plan.rungs[0]
    alone = [dataclasses.replace(with_lr(config, f), seed=s) for f in LR_FACTORS for s in (0, 1)]
    population = Population(alone, ladder_module.load_corpus(config.data))
    population.train()
    assert rung.losses.ravel().tolist() == list(population.evaluate().values())
    assert rung.losses.shape == (3, 2)


@pytest.fixture
def trained(monkeypatch):
    """The widths that were trained, in order."""
    widths = []

    class Counted(Population):
        def __init__(self, configs, corpus):
            widths.append(configs[0].model.d_model)
            super().__init__(configs, corpus)

    monkeypatch.setattr(ladder_module, "Population", Counted)
    return widths


def test_what_is_finished_is_not_trained_again(tmp_path, trained, monkeypatch):
    plan = planned()
    whole = run_bridge(plan, tmp_path / "whole")
    assert trained == [c.model.d_model for c in plan.rungs] == [16, 24]
    trained.clear()
    with monkeypatch.context() as patch:
        asked = []

        def interrupted(self, done, total, what=""):
            if trained == [16, 24] and not asked:
                asked.append(signal.raise_signal(signal.SIGINT))

        patch.setattr(rungs_module.Progress, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_bridge(plan, tmp_path / "broken")
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["w16.json"]
    again = run_bridge(plan, tmp_path / "broken")
    assert trained == [16, 24, 24]
    for a, b in zip(whole.rungs, again.rungs, strict=True):
        assert np.array_equal(a.losses, b.losses)
    run_bridge(plan, tmp_path / "broken")
    assert trained == [16, 24, 24]


def test_another_question_is_trained_anew(tmp_path, trained):
    run_bridge(planned(), tmp_path)
    run_bridge(planned(source={"hparams": {"lr": 1e-3}}), tmp_path)
    run_bridge(planned(source={"hparams": {"lr": 1e-3}}, seeds=(0, 1, 2)), tmp_path)
    assert trained == [16, 24] * 3


# The command


def test_the_plan_is_written_as_runs(tmp_path, capsys):
    argv = ["rungs", "cerebras-gpt-40m", "--to", "cerebras-gpt-13b", "-o", "plan", "--json"]
    assert run(argv) == 0
    record = json.loads(capsys.readouterr().out)
    plan = thirteen_b()
    assert record == json.loads(json.dumps(plan.to_dict()))
    files = sorted(p.name for p in (tmp_path / "plan").iterdir())
    assert len(files) == 9 and "w384-lr0.5.toml" in files
    for config in plan.rungs:
        for factor in LR_FACTORS:
            path = tmp_path / "plan" / f"w{config.model.d_model}-lr{factor:g}.toml"
            written = train_config(tomllib.loads(path.read_text()))
            assert written == with_lr(config, factor)
            assert written.hparams.lr == factor * plan.source.hparams.lr


def test_the_command_runs_and_judges(tmp_path, capsys, trained, monkeypatch):
    target = overlay(TINY, {"model": {"preset": "proxy-96", "n_layer": 1, "seq_len": 16}})
    model = target["model"]
    (tmp_path / "aim.json").write_text(json.dumps({**target, "model": {
        k: v for k, v in model.items() if k not in ("d_model", "d_head")}}))  # fmt: skip
    argv = ["rungs", "proxy-32", "--to", "aim.json", "--max-share", "50", "--seeds", "0", "1"]
    code = run([*argv, "--run"])
    said = capsys.readouterr().out
    assert code == (0 if "\nGO: " in said else 1)
    assert (tmp_path / "runs/rungs/proxy-32-to-aim/w64.json").is_file()
    assert run([*argv, "--run", "--json"]) == code
    record = json.loads(capsys.readouterr().out)
    assert record["go"] is (code == 0) and trained == [64]
    assert [r["width"] for r in record["results"]] == [64]
    assert run(["rungs", "proxy-32", "--to", "proxy-256"]) == 2
    assert "allow that much: --max-share" in capsys.readouterr().err


@pytest.mark.slow
def test_mup_is_a_go_and_a_rule_whose_optimum_moves_is_not(tmp_path):
    """One proxy, tuned at width 32: mup keeps its rate, the best one of sp-fanin falls."""
    source = {
        "model": {"preset": "proxy-32", "d_head": 16, "seq_len": 16},
        "base": {"d_model": 32, "d_ffn": 128, "n_head": 2, "d_head": 16, "n_kv_head": 2,
                 "n_layer": 2},
        "steps": 80, "schedule": {"warmup": 0.5}, "data": {"eval_tokens": 4096},
    }  # fmt: skip
    found = {}
    for rule in ("mup", "sp-fanin"):
        config = {**source, "rule": rule}
        plan = plan_bridge(
            train_config(config), overlay(config, {"model": {"d_model": 160}}),
            seeds=(0, 1, 2, 3), max_share=50.0,
        )  # fmt: skip
        found[rule] = run_bridge(plan, tmp_path / rule)
        assert [r.width for r in found[rule].rungs] == [48, 96]
    assert found["mup"].go and found["mup"].direction is None
    assert not found["sp-fanin"].go and found["sp-fanin"].direction == "down"
    assert found["sp-fanin"].rungs[-1].status == "lower"
    assert found["sp-fanin"].rungs[-1].optimum[0] < -0.8
    assert "NO-GO: the optimum moves down" in str(found["sp-fanin"])
