"""Transfer: each axis that differs is named with what covers it; decay and warm-up follow."""

import dataclasses
import json
import math
import tomllib

import pytest

from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.mutransfer.transfer import decay_time, transfer
from mupgpt.mutransfer.tuned import Tuned, Uncertainty
from mupgpt.parametrization.axes import AXES
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize
from mupgpt.presets import PRESETS
from mupgpt.resolve import overlay, train_config

PROXY = {
    "model": "proxy-32", "steps": 100, "hparams": {"weight_decay": 0.1},
    "schedule": {"warmup": 0.4},
}  # fmt: skip


def proxy(**changes):
    return train_config(overlay(PROXY, changes))


def status(plan):
    return {axis.name: axis.status for axis in plan.axes}


def test_width_alone_changes_width_alone():
    plan = transfer(proxy(), {"model": "proxy-256", "steps": 100, "schedule": {"warmup": 0.4}})
    assert status(plan) == {"width": "covered", "tokens/parameter": "heuristic"}
    assert plan.config.hparams == proxy().hparams
    assert plan.config.base == proxy().base
    row = plan.table.site("blocks.*.mlp.up.weight")
    assert row.lr == pytest.approx(proxy().hparams.lr * 8 / 8)  # lr_mult_hidden 8, m = 8


def test_the_readmes_transfer():
    plan = transfer(proxy(), "cerebras-gpt-13b", accept=["vocabulary", "corpus"])
    assert status(plan) == {
        "width": "covered",
        "d_head": "covered",
        "depth": "heuristic",
        "context": "heuristic",
        "batch": "heuristic",
        "steps": "heuristic",
        "tokens/parameter": "heuristic",
        "vocabulary": "unsupported",
        "corpus": "unsupported",
    }


def test_what_no_rule_covers_must_be_said_aloud():
    with pytest.raises(ConfigError, match=r"vocabulary 257 → 50,257; corpus .*--accept vocabulary"):
        transfer(proxy(), "cerebras-gpt-13b")
    with pytest.raises(ConfigError, match=r"--accept corpus$"):
        transfer(proxy(), "cerebras-gpt-13b", accept=["vocabulary"])
    with pytest.raises(ConfigError, match="did you mean 'corpus'"):
        transfer(proxy(), "cerebras-gpt-13b", accept=["corpsu"])


def test_a_control_covers_no_width():
    with pytest.raises(ConfigError, match=r"rule sp does not cover: width 32 → 256"):
        transfer(proxy(rule="sp"), "proxy-256")


@pytest.mark.parametrize(
    ("rule", "axis", "changed", "expected"),
    [
        ("completep", "depth", {"n_layer": 8}, "covered"),
        ("completep-eps", "depth", {"n_layer": 8}, "covered"),
        ("depth-mup", "depth", {"n_layer": 8}, "covered"),
        ("minicpm", "depth", {"n_layer": 8}, "heuristic"),
        ("mup", "depth", {"n_layer": 8}, "heuristic"),
        ("supar", "density", {"density": 0.25}, "covered"),
    ],
)
def test_what_a_rule_covers_beside_width(rule, axis, changed, expected):
    plan = transfer(proxy(rule=rule), {"model": {"preset": "proxy-32", **changed}})
    found = next(a for a in plan.axes if a.name == axis)
    assert found.status == expected
    assert found.by == (RULES[rule].source if expected == "covered" else RULES[rule].practice[axis])


def test_density_and_other_ratios_are_covered_by_few():
    with pytest.raises(ConfigError, match=r"rule mup does not cover: density 1 → 0.25"):
        transfer(proxy(), {"model": {"preset": "proxy-32", "density": 0.25}})
    with pytest.raises(ConfigError, match=r"rule mup-muon does not cover: ffn ratio 4 → 8"):
        transfer(proxy(rule="mup-muon"), {"model": {"preset": "proxy-32", "d_ffn": 256}})
    with pytest.raises(ConfigError, match=r"rule minicpm does not cover: d_head 32 → 16"):
        transfer(proxy(rule="minicpm"), {"model": {"preset": "proxy-32", "d_head": 16}})


def test_grouped_heads_are_not_covered():
    target = {"model": {"preset": "proxy-256", "n_kv_head": 2}}
    with pytest.raises(ConfigError, match="kv groups 1 → 4"):
        transfer(proxy(), target)


@pytest.mark.parametrize("rule", [r for r in RULES.values() if "width" in r.covers])
def test_decay_keeps_its_time_where_the_rule_does(rule):
    """λ_row = λ_b · (η_b/η_row) · (S_b/S): the averaging time stays the same share of the run."""
    plan = transfer(proxy(rule=rule.name), {"model": "proxy-256", "steps": 700})
    row = plan.table.site("blocks.*.attn.k.weight")
    base = plan.source.hparams
    if rule.keeps_decay_time:
        expected = 0.1 * (base.lr * base.lr_mult_hidden / row.lr) * 100 / 700
        assert row.weight_decay == pytest.approx(expected)
        assert decay_time(plan.config) == pytest.approx(decay_time(plan.source))
    else:
        assert row.weight_decay == 0.1


def test_the_published_recipe_is_left_as_published():
    plan = transfer(train_config({"model": "cerebras-gpt-40m"}), "cerebras-gpt-13b")
    assert plan.config.hparams == PRESETS["cerebras-gpt-13b"].hparams
    assert plan.config.rule == "cerebras"
    assert plan.config.schedule.warmup_tokens == 375_000_000
    assert decay_time(plan.source) == pytest.approx(1.093, abs=1e-3)
    assert decay_time(plan.config) == pytest.approx(1 / (3e-5 * 174335), rel=1e-6)


