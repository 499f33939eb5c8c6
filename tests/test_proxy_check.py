"""The proxy's check: every criterion changes its mind exactly at its stated bound."""

import dataclasses
import json

import pytest

from mupgpt.cli import run
from mupgpt.errors import ConfigError
from mupgpt.mutransfer.proxy_check import check_proxy
from mupgpt.parametrization.axes import AXES
from mupgpt.parametrization.rules import RULES
from mupgpt.resolve import overlay, train_config

PROXY = {
    "model": {"n_layer": 4, "d_model": 128, "d_head": 32, "vocab_size": 257, "seq_len": 128},
    "batch_size": 32, "steps": 5000, "precision": "fp32",
    "data": {"source": "stdlib", "tokenizer": "bytes"},
}  # fmt: skip
GOOD = {"seeds": 3, "critical_batch": 4096.0}
SHALLOW, DEEP = {"model": {"n_layer": 24}}, {"model": {"n_layer": 41}}
SP = {"rule": "sp"}


def checked(proxy=None, target=None, **given):
    """The check of PROXY with changes against a target that differs by its own changes alone."""
    config = overlay(PROXY, proxy or {})
    return check_proxy(
        train_config(config), train_config(overlay(config, target or {})), **{**GOOD, **given}
    )


def status(name, *changes, **given):
    (found,) = [c for c in checked(*changes, **given).criteria if c.name == name]
    return found.status


def test_a_good_proxy_is_fine_everywhere():
    found = checked(target={"model": {"d_model": 160}})
    assert {c.status for c in found.criteria} == {"fine"}
    assert found.adequate and str(found).endswith("\nadequate")


def test_every_axis_of_a_transfer_has_its_line():
    names = [c.name for c in checked().criteria]
    assert len(names) == len(set(names)) and set(AXES) < set(names)


def width(d_model):
    return {"model": {"d_model": d_model}}


@pytest.mark.parametrize(
    ("name", "proxy", "target", "expected"),
    [
        ("width", {"model": {"d_model": 124, "d_head": 31}}, {}, "caution"),
        ("width", SP, width(256), "no"),
        ("width ratio", {}, width(128 * 28), "fine"),
        ("width ratio", {}, width(128 * 29), "caution"),
        ("width ratio", width(128 * 29), width(128), "caution"),
        ("ffn ratio", {}, {"model": {"d_ffn": 128}}, "fine"),
        ("ffn ratio", SP, {"model": {"d_ffn": 128}}, "no"),
        ("d_head", {}, {"model": {"d_head": 64}}, "caution"),
        ("d_head", SP, {"model": {"d_head": 64}}, "no"),
        ("heads", width(96), {}, "caution"),
        ("heads", width(128), {}, "fine"),
        ("kv groups", {}, {"model": {"n_kv_head": 2}}, "no"),
        ("depth", {"model": {"n_layer": 3}}, {}, "caution"),
        ("depth", SHALLOW, {"model": {"n_layer": 40}}, "caution"),
        ("depth", SHALLOW, {"model": {"n_layer": 41}}, "no"),
        ("depth", SHALLOW, {"model": {"n_layer": 10}}, "caution"),
        ("depth", SHALLOW, {"model": {"n_layer": 9}}, "no"),
        ("context", {"model": {"seq_len": 127}}, {}, "caution"),
        ("context", {}, {"model": {"seq_len": 256}}, "caution"),
        ("batch", {"batch_size": 31}, {}, "caution"),
        ("batch", {}, {"batch_size": 33}, "caution"),
        ("steps", {"steps": 4999}, {}, "caution"),
        ("steps", {}, {"steps": 5001}, "caution"),
        ("tokens/parameter", {}, {"steps": 10000}, "fine"),
        ("tokens/parameter", {}, {"steps": 10001}, "caution"),
        ("tokens/parameter", {}, {"steps": 2500}, "fine"),
        ("tokens/parameter", {}, {"steps": 2499}, "caution"),
        ("warm-up steps", {"schedule": {"warmup": 40 / 5000}}, {}, "fine"),
        ("warm-up steps", {"schedule": {"warmup": 39 / 5000}}, {}, "caution"),
        ("warm-up steps", {"schedule": {"warmup": 0.0}, "steps": 40}, {}, "caution"),
        ("warm-up steps", {"schedule": {"warmup": 1.0}, "steps": 39}, {}, "no"),
        ("warm-up steps", {"hparams": {"beta2": 0.999}}, {}, "caution"),
        ("vocabulary", {}, {"model": {"vocab_size": 258}}, "no"),
        ("corpus", {}, {"data": {"source": "package:numpy"}}, "no"),
        ("corpus", {}, {"data": {"tokenizer": "gpt2"}}, "no"),
        ("precision", {}, {"precision": "bf16"}, "caution"),
    ],
)
def test_each_bound(name, proxy, target, expected):
    assert status(name, proxy, target) == expected


