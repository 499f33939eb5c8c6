"""Ladders: the right rungs, continued where they stopped, and a band to hold the run against."""

import dataclasses
import json
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import mupgpt.evidence.ladder as ladder_module
from mupgpt.cli import run as cli
from mupgpt.config.schema import HParams, Prediction
from mupgpt.errors import ConfigError
from mupgpt.evidence.ladder import Ladder, Rung, load_ladder, run_ladder, six_nd
from mupgpt.mutransfer.transfer import transfer
from mupgpt.parametrization.layout import count_params
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.metrics import read_metrics
from mupgpt.training.population import Population

TOML = """
[ladder]
widths = [8, 16, 24]
steps = [4, 8, 16]
seeds = [0, 1]
max_flops = 2e7
law = "chinchilla"

[train]
batch_size = 2
model = { n_layer = 1, d_model = 8, d_head = 8, vocab_size = 257, seq_len = 16 }
data = { source = "text.txt", eval_tokens = 64 }
"""


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))
    (tmp_path / "small.toml").write_text(TOML)


def spec():
    return load_ladder("small.toml")


def target(**changes):
    stem = spec().config
    return dataclasses.replace(stem, model=stem.model.widen(64), steps=40, **changes)


def planted(law):
    """The ladder of the spec with losses that lie on ``law(n, d)``."""
    one = spec()
    rungs = [
        Rung(config=c, seeds=(0,), losses=(loss,), corpus={}, seconds=0)
        for c in one.configs
        if (loss := law(count_params(c.model), c.tokens))
    ]
    return Ladder(one, tuple(rungs))


def test_the_rungs_are_every_pair_that_is_cheap_enough():
    configs = spec().configs
    found = {(c.model.d_model, c.steps) for c in configs}
    everything = {(w, s) for w in (8, 16, 24) for s in (4, 8, 16)}
    stem = spec().config
    assert found == {
        (w, s) for w, s in everything if 6 * count_params(stem.model.widen(w)) * s * 32 <= 2e7
    }
    assert found < everything
    assert [six_nd(c) for c in configs] == sorted(six_nd(c) for c in configs)
    assert all(c.base == stem.base and c.model.d_head == 8 for c in configs)


def test_a_rung_is_its_seeds_side_by_side(tmp_path):
    found = run_ladder(spec(), tmp_path / "l")
    rung = found.rungs[0]
    configs = [dataclasses.replace(rung.config, seed=seed) for seed in (0, 1)]
    population = Population(configs, ladder_module.load_corpus(rung.config.data))
    population.train()
    assert list(rung.losses) == list(population.evaluate().values())
    assert len(found.runs) == 2 * len(found.rungs)
    assert found.flops == 2 * sum(map(six_nd, spec().configs))


def test_a_signal_stops_a_ladder_between_two_steps(tmp_path, monkeypatch):
    """Asked while it trains, it ends after those steps by itself; no half rung is kept."""
    train, steps = Population.train, []

    def signalled(self, until):
        train(self, until)
        steps.append(until)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Population, "train", signalled)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(spec(), tmp_path)
    assert len(steps) == 1 and not list(tmp_path.glob("*.json"))


def test_what_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    whole = run_ladder(spec(), tmp_path / "whole")
    trained = []

    class Counted(Population):
        def __init__(self, configs, corpus):
            if len(trained) == 2 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            trained.append((configs[0].model.d_model, configs[0].steps))
            super().__init__(configs, corpus)

    monkeypatch.setattr(ladder_module, "Population", Counted)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(spec(), tmp_path / "broken")
    assert len(list((tmp_path / "broken").glob("*.json"))) == 2
    again = run_ladder(spec(), tmp_path / "broken")
    assert [r.losses for r in again.rungs] == [r.losses for r in whole.rungs]
    assert len(trained) == len(set(trained)) == len(whole.rungs)
    run_ladder(spec(), tmp_path / "broken")
    assert len(trained) == len(whole.rungs)


def test_another_recipe_is_trained_anew(tmp_path):
    first = run_ladder(spec(), tmp_path / "l")
    other = spec().like(dataclasses.replace(spec().config, hparams=HParams(lr=0.1)))
    second = run_ladder(other, tmp_path / "l")
    assert [r.losses for r in first.rungs] != [r.losses for r in second.rungs]
    assert all(r.config.hparams.lr == 0.1 for r in second.rungs)