def test_without_the_horizon_factor_13b_would_average_one_percent():
    """Why λ moves: lr·λ of the proxy, kept over 13B's steps, averages 1 % of the run."""
    source = train_config({"model": "cerebras-gpt-40m", "rule": "mup"})
    moved = transfer(source, "cerebras-gpt-13b").config
    kept = dataclasses.replace(moved, hparams=source.hparams)
    assert decay_time(kept) == pytest.approx(0.0096, abs=1e-4)
    assert decay_time(moved) == pytest.approx(1.093, abs=1e-3)


def test_warmup_is_at_least_two_over_one_minus_beta2():
    plan = transfer(proxy(), {"model": "proxy-64", "steps": 160})
    assert plan.config.schedule.warmup == pytest.approx(40 / 160)
    change = next(c for c in plan.changes if c.field == "schedule.warmup")
    assert change.why == "at least 2/(1 − β₂) steps"
    assert transfer(proxy(), {"model": "proxy-64", "steps": 50}).config.schedule.warmup == 0.5
    assert transfer(proxy(), {"model": "proxy-64", "steps": 4000}).config.schedule.warmup == 0.1


def test_the_same_text_stays_the_source():
    source = proxy(data={"source": "package:numpy"})
    assert transfer(source, "proxy-64").config.data.source == "package:numpy"
    other = {"model": "proxy-64", "data": {"source": "stdlib"}}
    with pytest.raises(ConfigError, match="corpus package:numpy"):
        transfer(source, other)


def test_the_toml_is_the_config():
    plan = transfer(proxy(), "cerebras-gpt-13b", accept=["vocabulary", "corpus"])
    assert train_config(tomllib.loads(plan.to_toml())) == plan.config
    assert "# width: 32 → 5,120, covered" in plan.to_toml()


def test_the_record_is_plain_and_whole():
    tuned = Tuned(
        config=proxy(), study="s", trial=4, loss=2.5, spread=0.1, swept_loss=2.4,
        edges={"hparams.lr": "high"}, corpus={"name": "stdlib"},
    )  # fmt: skip
    plan = transfer(tuned, "proxy-128")
    record = plan.to_dict()
    assert record["origin"]["trial"] == 4
    assert train_config(record["config"]) == plan.config
    assert {row["site"] for row in record["sites"]} == {row.site for row in plan.table.params}
    assert "widen the space" in str(tuned)
    json.dumps(record, allow_nan=False)
    still = transfer(proxy(hparams={"weight_decay": 0.0}), "proxy-128").to_dict()
    assert still["decay_time"] == {"source": None, "target": None}
    json.dumps(still, allow_nan=False)


def test_every_field_that_changes_is_named():
    plan = transfer(proxy(grad_clip=0.5, seed=3, accumulate=2), "proxy-128")
    assert {"grad_clip", "seed", "accumulate"} <= {c.field for c in plan.changes}


def test_a_plan_reads_as_text():
    plan = transfer(proxy(), "proxy-128")
    assert "width" in str(plan)


def test_transfer_to_itself_changes_nothing():
    source = train_config({"model": "cerebras-gpt-13b"})
    plan = transfer(source, "cerebras-gpt-13b")
    assert plan.axes == () and plan.changes == ()
    assert plan.config == source
    assert isinstance(plan.config, TrainConfig)


def test_axes_are_those_that_can_be_accepted():
    far = {
        "model": {
            "n_layer": 9, "d_model": 60, "n_head": 6, "n_kv_head": 3, "d_ffn": 100,
            "vocab_size": 99, "seq_len": 32, "activation": "relu2", "density": 0.5,
        },
        "base": "proxy-32", "batch_size": 3, "steps": 7,
        "data": {"source": "x", "tokenizer": "gpt2"},
    }  # fmt: skip
    accept = ["vocabulary", "corpus", "kv groups", "block", "density"]
    plan = transfer(proxy(), far, accept=accept)
    assert tuple(axis.name for axis in plan.axes) == tuple(AXES)


def test_a_transferred_table_is_the_rule_applied_to_the_base():
    plan = transfer(proxy(), "proxy-128")
    c = plan.config
    assert plan.table == parametrize(c.model, proxy().base, c.hparams, "mup")


def test_the_record_says_how_well_the_values_are_known():
    """lr known to ×/÷ 1.2 and its hidden multiplier to ×/÷ 1.1: together exp(hypot of the logs)."""
    tuned = Tuned(
        config=proxy(), study="planted", trial=3, loss=2.0, spread=0.01, swept_loss=1.9, edges={},
        uncertainty={
            "hparams.lr": Uncertainty(best=1.05, factor=1.2, harmless=1.6),
            "hparams.lr_mult_hidden": Uncertainty(best=0.9, factor=1.1, harmless=None),
        },
        corpus={},
    )  # fmt: skip
    target = {"model": "proxy-256", "steps": 100, "schedule": {"warmup": 0.4}}
    plan = transfer(tuned, target)
    together = math.exp(math.hypot(math.log(1.2), math.log(1.1)))
    hidden = plan.table.site("blocks.*.mlp.up.weight").lr
    said = f"hidden learning rate is {hidden:.2e}, ×/÷ {together:.2f}"
    assert said in str(plan)
    assert plan.to_dict()["origin"]["uncertainty"]["hparams.lr"] == {
        "best": 1.05, "factor": 1.2, "harmless": 1.6,
    }  # fmt: skip
    open_end = {"hparams.lr": Uncertainty(best=None, factor=None, harmless=1.6)}
    plan = transfer(dataclasses.replace(tuned, uncertainty=open_end), target)
    assert "best outside × ½ … 2" in str(plan) and "hidden learning rate" not in str(plan)
