"""Configs: plain data in, one clear error out; overlays keep derived fields consistent."""

import dataclasses
import json
import math
import tomllib

import pytest
import tomli_w

from mupgpt.config.fields import Decides, decided
from mupgpt.config.phases import PhaseConfig
from mupgpt.config.plain import from_dict, load_toml, to_dict
from mupgpt.config.schema import (
    Base,
    DataConfig,
    GPTConfig,
    HParams,
    ParallelConfig,
    Prediction,
    Schedule,
    TrackingConfig,
    TrainConfig,
)
from mupgpt.errors import ConfigError
from mupgpt.resolve import overlay, train_config
from mupgpt.tuning.spec import StudyConfig

CONFIGS = (
    GPTConfig, Base, HParams, Schedule, PhaseConfig, DataConfig, ParallelConfig, TrackingConfig,
    Prediction, TrainConfig, StudyConfig,
)  # fmt: skip


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
        ({"model": "proxy-32", "hparams": {"lr": 0.0}}, "hparams.lr = 0.0: must be > 0"),
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


PROXY = train_config({"model": "proxy-32"})
BEYOND = {
    "model.n_layer": 1e9, "model.d_model": 10_000_000_001, "base.n_layer": 1e6,
    "model.vocab_size": 1e12, "model.seq_len": 1e12, "model.n_head": 1e9, "model.d_ffn": 1e12,
    "batch_size": 1e12, "steps": 1e15, "accumulate": 1e12, "parallel.tensor": 1e9,
    "data.eval_tokens": 1e30, "schedule.warmup_tokens": 1e30, "hparams.weight_decay": 1e300,
    "hparams.lr": -1, "seed": -1, "grad_clip": -1, "tracking.eval_every": -1,
    "tracking.checkpoint_every": -5, "tracking.health_every": -1, "tracking.keep_steps": [5, -1],
    "phases": [{"steps": 5}, {"steps": 1e15}], "prediction.level": 3, "tokens": 1e30,
}  # fmt: skip


def nested(dotted, value):
    *path, last = dotted.split(".")
    raw = {last: value}
    for name in reversed(path):
        raw = {name: raw}
    return overlay({"model": {"preset": "proxy-32"}, "base": to_dict(PROXY.base)}, raw)


@pytest.mark.parametrize("key", BEYOND)
def test_a_number_beyond_anything_real_is_refused_at_once(key):
    with pytest.raises(
        ConfigError, match=rf"^{key}(\[\d\])?(\.steps)? = .* must be [<>]"
    ) as caught:
        train_config(nested(key, BEYOND[key]))
    assert len(str(caught.value)) < 120


def numbers():
    """Every number of a run: its dotted key."""
    every = decided(TrainConfig, "result", "measure", "execution", "record")
    flat = {key: get(PROXY, key) for key in every}
    return [key for key, value in flat.items() if type(value) in (int, float)]


def get(config, dotted):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e299, True, "", None, [], {}])
def test_no_number_may_be_this(wrong):
    """In any field: one error that begins with its name, from a table and from Python alike."""
    for key in numbers():
        for make in (from_table, from_python):
            with pytest.raises(ConfigError, match=rf"^{key}( =|:) "):
                make(key, wrong)


def from_table(key, value):
    return train_config(nested(key, value))


def from_python(key, value):
    part, _, name = key.rpartition(".")
    if not part:
        return dataclasses.replace(PROXY, **{key: value})
    below = dataclasses.replace(getattr(PROXY, part), **{name: value})
    return dataclasses.replace(PROXY, **{part: below})


def test_every_field_says_what_it_decides():
    for config in CONFIGS:
        for f in dataclasses.fields(config):
            own = f.metadata.get("decides") in Decides.__args__
            assert own != dataclasses.is_dataclass(f.type), f"{config.__name__}.{f.name}"


def test_what_decides_no_result():
    """One who adds a field here has asked what a continued run may be told anew."""
    assert decided(TrainConfig, "measure") == ("data.eval_tokens",)
    assert decided(TrainConfig, "execution") == (
        "accumulate", "memory", "parallel.tensor", "parallel.checkpointing", "parallel.compile",
    )  # fmt: skip
    assert {name.partition(".")[0] for name in decided(TrainConfig, "record")} == {
        "tracking", "prediction",
    }  # fmt: skip


def test_python_may_say_what_a_file_may():
    config = TrainConfig(
        model=dataclasses.replace(PROXY.model, n_layer=2.0),
        base=to_dict(PROXY.base),
        hparams={**to_dict(PROXY.hparams), "lr": 1},
        schedule=to_dict(PROXY.schedule),
        phases=[{"steps": 3}, {"steps": 4, "seq_len": 32}],
        tracking=TrackingConfig(watch=["runs/a"]),
    )
    assert config == train_config(json.loads(json.dumps(to_dict(config))))
    assert type(config.model.n_layer) is int and type(config.hparams.lr) is float
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Schedule(shape="cosin")
    with pytest.raises(ConfigError, match=r"unknown key .hparams\.lrr"):
        TrainConfig(model=PROXY.model, base=PROXY.base, hparams={"lrr": 1})


@pytest.mark.parametrize("key", ["rule", "data.source", "tracking.project"])
def test_no_name_is_empty(key):
    with pytest.raises(ConfigError, match=rf"^{key} = ' ': must not be empty"):
        train_config(nested(key, " "))


def test_the_nearest_divisors_are_named_at_once():
    with pytest.raises(ConfigError, match=r"n_head = 334 does not divide 999999; .*: 333, 351"):
        train_config(nested("model", {"d_model": 999_999, "n_head": 334, "d_head": 0}))


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
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml("a\0b")


DEEP = 100_000
UNREADABLE = {
    "deep.json": ("[" * DEEP + "]" * DEEP, "must nest at most 32 deep"),
    "tables.json": ('{"a":' * 50 + "1" + "}" * 50, "must nest at most 32 deep"),
    "deep.toml": ("a = " + "[" * DEEP + "]" * DEEP, "must nest at most 32 deep"),
    "keys.toml": (".".join("a" * 500) + " = 1", "must nest at most 32 deep"),
    "twice.json": ('{"a": {"steps": 1, "lr": 2, "steps": 3}}', "key 'steps' stands twice"),
    "list.json": ("[1]", "must hold a table of keys"),
    "null.json": ("null", "must hold a table of keys"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_config_is_gives_one_line(tmp_path, name):
    text, message = UNREADABLE[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_toml(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "text"), [("a.toml", "steps = 3"), ("a.json", '{"steps": 3}')])
def test_a_mark_before_the_text_is_read_over(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_toml(tmp_path / name) == {"steps": 3}
