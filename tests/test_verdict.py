"""The verdict recovers planted optima, slopes and regrets, and can say PASS, FAIL and neither."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mupgpt.cli import run
from mupgpt.config.schema import HParams
from mupgpt.errors import ConfigError
from mupgpt.evidence.drift import LR
from mupgpt.evidence.verdict import judge, judge_sweep, load_verdict
from mupgpt.report.pictures import verdict_picture
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.curves import Curve, parabola_optimum
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import parse_spec
from mupgpt.tuning.study import Sweep
from mupgpt.tuning.trial_queue import fill

RESULTS = Path(__file__).parent.parent / "sweeps" / "results"
WIDTHS = (32, 64, 128)
CORPUS = {"name": "planted", "sha256": "ab" * 32}
X = np.arange(-12.0, -4.0)


def curves(slope, noise=0.0, seeds=5, floor=2.0, seed=0):
    """Parabolas whose optimum moves by ``slope`` per doubling, jittered per seed and width."""
    rng = np.random.default_rng(seed)
    made = {}
    for i, width in enumerate(WIDTHS):
        at = -8.3 + slope * i + noise * rng.standard_normal(seeds)
        made[width] = Curve(X, floor + 0.05 * (X[:, None] - at) ** 2)
    return made


def judge_lr(by_rule, *args, **more):
    return judge({LR: by_rule}, *args, **more)


def test_the_parabola_finds_what_was_planted():
    for at in (-9.7, -8.5, -8.01, -6.2):
        assert parabola_optimum(X, 2 + 0.3 * (X - at) ** 2) == pytest.approx(at, abs=1e-9)


def test_an_optimum_at_the_edge_stays_inside_the_grid():
    assert parabola_optimum(X, X) == X[0]
    assert parabola_optimum(X, -X) == X[-1]
    with pytest.raises(ConfigError, match="needs at least three"):
        parabola_optimum(X[:2], X[:2])


def test_planted_slopes_and_regrets():
    verdict = judge_lr({"mup": curves(0.0), "sp": curves(-1.0)}, CORPUS)
    assert verdict.rules["mup"].shift == pytest.approx(0.0, abs=1e-9)
    assert verdict.rules["sp"].shift == pytest.approx(-1.0, abs=1e-9)
    # Two octaves off on 2 + 0.05 x²: 0.2/2, read off a curve through grid points.
    assert np.mean(verdict.rules["sp"].regrets) == pytest.approx(0.1, abs=2e-3)
    assert np.mean(verdict.rules["mup"].regrets) == pytest.approx(0.0, abs=1e-9)
    assert (verdict.rule, verdict.verdict) == ("mup", "PASS")
    assert verdict.rules["sp"].verdict == "FAIL"


def test_the_interval_is_students():
    shifts = judge_lr({"mup": curves(0.1, noise=0.2)}, CORPUS).rules["mup"]
    low, high = shifts.ci95
    expected = stats.t.interval(0.95, 4, loc=np.mean(shifts.shifts), scale=stats.sem(shifts.shifts))
    assert (low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slope", "noise", "expected"),
    [(0.0, 0.02, "PASS"), (0.1, 0.02, "PASS"), (-0.5, 0.05, "FAIL"), (0.5, 0.05, "FAIL"),
     (0.2, 0.1, "INCONCLUSIVE"), (0.0, 1.0, "INCONCLUSIVE")],
)  # fmt: skip
def test_three_answers(slope, noise, expected):
    assert judge_lr({"mup": curves(slope, noise)}, CORPUS).verdict == expected


def test_the_seeds_still_needed_would_decide():
    rule = judge_lr({"mup": curves(0.0, 0.35, seeds=3)}, CORPUS).rules["mup"]
    assert rule.verdict == "INCONCLUSIVE"
    n, spread = rule.seeds_needed, np.std(rule.shifts, ddof=1)
    room = 0.2 - abs(rule.shift)
    assert stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= room
    assert stats.t.ppf(0.975, n - 2) * spread / math.sqrt(n - 1) > room
    beyond = judge_lr({"mup": curves(0.3, 0.1, seeds=3)}, CORPUS).rules["mup"]
    assert beyond.verdict == "INCONCLUSIVE" and beyond.seeds_needed == 4  # they would say FAIL
    assert judge_lr({"mup": curves(0.0, seeds=1)}, CORPUS).rules["mup"].seeds_needed == 2


def test_no_optimum_seen_is_no_verdict():
    falling = {w: Curve(X, 2.0 - 0.01 * X[:, None] * np.ones(5)) for w in WIDTHS}
    verdict = judge_lr({"mup": falling}, CORPUS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "mup at width 32: the lowest loss is at the end of the grid" in verdict.warnings[0]


def test_one_seed_decides_nothing():
    assert judge_lr({"mup": curves(0.0, seeds=1)}, CORPUS).verdict == "INCONCLUSIVE"


def test_the_interval_covers_what_was_planted():
    """300 sweeps of five noisy seeds: 95 % of the intervals hold the planted slope (±3 se)."""
    hits = 0
    for seed in range(300):
        low, high = judge_lr({"mup": curves(-0.13, 0.2, seed=seed)}, CORPUS).rules["mup"].ci95
        hits += low <= -0.13 <= high
    assert hits / 300 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 300))


def test_a_winning_control_is_a_warning():
    verdict = judge_lr({"mup": curves(0.0), "sp": curves(-1.0, floor=1.9)}, CORPUS)
    assert "sp reaches a lower loss than mup at width 128" in verdict.warnings[0]
    assert "sweep its hyperparameters jointly" in str(verdict)


def test_the_json_has_what_readers_rely_on():
    data = judge_lr({"mup": curves(0.0), "sp": curves(-1.0, noise=0.01)}, CORPUS).to_dict()
    assert data["verdict"] == "PASS"
    assert data["corpus"] == CORPUS
    rule = data["rules"]["sp"]
    assert set(rule["optimum_log2_lr"]) == {"32", "64", "128"}
    assert rule["shift_per_doubling"] == pytest.approx(-1.0, abs=0.02)
    low, high = rule["shift_ci95"]
    assert low < rule["shift_per_doubling"] < high
    assert rule["regret_at_widest"] == pytest.approx(0.1, abs=0.01)
    assert rule["seeds"] == 5


def test_a_written_verdict_is_judged_again(tmp_path, capsys):
    verdict = judge_lr({"mup": curves(0.1, 0.05), "sp": curves(-1.0)}, CORPUS, tolerance=0.3)
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(verdict.to_dict()))
    assert load_verdict(path).to_dict() == verdict.to_dict()
    assert load_verdict(path, 0.01).verdict == "FAIL"
    assert run(["verdict", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == verdict.to_dict()
    rest = '"axis": "width", "corpus": {}, "tolerance": 0.2'
    odd = '{"hparams.lr": {"mup": {"x": {}}}}'
    for bad in ("{}", f'{{"curves": {{}}, {rest}}}', f'{{"curves": {odd}, {rest}}}'):
        path.write_text(bad)
        with pytest.raises(ConfigError):
            load_verdict(path)
    with pytest.raises(ConfigError, match="tolerance = 0"):
        judge_lr({"mup": curves(0.0)}, CORPUS, tolerance=0.0)


@pytest.mark.parametrize(("name", "axis"), [("batch-size", "batch"), ("horizon", "steps")])
def test_a_written_verdict_knows_its_axis_by_either_name(name, axis):
    assert load_verdict(RESULTS / f"{name}.json").axis == axis


def test_an_unknown_axis_is_refused():
    assert judge_lr({"mup": curves(0.0)}, CORPUS, axis="horizon").axis == "steps"
    with pytest.raises(ConfigError, match="unknown axis 'widht'; did you mean 'width'"):
        judge_lr({"mup": curves(0.0)}, CORPUS, axis="widht")


def test_one_width_cannot_drift():
    with pytest.raises(ConfigError, match="one size only"):
        judge_lr({"mup": {32: curves(0.0)[32]}}, CORPUS)


def test_pictures_are_the_same_bytes(tmp_path):
    verdict = judge_lr({"mup": curves(0.0), "sp": curves(-1.0)}, CORPUS)
    first, second = (verdict_picture(verdict, tmp_path / name) for name in "ab")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert "octaves per doubling" in first[0].read_text()


TINY = {
    "name": "tiny",
    "study": {"sampler": "grid", "seeds": [0, 1]},
    "train": {
        "model": {"n_layer": 1, "d_model": 8, "d_head": 8, "vocab_size": 257, "seq_len": 8},
        "base": {
            "d_model": 8, "d_ffn": 32, "n_head": 1, "d_head": 8, "n_kv_head": 1, "n_layer": 1,
        },
        "steps": 8,
        "batch_size": 2,
        "data": {"source": "text.txt", "eval_tokens": 64},
    },
    "structure": {"rule": ["mup", "sp"], "model.d_model": [8, 16]},
    "space": {"hparams.lr": {"low": 1e-4, "high": 1.0, "log": True, "points": 3}},
}  # fmt: skip


def test_a_sweeps_verdict_and_the_base_is_shared(tmp_path):
    """At the base width both rules are one model: their curves there are equal bit for bit."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    run_sweep(parse_spec(TINY, "tiny"), workers=1)
    verdict = judge_sweep(Sweep.open("tiny"))
    assert set(verdict.rules) == {"mup", "sp"} and verdict.rule == "mup"
    a, b = (verdict.curves[LR][rule][8] for rule in ("mup", "sp"))
    assert np.array_equal(a.log2, b.log2) and np.array_equal(a.loss, b.loss)


