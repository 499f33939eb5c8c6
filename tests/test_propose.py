"""Proposals: the budget is kept, the optimum is the law's, and the written config trains."""

import inspect
import json
import math
import tomllib
from pathlib import Path

import pytest

from mupgpt.cli import run as cli
from mupgpt.cli.laws import propose as command
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.presets import PRESETS
from mupgpt.resolve import train_config
from mupgpt.scaling import HOFFMANN_2022, REPLICATION_2024, fit_chinchilla, synthetic_runs
from mupgpt.scaling.propose import ASPECT, Budget, propose, shape_of


@pytest.mark.parametrize("flops", [1e18, 1e20, 1e21, 5.76e23])
def test_a_budget_is_kept_and_the_optimum_is_the_laws(flops):
    found = propose(Budget(flops=flops))
    best = REPLICATION_2024.optimum(flops)
    assert found.flops == pytest.approx(flops, rel=0.01)
    assert found.flops == 6 * found.n_params * found.tokens
    assert found.n_params == pytest.approx(best.n_params, rel=0.03)
    assert found.loss == pytest.approx(best.loss, rel=1e-4)
    assert found.loss == REPLICATION_2024.loss(found.n_params, found.tokens)
    assert found.interval.covers(float(HOFFMANN_2022.loss(found.n_params, found.tokens)))
    c = found.config
    assert c.tokens == found.tokens and count_params(c.model) == found.n_params
    assert c.schedule.shape == "linear" and c.schedule.end == 0.0
    assert not c.prediction


@pytest.mark.parametrize("n_params", [2e6, 1e8, 1.3e9, 1.3e10])
def test_shapes(n_params):
    shape = shape_of(n_params, PRESETS["cerebras-gpt-40m"].shape)
    assert count_params(shape) == pytest.approx(n_params, rel=0.2 if n_params < 1e7 else 0.03)
    assert shape.d_ffn == 4 * shape.d_model == 4 * shape.n_head * shape.d_head
    assert shape.vocab_size == 50257 and shape.seq_len == 2048
    if shape.n_layer > 2:
        assert ASPECT[0] * 0.9 < shape.d_model / shape.n_layer < ASPECT[1] * 1.1


def test_the_batch_follows_the_published_recipes():
    sizes = [propose(Budget(flops=c)).config.batch_size for c in (2.6e18, 2.8e20, 2.3e22)]
    assert sizes == sorted(sizes)
    assert 100 < sizes[0] < 264 and 600 < sizes[2] < 1100
    assert propose(Budget(flops=1e20), batch_size=7).config.batch_size == 7


def test_hours_are_flops_with_what_is_assumed_said():
    given = Budget(hours=24, gpus=8, peak_flops=1e15, mfu=0.5)
    found = propose(given)
    assert found.config == propose(Budget(flops=24 * 3600 * 8 * 1e15 * 0.5)).config
    said = " ".join(found.assumptions)
    assert "24 h on 8 accelerators of 1e+15 FLOP/s peak" in said and "MFU of 0.5" in said


def test_more_use_means_a_smaller_model_trained_longer():
    trained = propose(Budget(flops=1e22))
    used = propose(Budget(flops=1e22, inference_tokens=2e12))
    assert used.n_params < trained.n_params and used.tokens > trained.tokens
    assert used.loss == pytest.approx(trained.loss, rel=2e-3)
    assert any("below the training-optimal model's bill" in line for line in used.assumptions)


def test_inference_alone_balances_both_bills():
    """6·N·D = 2·N·T where D = T/3: the training-optimal model that this budget buys."""
    found = propose(Budget(inference_tokens=3e11))
    line = next(line for line in found.assumptions if "no budget was given" in line)
    flops = float(line.split()[0])
    assert REPLICATION_2024.optimum(flops).tokens == pytest.approx(1e11, rel=0.01)


def test_a_loss_is_reached():
    found = propose(Budget(loss=2.2))
    assert found.loss == pytest.approx(2.2, rel=1e-3)
    assert found.flops == pytest.approx(propose(Budget(flops=found.flops)).flops, rel=0.01)
    with pytest.raises(ConfigError, match="the law reaches losses above its E"):
        propose(Budget(loss=1.0))


def test_your_own_runs_replace_the_constants():
    fit = fit_chinchilla(synthetic_runs(HOFFMANN_2022, noise=0.002), start=HOFFMANN_2022, draws=40)
    found = propose(Budget(flops=1e21), fit=fit)
    assert found.loss == pytest.approx(HOFFMANN_2022.optimum(1e21).loss, rel=0.01)
    assert found.interval == fit.predict_interval(found.n_params, found.tokens)
    said = found.config.prediction
    assert said.low <= said.loss == found.loss <= said.high
    assert "56 given runs" in found.assumptions[0]


def test_warmup_is_published_but_neither_long_nor_too_short():
    large, small = propose(Budget(flops=1e22)), propose(Budget(flops=1e13), like="proxy-32")
    assert large.config.schedule.warmup * large.tokens == pytest.approx(375e6)
    steps = small.config.steps
    assert small.config.schedule.warmup * steps == pytest.approx(max(0.1 * steps, 40))
    assert any(line.startswith("warning: ") for line in small.assumptions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "budget = nothing: give one of --flops"),
        ({"flops": 1e20, "hours": 3}, "budget = flops and hours: give one of"),
        ({"flops": -1.0}, r"flops = -1.0: must be finite and not negative"),
        ({"hours": 1, "mfu": 1.5}, r"mfu = 1.5: must be a share of the peak"),
        ({"hours": 1, "gpus": 0}, r"gpus = 0: must be > 0"),
        ({"flops": math.nan}, r"flops = nan"),
    ],
)
def test_bad_budgets(given, message):
    with pytest.raises(ConfigError, match=message):
        propose(Budget(**given))


def test_the_command_writes_a_config_that_trains(capsys):
    """A tiny budget on the bytes of a package, from the proposal to a trained model."""
    given = ["--flops", "2e10", "--like", "proxy-32", "--batch_size", "8", "-o", "out.toml"]
    assert cli(["propose", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = train_config(tomllib.loads(Path("out.toml").read_text()))
    assert found["config"]["steps"] == config.steps
    assert found["flops"] == pytest.approx(2e10, rel=0.02)
    assert found["loss_interval"][0] < found["loss"] < found["loss_interval"][1]
    assert cli(["train", "out.toml", "--steps", "3", "--data.source", "package:json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert cli(["propose", *given]) == 0
    assert "execute it with: mupgpt train out.toml" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(capsys):
    for given in ([], ["--flops", "1e20", "--loss", "2"], ["--flops", "1e20", "--like", "proxy-33"],
                  ["--flops", "1e20", "--runs", "gone.csv"]):  # fmt: skip
        assert cli(["propose", *given]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_commands_defaults_are_the_budgets():
    flags = inspect.signature(command).parameters
    for name in ("gpus", "peak_flops", "mfu"):
        assert flags[name].default == getattr(Budget(flops=1.0), name)
