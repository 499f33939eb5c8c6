"""Choices beside the rule: each keeps what it says, is printed, and stops where it must."""

import json
import math
from pathlib import Path

import pytest
import torch

from mupgpt.cli import run
from mupgpt.config.schedules import lr_factor, warmup_steps
from mupgpt.errors import ConfigError
from mupgpt.evidence.verdict import load_verdict
from mupgpt.mutransfer.choices import CHOICES, chosen
from mupgpt.mutransfer.transfer import decay_time, transfer
from mupgpt.parametrization.rules import RULES
from mupgpt.resolve import overlay, train_config

MEASURED = Path(__file__).parent.parent / "sweeps" / "results" / "batch-size.json"

SOURCE = {
    "model": "proxy-32", "steps": 400, "batch_size": 8,
    "hparams": {"weight_decay": 0.1, "beta2": 0.98, "eps": 1e-6},
}  # fmt: skip
TARGET = {"model": "proxy-128", "steps": 900, "batch_size": 32}


def source(**changes):
    return train_config(overlay(SOURCE, changes))


def plan(*choose, to=TARGET, **changes):
    return transfer(source(**changes), to, choose=choose)


def tokens_to_forget(beta, config):
    """Half-life of a moving average in tokens."""
    return math.log(0.5) / math.log(beta) * config.tokens_per_step


def test_the_square_root_of_the_batch():
    """κ = 4: what a token adds to each average and to the random walk of the weights is kept."""
    before, after = plan("batch-sqrt").source, plan("batch-sqrt").config
    a, b = before.hparams, after.hparams
    assert b.lr == pytest.approx(2 * a.lr) and b.eps == pytest.approx(a.eps / 2)
    assert (1 - b.beta1, 1 - b.beta2) == pytest.approx((0.4, 0.08))
    for config in (before, after):
        assert config.hparams.lr**2 / config.tokens_per_step == pytest.approx(a.lr**2 / 512)
    assert warmup_steps(after.schedule, after.steps, after.tokens_per_step) >= 2 / (1 - b.beta2)