def test_an_unfinished_sweep_has_no_verdict(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 200)
    fill(Sweep.create(parse_spec({**TINY, "name": "begun"}, "x")))
    with pytest.raises(ConfigError, match=r"0 finished points and 3 to go"):
        judge_sweep("begun")


def test_a_sweep_that_stopped_trials_early_has_no_verdict(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 200)
    halved = {"sampler": "qmc", "trials": 6, "rungs": 1, "reduction": 2}
    raw = {**TINY, "study": {**TINY["study"], **halved}, "name": "halved"}
    run_sweep(parse_spec(raw, "x"), workers=1)
    with pytest.raises(ConfigError, match="stopped trials early"):
        judge_sweep("halved")


def test_one_axis_is_judged_and_the_others_are_held(tmp_path):
    """Of four shapes each axis reads the two that differ in it alone."""
    (tmp_path / "text.txt").write_text("some words " * 200)
    shapes = {"model.d_model": [8, 16], "model.n_layer": [1, 2]}
    run_sweep(parse_spec({**TINY, "structure": shapes, "name": "two"}, "x"), workers=1)
    width, depth = judge_sweep("two"), judge_sweep("two", axis="depth")
    assert (width.axis, width.rules["mup"].sizes) == ("width", (8, 16))
    assert (depth.axis, depth.rules["mup"].sizes) == ("depth", (1, 2))
    shared = [v.curves[LR]["mup"] for v in (width, depth)]
    assert np.array_equal(shared[0][8].loss, shared[1][1].loss)
    with pytest.raises(ConfigError, match=r"a verdict needs .* over batch_size"):
        judge_sweep("two", axis="batch")
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        judge_sweep("two", axis="dept")
    with pytest.raises(ConfigError, match="unknown axis of a verdict 'vocabulary'"):
        judge_sweep("two", axis="vocabulary")