def test_decay_keeps_its_time_along_the_ladder():
    aim = target(hparams=HParams(weight_decay=0.2))
    for config in spec().like(aim).configs:
        assert config.hparams.weight_decay * config.steps == pytest.approx(0.2 * aim.steps)


@pytest.mark.parametrize(
    ("law", "planted_loss"),
    [("power", lambda c: 300 * c**-0.05), ("compute", lambda c: 9 - 0.4 * np.log10(c))],
)
def test_a_planted_law_predicts_the_target(law, planted_loss):
    aim = target()
    said = planted(lambda n, d: planted_loss(6.0 * n * d)).predict(aim, law)
    assert said.loss == pytest.approx(planted_loss(six_nd(aim)), rel=1e-6)
    assert said.low <= said.loss <= said.high
    assert said.source.startswith(f"{law} on 6 runs of ladder small, ")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 4}, "batch_size = 2, the target 4"),
        ({"rule": "sp"}, "rule = 'mup', the target 'sp'"),
        ({"hparams": HParams(lr=0.1)}, "hparams"),
        ({"schedule": {"shape": "cosine"}}, "schedule"),
        ({"data": {"source": "text.txt", "eval_tokens": 128}}, "data"),
    ],
)
def test_only_width_and_horizon_may_differ(change, name):
    from mupgpt.config.plain import to_dict
    from mupgpt.resolve import overlay

    given = {k: v if isinstance(v, dict | int | str) else to_dict(v) for k, v in change.items()}
    odd = train_config(overlay(to_dict(target()), given))
    with pytest.raises(ConfigError, match=f"ladder small has {name}"):
        planted(lambda n, d: 3 / n**0.1).predict(odd)


def test_depth_is_not_on_the_ladder():
    odd = target()
    odd = dataclasses.replace(odd, model=dataclasses.replace(odd.model, n_layer=2))
    with pytest.raises(ConfigError, match="ladder small has model"):
        planted(lambda n, d: 3 / n**0.1).predict(odd)


def test_bad_declarations(tmp_path):
    for old, new, message in [
        ('"chinchilla"', '"chinchila"', "did you mean 'chinchilla'"),
        ("[4, 8, 16]", "[]", "ladder.steps = ()"),
        ("[8, 16, 24]", "[8, 8]", "none twice"),
        ("[8, 16, 24]", "[12]", "does not divide"),
        ("2e7", "1.0", "leave a rung"),
        ("[ladder]", "[lader]", "did you mean 'ladder'"),
    ]:
        (tmp_path / "bad.toml").write_text(TOML.replace(old, new))
        with pytest.raises(ConfigError, match=r"bad\.toml: ") as found:
            load_ladder("bad.toml")
        assert message in str(found.value)


def test_too_few_rungs_are_said(tmp_path):
    few = dataclasses.replace(
        spec(), ladder=dataclasses.replace(spec().ladder, widths=(8,), steps=(4,))
    )
    found = run_ladder(few, tmp_path / "few")
    with pytest.raises(ConfigError, match=r"ladder small: .*needs at least 6 runs"):
        found.predict(target())


def test_the_band_is_logged_and_leaving_it_is_said_once(tmp_path, capsys):
    config = spec().config
    plain = dataclasses.replace(config, steps=12)
    loss = Trainer(plain, tmp_path / "plain").fit()["val/loss"]
    assert "predict/low" not in read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]
    capsys.readouterr()
    bands = {
        "inside": (Prediction(loss=loss, low=loss - 0.1, high=loss + 0.1, source="x"), 0),
        "above": (Prediction(loss=0.5, low=0.4, high=0.6, source="x"), 1),
        "below": (Prediction(loss=50.0, low=40.0, high=60.0, source="x"), 1),
    }
    for name, (said, warnings) in bands.items():
        held = dataclasses.replace(plain, prediction=said)
        assert Trainer(held, tmp_path / name).fit()["val/loss"] == loss
        assert capsys.readouterr().err.count("has left the prediction") == warnings
        records = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "val/loss" in r]
        assert all(r["predict/low"] == said.low for r in records)
        assert all(r["predict/high"] == said.high for r in records)
    # the prediction says nothing about what is trained: a finished run may be given another one
    other = dataclasses.replace(plain, prediction=bands["above"][0])
    assert Trainer(other, tmp_path / "inside").fit()["val/loss"] == loss


