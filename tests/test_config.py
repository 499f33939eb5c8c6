"""Configs: plain data in, one clear error out; overlays keep derived fields consistent."""

import json
import tomllib

import pytest
import tomli_w

from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import HParams, TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.resolve import overlay, train_config


def test_round_trip_through_json_and_toml():
    config = train_config({"model": "cerebras-gpt-13b"})
    data = to_dict(config)
    assert from_dict(TrainConfig, json.loads(json.dumps(data))) == config
    assert from_dict(TrainConfig, tomllib.loads(tomli_w.dumps(data))) == config
    assert train_config(data) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model": "proxy-32", "stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"model": "proxy-32", "hparams": {"lrr": 1}}, "'hparams.lrr'; did you mean 'hparams.lr'"),
        ({"model": {"preset": "proxy-32", "d_modl": 3}}, "did you mean 'model.d_model'"),
        ({"model": "proxy-32", "steps": "many"}, "steps = 'many': expected int, got str"),
        ({"model": "proxy-32", "steps": 2.5}, "steps = 2.5: expected int, got float"),
        ({"model": "proxy-32", "steps": True}, "steps = True: expected int, got bool"),
        ({"model": "proxy-32", "hparams": {"lr": "6e-3"}}, "hparams.lr = '6e-3': expected float"),
        ({"model": "proxy-32", "hparams": {"lr": 0.0}}, r"hparams.lr = 0.0: must be in"),
        ({"model": "proxy-32", "hparams": {"beta2": 1.0}}, "hparams.beta2 = 1.0"),
        ({"model": "proxy-32", "hparams": {"lr": float("nan")}}, "hparams.lr = nan"),
        ({"model": "proxy-32", "hparams": 3}, "hparams = 3: expected a table"),
        ({"model": "proxy-32", "schedule": {"shape": "cosin"}}, "did you mean 'cosine'"),
        ({"model": "proxy-32", "schedule": {"warmup": 2}}, "schedule.warmup = 2.0"),
        ({"model": "proxy-32", "accumulate": 3}, "accumulate = 3: must divide batch_size = 8"),
        ({"model": "proxy-32", "batch_size": 0}, "batch_size = 0: must be > 0"),
        ({"model": "proxy-32", "tokens": -1}, "tokens = -1"),
        ({"model": {"d_model": 4}}, "missing key 'model.n_layer'"),
        ({}, "missing key 'model': give a preset's name"),
        ({"model": "proxy-32", "base": "proxy-33"}, "did you mean 'proxy-32'"),
        ({"model": 5}, "model = 5: must be a preset's name or a table"),
        ({"model": [1]}, r"model = \[1\]"),
        ({"model": {"preset": 5}}, "model.preset = 5"),
        ({"model": "proxy-32", "base": 5}, "base = 5: must be a preset's name"),
        ({"model": "proxy-32", "tokens": 9, "steps": 2}, "be left out where steps is given"),
        ({"model": "proxy-32", "tokens": float("nan")}, "tokens = nan"),
        ({"model": "proxy-32", "tokens": 99, "batch_size": 0}, "batch_size = 0"),
        ({"model": "proxy-32", "steps": 10**400}, "steps: the number is too large"),
    ],
)
def test_one_clear_error(raw, message):
    with pytest.raises(ConfigError, match=message):
        train_config(raw)


def test_an_overlay_rederives_what_follows():
    config = train_config({"model": {"preset": "proxy-64", "d_model": 128}})
    assert (config.model.n_head, config.model.d_ffn, config.model.d_head) == (4, 512, 32)
    assert config.base.d_model == 32


def test_fields_without_a_preset_are_their_own_base():
    fields = {"n_layer": 1, "d_model": 24, "n_head": 2, "vocab_size": 9, "seq_len": 8}
    config = train_config({"model": fields})
    assert (config.base.d_model, config.base.d_head, config.rule) == (24, 12, "mup")


def test_tokens_become_steps():
    assert train_config({"model": "proxy-32", "tokens": 10_000}).steps == 10_000 // 512


def test_defaults_are_the_published_base():
    hparams = HParams()
    assert (hparams.lr, hparams.init_std, hparams.emb_mult) == (6e-3, 0.08, 10.0)


def test_overlay_leaves_its_arguments_alone():
    under = {"a": {"x": 1}}
    assert overlay(under, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    assert under == {"a": {"x": 1}}


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"c\.toml is not valid toml.*line 1"):
        load_toml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path / "missing.toml")