def test_every_hyperparameter_has_its_own_curves(tmp_path):
    """With study.each the sweep is one grid a dimension, the others at the run's own values."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    decay = {"low": 1e-3, "high": 100.0, "log": True, "points": 3, "center": 0.5}
    raw = {
        **TINY,
        "name": "each",
        "study": {"sampler": "grid", "seeds": [0, 1], "each": True},
        "structure": {"model.d_model": [8, 16]},
        "space": {**TINY["space"], "hparams.weight_decay": decay},
    }
    run_sweep(parse_spec(raw, "each"), workers=1)
    verdict = judge_sweep("each")
    assert list(verdict.drifts) == ["hparams.lr", "hparams.weight_decay"]
    assert 0.5 in 2.0 ** verdict.curves["hparams.weight_decay"]["mup"][8.0].log2
    alone = best_hparams(Sweep.open("each").studies()["each/model.d_model=8/hparams.weight_decay"])
    assert alone.config.hparams.lr == HParams().lr
    assert set(alone.uncertainty) == {"hparams.weight_decay"}


def flat_curves(slope, bend):
    return {w: Curve(X, 2 + bend * (X[:, None] + 8.3 - slope * i - SPREAD) ** 2)
            for i, w in enumerate(WIDTHS)}  # fmt: skip


SPREAD = np.array([0.1, -0.1, 0.05, 0.0, -0.05])


@pytest.mark.parametrize(
    ("hparam", "slope", "bend", "said"),
    [("hparams.emb_mult", -0.5, 1e-3, "FLAT"), ("hparams.emb_mult", -0.5, 0.05, "FAIL"),
     (LR, -0.5, 1e-3, "FAIL"), ("hparams.emb_mult", 0.0, 0.05, "PASS")],
)  # fmt: skip
def test_a_drift_that_costs_nothing_is_flat(hparam, slope, bend, said):
    """An octave off on 2 + bend x²: a regret of bend/2 against the 0.5 % that still counts as none;
    of the learning rate every drift counts."""
    verdict = judge({LR: {"mup": curves(0.0)}, hparam: {"mup": flat_curves(slope, bend)}}, CORPUS)
    drift = verdict.tested[hparam]
    assert drift.regret == pytest.approx(bend / 2 * (2 * slope) ** 2, rel=0.06)
    assert drift.verdict == said
    assert verdict.verdict == ("FAIL" if said == "FAIL" else "PASS")


def test_the_regrets_interval_covers_what_was_planted():
    """300 sweeps: the 95 % interval of the regret holds its mean over all of them (±3 se)."""
    drifts = [judge_lr({"mup": curves(-0.6, 0.1, seed=s)}, CORPUS).rules["mup"] for s in range(300)]
    true = np.mean([d.regret for d in drifts])
    hits = sum(2 * d.regret - d.most_regret <= true <= d.most_regret for d in drifts)
    assert hits / 300 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 300))


def test_a_sweep_of_another_kind_has_no_verdict(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 200)
    Sweep.create(parse_spec({**TINY, "structure": {}, "name": "other"}, "x"))
    with pytest.raises(ConfigError, match=r"a verdict needs one hyperparameter at a time"):
        judge_sweep(Sweep.open("other"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_learning_rates_transfer_on_real_text_and_a_dropped_rule_is_caught():
    """Widths 32, 64, 128 on the default corpus, five seeds: what the README says of `lr`."""
    run_sweep("lr", workers=2)
    verdict = judge_sweep("lr")
    low, high = verdict.rules["mup"].ci95
    assert verdict.verdict == "PASS" and low >= -0.2 and high <= 0.2
    assert verdict.rules["mup"].regret <= 0.005
    assert verdict.rules["sp-fanin"].ci95[1] < -0.8
    assert {verdict.rules[r].verdict for r in ("sp", "sp-fanin", "mup-constant-lr")} == {"FAIL"}