def spread(hparams, batch, tokens=2**13, n=4096):
    """Variance of weights after so many tokens of pure noise, which a batch averages."""
    w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    adam = torch.optim.Adam(
        [w], lr=hparams.lr, betas=(hparams.beta1, hparams.beta2), eps=hparams.eps
    )
    generator = torch.Generator().manual_seed(batch)
    for _ in range(tokens // batch):
        w.grad = torch.randn(n, generator=generator, dtype=w.dtype) / batch**0.5
        adam.step()
    return float(w.detach().square().mean())


def test_noise_walks_as_far_at_any_batch_under_the_square_root():
    """Where gradients are noise the rule is exact: as far after as many tokens, at κ = 4.

    A variance over 4096 weights has a standard error of √(2/4096) = 2.2 %, a ratio 3.1 %.
    """
    settled = source(hparams={"beta1": 0.975, "beta2": 0.9975})  # κ(1 − β) must be small
    moved = {c: transfer(settled, TARGET, choose=[c]).config.hparams
             for c in ("batch-sqrt", "batch-half-life")}  # fmt: skip
    before = spread(settled.hparams, 8)
    assert spread(moved["batch-sqrt"], 32) / before == pytest.approx(1.0, abs=0.1)
    assert spread(moved["batch-half-life"], 32) / before == pytest.approx(0.25, abs=0.1)


def test_our_own_sweep_finds_less_than_the_square_root_and_more_than_nothing():
    """As `batch-sqrt` says: octaves of lr per doubling of the batch, 95 % over five seeds."""
    measured = load_verdict(MEASURED).drifts["hparams.lr"]["mup"]
    low, high = measured.ci95
    assert 0 < low < high < 0.5
    half = (high - low) / 2
    assert f"{measured.shift:.2f} ± {half:.2f}" in CHOICES["batch-sqrt"].reach
    assert measured.verdict == "FAIL" and measured.regret > 0.02  # what keeping lr costs at 16 × B


def test_a_half_life_below_one_step_is_refused():
    with pytest.raises(ConfigError, match=r"hparams\.beta2 from 0\.98 to 0\.27"):
        plan("batch-half-life", to=TARGET | {"batch_size": 512})


def test_the_half_life_of_squared_gradients_in_tokens():
    for batch in (1, 32, 128):
        moved = plan("batch-half-life", to=TARGET | {"batch_size": batch})
        a, b = moved.source, moved.config
        assert tokens_to_forget(b.hparams.beta2, b) == pytest.approx(
            tokens_to_forget(a.hparams.beta2, a)
        )
        assert (b.hparams.lr, b.hparams.beta1) == (a.hparams.lr, a.hparams.beta1)


def test_the_two_answers_agree_on_beta2_to_first_order():
    near = TARGET | {"batch_size": 9}
    a, b = (plan(c, to=near).config.hparams for c in ("batch-sqrt", "batch-half-life"))
    assert 1 - a.beta2 == pytest.approx(1 - b.beta2, rel=2e-3)


def test_linear_decay_to_zero():
    config = plan("decay-to-zero", to=TARGET | {"schedule": {"shape": "cosine"}}).config
    warm = warmup_steps(config.schedule, config.steps, config.tokens_per_step)
    assert lr_factor(config, config.steps) == 0
    assert lr_factor(config, (warm + config.steps) // 2) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("choose", [(), ("batch-sqrt",), ("batch-half-life", "decay-to-zero")])
def test_weight_decay_follows_steps_and_learning_rate(choose):
    moved = plan(*choose)
    assert decay_time(moved.config) == pytest.approx(decay_time(moved.source))


def test_the_timescale_can_be_chosen_where_the_rule_does_not_bring_it():
    published = train_config({"model": "cerebras-gpt-40m"})
    assert transfer(published, "cerebras-gpt-13b").choices == ()
    moved = transfer(published, "cerebras-gpt-13b", choose=["decay-time"]).config
    assert moved.hparams.weight_decay == pytest.approx(0.1 * 1525 / 174_335)


def test_equal_batches_change_nothing():
    same = TARGET | {"batch_size": 8, "steps": 400}
    for choice in ("batch-sqrt", "batch-half-life"):
        assert plan(choice, to=same).config == plan(to=same).config


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_named_printed_and_sourced(name):
    made = plan(name)
    choice = CHOICES[name]
    assert "arXiv" in choice.source and choice.reach
    for text in (str(made), made.to_toml()):
        assert f"{name}: {choice.says} ({choice.source})" in text and choice.reach in text
    fields = [c.field for c in made.changes if c.why == f"choice {name}"]
    assert fields, "what a choice changed says so"
    assert name in [c["name"] for c in json.loads(json.dumps(made.to_dict()))["choices"]]
    axes = {axis.name: axis.by for axis in made.axes}
    assert all(choice.says in axes[axis] for axis in choice.axes)


@pytest.mark.parametrize(
    ("choose", "changes", "message"),
    [
        (["batch-sqr"], {}, "unknown choice 'batch-sqr'; did you mean 'batch-sqrt'"),
        (["batch-sqrt", "batch-half-life"], {}, r"must be one: both settle the batch"),
        (["batch-sqrt"], {"rule": "mup-lion"}, "rule mup-lion has another optimizer"),
        (["batch-sqrt"], {"batch_size": 2},
         r"16 times the tokens a step would take 1 − hparams.beta1 from 0.1 to 1.6"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(choose, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(*choose, **changes)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_comes_with_a_rule(rule):
    assert [c.name for c in chosen(rule)] == ["decay-time"] * rule.keeps_decay_time


def test_the_command_makes_choices(capsys):
    flags = ["--choose", "decay-to-zero", "--choose", "batch-half-life"]
    assert run(["transfer", "cerebras-gpt-40m", "--to", "cerebras-gpt-111m", *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in said["choices"]] == ["batch-half-life", "decay-to-zero"]
    assert said["config"]["schedule"]["end"] == 0
    assert said["config"]["hparams"]["beta2"] == pytest.approx(0.95 ** (120 / 256))