def test_a_prediction_lies_in_its_interval():
    with pytest.raises(ConfigError, match=r"lie between prediction.low and .high"):
        Prediction(loss=2.0, low=2.1, high=2.2)
    assert not Prediction() and Prediction(loss=2.0, low=1.9, high=2.1)


def test_a_plan_records_what_it_expects():
    plan = transfer(spec().config, {"model": {**TARGET, "d_model": 64}, "batch_size": 2, **DATA})
    assert plan.to_dict()["prediction"] is None and "predicted" not in plan.to_toml()
    said = Prediction(loss=2.0, low=1.9, high=2.1, source="a law")
    plan = plan.expecting(said)
    assert plan.to_dict()["prediction"]["loss"] == 2.0
    assert "# predicted loss: 2.0000, 95 % interval [1.9000, 2.1000] (a law)" in plan.to_toml()
    assert plan.config.prediction == said == train_config(plan.to_dict()["config"]).prediction
    assert "predicted loss: 2.0000" in str(plan)


TARGET = {"n_layer": 1, "d_head": 8, "vocab_size": 257, "seq_len": 16}
DATA = {"data": {"source": "text.txt", "eval_tokens": 64}}


def test_the_transfer_command_runs_the_ladder(tmp_path, capsys, monkeypatch):
    """The rungs take the plan's hyperparameters; a preset stands for a sweep's result here."""
    (tmp_path / "ladder.toml").write_text(
        "[ladder]\nwidths = [32, 64]\nsteps = [2, 4, 8]\nseeds = [0]\nlaw = 'power'\n"
        "[train]\nmodel = 'proxy-32'\n"
    )
    monkeypatch.setattr(ladder_module, "STEPS_AT_ONCE", 2)
    (tmp_path / "aim.toml").write_text(
        'model = "proxy-96"\ndata = { source = "text.txt", eval_tokens = 64 }\n'
    )
    command = ["transfer", "proxy-32", "--to", "aim.toml", "--accept", "corpus"]
    assert cli([*command, "--ladder", "ladder.toml", "--json", "-o", "target.toml"]) == 0
    record = json.loads(capsys.readouterr().out)
    said = record["prediction"]
    assert said["low"] <= said["loss"] <= said["high"]
    assert record["config"]["prediction"] == said
    rungs = [json.loads(p.read_text()) for p in (tmp_path / "runs/ladders/ladder").glob("*.json")]
    assert len(rungs) == 6
    assert {r["config"]["schedule"]["warmup"] for r in rungs} == {
        record["config"]["schedule"]["warmup"]
    }
    assert "predicted loss" in (tmp_path / "target.toml").read_text()


def test_losses_do_not_depend_on_the_pieces(tmp_path, monkeypatch):
    whole = run_ladder(spec(), tmp_path / "a")
    monkeypatch.setattr(ladder_module, "STEPS_AT_ONCE", 3)
    pieces = run_ladder(spec(), tmp_path / "b")
    assert np.array_equal([r.losses for r in whole.rungs], [r.losses for r in pieces.rungs])
    assert torch.get_num_threads() == 1


def test_a_record_of_another_ladder_is_begun_anew(tmp_path):
    """benchmarks/predict_target.py: old losses must not stand beside a new ladder's prediction."""
    path = Path(__file__).parent.parent / "benchmarks" / "predict_target.py"
    begun = runpy.run_path(str(path))["begun"]
    record, runs = tmp_path / "predict.json", tmp_path / "runs"
    said = {"rungs": [{"losses": [2.0], "seconds": 1.5}], "target": {"width": 64, "steps": 9}}

    def trained():
        (runs / "seed0").mkdir(parents=True, exist_ok=True)
        return runs / "seed0"

    trained()
    assert begun(record, said, runs) == json.loads(record.read_text()) == said
    assert not runs.exists()  # trained before the prediction was made
    finished = {**said, "target": {**said["target"], "finished": "now", "mean": 1.5}}
    record.write_text(json.dumps(finished))
    assert begun(record, said, runs) == finished and trained().exists()
    for other in (
        {**said, "rungs": [{"losses": [2.0], "seconds": 1.6}]},
        {**said, "target": {"width": 64, "steps": 10}},
    ):
        record.write_text(json.dumps(finished))
        trained()
        assert begun(record, other, runs) == json.loads(record.read_text()) == other
        assert not runs.exists()