@pytest.mark.parametrize(
    ("tokens", "proxy_batch", "target_batch", "expected"),
    [
        (0.0, 32, 32, "caution"),
        (4096.0, 32, 32, "fine"),
        (8192.0, 32, 64, "fine"),
        (8191.0, 32, 64, "caution"),
        (4095.0, 32, 32, "caution"),
        (8191.0, 64, 32, "no"),
        (4096.0, 64, 32, "no"),
        (4095.0, 64, 32, "caution"),
    ],
)
def test_the_critical_batch_is_the_users(tokens, proxy_batch, target_batch, expected):
    """Beyond it on one side only is no; nobody's published constant is taken for the user's."""
    change = ({"batch_size": proxy_batch}, {"batch_size": target_batch})
    assert status("critical batch", *change, critical_batch=tokens) == expected


@pytest.mark.parametrize(("seeds", "expected"), [(None, "caution"), (2, "caution"), (3, "fine")])
def test_seeds(seeds, expected):
    assert status("seeds", seeds=seeds) == expected


def test_depth_asks_the_rule(monkeypatch):
    """A rule that covers depth makes any ratio fine, and is what the others are told of."""
    monkeypatch.setitem(RULES, "deep", dataclasses.replace(
        RULES["mup"], name="deep", covers=(*RULES["mup"].covers, "depth")
    ))  # fmt: skip
    assert status("depth", {**SHALLOW, "rule": "deep"}, DEEP) == "fine"
    (line,) = [c for c in checked(SHALLOW, DEEP).criteria if c.name == "depth"]
    assert "deep" in line.why and line.status == "no"
    shallow = {"model": {"n_layer": 3}, "rule": "deep"}
    assert status("depth", shallow, DEEP) == "caution"


def test_every_line_says_why_and_where_from():
    found = checked({"rule": "sp", "model": {"n_layer": 2}}, {"model": {"n_layer": 40}})
    places = ("arXiv", "docs/", "control", "Model Zoo")
    assert all(c.why and any(place in c.source for place in places)
               for c in found.criteria)  # fmt: skip
    text = str(found)
    assert text.count("NOT ADEQUATE: depth") == 1
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["adequate"] is False
    assert [c["name"] for c in record["criteria"] if c["status"] == "no"] == ["depth"]


def test_bad_measurements():
    with pytest.raises(ConfigError, match="seeds = 0"):
        checked(seeds=0)
    with pytest.raises(ConfigError, match="critical_batch = -1"):
        checked(critical_batch=-1.0)


def test_the_command(capsys, tmp_path):
    assert run(["check-proxy", "smoke", "--to", "proxy-256", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    by_name = {c["name"]: c for c in record["criteria"]}
    assert (by_name["width"]["proxy"], by_name["width"]["target"]) == (32, 256)
    assert by_name["seeds"]["proxy"] == 1
    assert run(["check-proxy", "smoke", "--to", "cerebras-gpt-13b"]) == 1
    assert "NOT ADEQUATE" in capsys.readouterr().out
    assert run(["check-proxy", "cerebras-gpt-40m", "--to", "cerebras-gpt-13b"]) == 0
    assert "not known: name the sweep" in capsys.readouterr().out


def test_the_command_takes_a_sweeps_study(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[study]\nseeds = [0, 1, 2]\n[train]\nmodel = "proxy-32"\n'
        '[structure]\n"model.d_model" = [32, 128]\n'
        '[space]\n"hparams.lr" = { low = 1e-3, high = 1e-1, log = true }\n'
    )
    argv = ["check-proxy", "mine.toml", "--to", "proxy-256", "--json"]
    assert run([*argv, "--cell", "mine/model.d_model=128"]) == 0
    lines = {c["name"]: c for c in json.loads(capsys.readouterr().out)["criteria"]}
    assert lines["width"]["status"] == lines["seeds"]["status"] == "fine"
    assert run(argv) == 0
    assert "taking mine/model.d_model=32" in capsys.readouterr().err
    assert run([*argv, "--cell", "mine/model.d_model=12"]) == 2
    assert "did you mean 'mine/model.d_model=128'" in capsys.readouterr().err
    assert run(["check-proxy", "nothing", "--to", "proxy-256"]) == 2
