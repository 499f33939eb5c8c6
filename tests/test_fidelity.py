"""Fidelity: planted orders come back, planted causes are named, and runs are kept."""

import math
from pathlib import Path

import numpy as np
import optuna
import pytest

from mupgpt.errors import ConfigError
from mupgpt.evidence.fidelity import judge_fidelity, rank_correlation
from mupgpt.evidence.fidelity_runs import plan_fidelity, run_fidelity
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import parse_spec

WIDTHS = (32, 64, 128)


def planted(shift, gain=0.02, noise=0.0, winner_gain=None):
    """A sweep of 24 whose best std moves by ``shift`` octaves per doubling; all gain alike."""
    rng = np.random.default_rng(0)
    values = 2.0 ** rng.uniform(-4, 0, size=(24, 2))
    std, lr = np.log2(values).T

    def loss(doublings, seed):
        centre = -2 + shift * doublings
        base = 2.5 * (1 - gain) ** doublings
        eps = noise * np.random.default_rng(seed).normal(size=24)
        return base + 0.05 * (std - centre) ** 2 + 0.05 * (lr + 2) ** 2 + eps

    order = np.argsort(loss(0, 0))
    values, std, lr = values[order], std[order], lr[order]
    fresh = np.array([[loss(i, 10 + 7 * i + s) for s in range(3)] for i in range(3)])
    fresh = fresh.transpose(0, 2, 1)  # (widths, C, seeds)
    if winner_gain is not None:
        fresh[:, 0] = fresh[0, 0] * (1 - winner_gain) ** np.arange(3)[:, None]
    params = [{"hparams.init_std": float(s), "hparams.lr": float(x)} for s, x in values]
    return judge_fidelity("planted", WIDTHS, 256, params, (loss(0, 0), fresh))


def test_an_order_that_stands_is_faithful():
    found = planted(shift=0.0)
    last = found.agreements[-1]
    assert last.ranks == pytest.approx(1.0) == last.top and last.regret == 0.0
    assert found.verdict == "FAITHFUL" and found.reasons == {}
    assert found.expected == pytest.approx(0.999, abs=1e-3)


def test_what_moves_is_named_with_its_direction():
    """The best std grows with width: high ones rank better there than the sweep said."""
    found = planted(shift=0.5)
    assert found.agreements[-1].ranks < found.agreements[1].ranks < 1.0
    assert list(found.reasons) == ["hparams.init_std"] and found.reasons["hparams.init_std"] < -3
    assert found.expected < found.agreements[-1].ranks
    assert "high init_std ranks better at larger widths" in str(found)
    assert planted(shift=-0.5).reasons["hparams.init_std"] > 3


def test_a_pick_that_costs_too_much_is_unfaithful():
    found = planted(shift=1.0)
    assert found.agreements[-1].regret > 0.02 and found.verdict == "UNFAITHFUL"


def test_gains_per_doubling_are_recovered_and_a_winner_without_them_is_an_alarm():
    found = planted(shift=0.0, gain=0.02, winner_gain=0.002)
    assert found.winner_gain[0] == pytest.approx(0.002, rel=0.01)
    assert found.usual_gain == pytest.approx(0.02, rel=0.1)
    assert any("it uses what is narrow" in note for note in found.warnings)
    assert not any("narrow" in note for note in planted(shift=0.0).warnings)


def test_seed_noise_widens_the_interval():
    quiet, loud = planted(0.0).agreements[-1], planted(0.0, noise=0.2).agreements[-1]
    assert loud.high - loud.low > quiet.high - quiet.low
    assert loud.low < loud.ranks < loud.high


def test_rank_correlation_is_scipys_and_ties_are_no_order():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=20), rng.integers(4, size=20).astype(float)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, np.ones(20)) == 0.0


SPEC = {
    "name": "tiny",
    "study": {"sampler": "random", "trials": 9, "seeds": [0]},
    "train": {
        "model": {"n_layer": 1, "d_model": 8, "d_head": 4, "vocab_size": 257, "seq_len": 8},
        "batch_size": 2,
        "steps": 4,
        "data": {"source": "text.txt", "eval_tokens": 64},
    },
    "space": {
        "hparams.lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "hparams.init_std": {"low": 0.02, "high": 0.5, "log": True},
    },
}
TARGET = {
    "model": {"n_layer": 1, "d_model": 32, "d_head": 4, "vocab_size": 257, "seq_len": 8},
    "batch_size": 2,
    "steps": 4,
}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    return run_sweep(parse_spec(SPEC, "tiny"), workers=1)


def test_the_sample_holds_the_winner_and_widths_fit_the_share(study):
    plan = plan_fidelity(study, TARGET, configs=6, share=30.0)
    assert plan.widths == (8, 16, 32) and plan.params[0] == study.best_params
    assert list(plan.swept) == sorted(plan.swept)
    narrow = plan_fidelity(study, TARGET, configs=6, share=plan.share - 1e-6)
    assert narrow.widths == (8, 16) and narrow.share < plan.share
    with pytest.raises(ConfigError, match=r"share = 0.1: 6 configurations at width 16 alone"):
        plan_fidelity(study, TARGET, configs=6)
    with pytest.raises(ConfigError, match="configs = 24: the sweep has 9"):
        plan_fidelity(study, TARGET)
    with pytest.raises(ConfigError, match=r"widths = \[8\]: must lie above 8"):
        plan_fidelity(study, TARGET, widths=[8], configs=6)


def test_runs_are_kept_and_go_on_where_they_stopped(study, tmp_path, monkeypatch):
    plan = plan_fidelity(study, TARGET, widths=[16], configs=6)
    whole = run_fidelity(plan, tmp_path / "whole")
    monkeypatch.setattr("mupgpt.evidence.fidelity_runs.usual", lambda _: 3)
    import mupgpt.evidence.fidelity_runs as runs

    original, calls = runs._write, []

    def stop(path, data):
        original(path, data)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            run_fidelity(plan, tmp_path / "broken")
    trained = []
    population = runs.Population
    monkeypatch.setattr(
        runs, "Population", lambda c, corpus: trained.append(len(c)) or population(c, corpus)
    )
    again = run_fidelity(plan, tmp_path / "broken")
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-5)
    assert sum(trained) == 2 * 12 - 6
    trained.clear()
    run_fidelity(plan, tmp_path / "broken")
    assert trained == []
    assert again.losses.shape == (2, 6, 2) and math.isfinite(again.losses.sum())


def test_files_of_another_plan_are_trained_anew(study, tmp_path):
    run_fidelity(plan_fidelity(study, TARGET, widths=[16], configs=6), tmp_path / "f")
    before = Path(tmp_path / "f" / "w16.json").read_text()
    run_fidelity(plan_fidelity(study, TARGET, widths=[16], configs=7), tmp_path / "f")
    assert Path(tmp_path / "f" / "w16.json").read_text() != before


def test_a_study_of_others_is_refused():
    with pytest.raises(ConfigError, match="carries no spec"):
        plan_fidelity(optuna.create_study(), TARGET)
