"""`tune`: what it plans is within the budget, what it finds is what was planted to be found."""

import json
import math

import pytest

from mupgpt.cli import run
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.resolve import train_config
from mupgpt.tuner.plan import LEAST, plan_tune
from mupgpt.tuner.search import tune

TINY = {
    "model": {"n_layer": 1, "d_model": 32, "d_head": 4, "vocab_size": 257, "seq_len": 8},
    "batch_size": 2,
    "steps": 6,
    "data": {"source": "text.txt", "eval_tokens": 64},
    "hparams": {"lr": 1e-3, "init_std": 0.3, "emb_mult": 1.0, "weight_decay": 0.0},
}


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(400)))


@pytest.mark.parametrize(
    ("to", "budget"),
    [("proxy-256", 2.0), ("proxy-256", 30.0), ("cerebras-gpt-13b", 0.1), ("btlm-3b-8k", 0.05),
     ("cerebras-gpt-13b", 0.001), ("llama-2-7b", 0.1)],
)  # fmt: skip
def test_a_plan_keeps_its_budget_and_only_widths_and_steps_differ(to, budget):
    plan = plan_tune(to, budget)
    assert 0 < plan.share <= budget and plan.searches * plan.trials >= LEAST
    target, proxy = plan.target, plan.proxy
    assert proxy.model.d_model < plan.wider <= target.model.d_model
    assert proxy.model == target.model.widen(proxy.model.d_model)
    assert proxy.data == target.data and proxy.batch_size == target.batch_size
    if proxy.steps != target.steps:  # as many tokens per parameter as the target's
        ratio = proxy.tokens / count_params(proxy.model) * count_params(target.model)
        assert ratio == pytest.approx(target.tokens, rel=0.01)


def test_a_larger_budget_takes_a_wider_proxy():
    widths = [plan_tune("cerebras-gpt-13b", b).proxy.model.d_model for b in (0.001, 0.01, 0.1)]
    assert widths == sorted(set(widths))


def test_what_no_budget_pays_for_is_said_at_once():
    with pytest.raises(ConfigError, match=r"budget = 1e-07: 48 trials of the cheapest proxy"):
        plan_tune("cerebras-gpt-13b", 1e-7)
    with pytest.raises(ConfigError, match=r"budget = 0: must be > 0"):
        plan_tune("proxy-256", 0)
    with pytest.raises(ConfigError, match="no smaller width has whole heads"):
        plan_tune({"model": {**TINY["model"], "d_head": 32}}, 1.0)


def test_values_without_a_base_hold_at_the_proxy():
    plan = plan_tune(TINY, 30.0)
    assert plan.target.base.d_model == plan.proxy.base.d_model == plan.proxy.model.d_model
    assert plan.space["hparams.init_std"].low == pytest.approx(
        0.5 / math.sqrt(plan.proxy.model.d_model)
    )


def test_the_whole_job_and_again_for_nothing(tmp_path, monkeypatch):
    plan = plan_tune(TINY, 30.0)
    found = tune(plan, workers=1)
    ended = found.fidelity.means[-1]
    assert found.tuned.loss == pytest.approx(ended.min())
    assert found.fidelity.swept[0] == min(found.fidelity.swept)
    assert (found.chance is None) == (plan.searches == 1)
    config = found.transfer_to().config
    assert config.model == train_config(TINY).model and config.steps == 6
    assert config.hparams.lr == found.tuned.config.hparams.lr
    assert config.base == plan.proxy.base
    monkeypatch.setattr("mupgpt.evidence.fidelity_runs.Population", None)
    monkeypatch.setattr("mupgpt.tuning.trial_group.Population", None)
    assert tune(plan, workers=1).to_dict() == found.to_dict()


def test_the_command(tmp_path, capsys):
    (tmp_path / "target.toml").write_text(
        "batch_size = 2\nsteps = 6\n[model]\nn_layer = 1\nd_model = 16\nd_head = 4\n"
        'vocab_size = 257\nseq_len = 8\n[data]\nsource = "text.txt"\neval_tokens = 64\n'
    )
    assert run(["tune", "target.toml", "--budget", "60", "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert run(["tune", "target.toml", "--budget", "60", "--workers", "1", "-o", "out.toml",
                "--json"]) == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["spent"] <= 60 and (tmp_path / "out.toml").is_file()
    assert run(["tune", "target.toml", "--budget", "0.001"]) == 2
