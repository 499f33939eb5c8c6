"""A rule refuses every word that is none of a rule's; the axes are one table, under both names."""

import dataclasses
import json
import math
from typing import get_args

import pytest

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.mutransfer.choices import CHOICES
from mupgpt.mutransfer.proxy_check import JUDGES
from mupgpt.mutransfer.transfer import transfer
from mupgpt.parametrization.axes import AXES, RULE_AXES, AxisName, SizeAxis, find_axis
from mupgpt.parametrization.grammar import CHECKS
from mupgpt.parametrization.layout import ParamSpec, layout
from mupgpt.parametrization.rules import RULES, Rule
from mupgpt.parametrization.table import TUNED, parametrize, parametrize_layout
from mupgpt.parametrization.words import MODEL_QUANTITIES, OPTIMIZERS, POINTS, QUANTITIES, ROLES
from mupgpt.resolve import train_config

SHAPE = GPTConfig(n_layer=2, d_model=64, n_head=2, vocab_size=11, seq_len=8)
BASE = Base(d_model=32, d_ffn=128, n_head=1, d_head=32, n_kv_head=1, n_layer=1)

MISTAKES = {
    "a role": ({"lr": {"hidden ": {"m_in": -1}}}, "lr: unknown role 'hidden '.*mean 'hidden'"),
    "a role's quantity": (
        {"init_std": {"hidden": {"m_inn": -1}}},
        "init_std.hidden: unknown quantity 'm_inn'.*mean 'm_in'",
    ),
    "a power's quantity": ({"eps": {"m-d": -1}}, "eps: unknown quantity 'm-d'.*mean 'm_d'"),
    "a decay's role": ({"weight_decay": {"biases": {}}}, "unknown role 'biases'.*mean 'bias'"),
    "a forward point": (
        {"forward": {"residual_attn": {"m_L": -1}}},
        "forward: unknown forward point 'residual_attn'.*mean 'residual.attn'",
    ),
    "a parameter's quantity at a point": (
        {"forward": {"readout": {"m_out": -1}}},
        "forward.readout: unknown quantity of the model 'm_out'",
    ),
    "an optimizer": ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
    "a decayed role": ({"decayed": ("hiden",)}, "decayed: unknown role 'hiden'"),
    "an axis": ({"covers": ("with",)}, "covers: unknown axis 'with'; did you mean 'width'"),
    "an axis no rule can cover": ({"covers": ("batch",)}, "covers: unknown axis 'batch'"),
    "a forward point as an axis": ({"practice": {"attn": "x"}}, "practice: unknown axis 'attn'"),
    "an exponent in words": (
        {"lr": {"hidden": {"m_in": "-1"}}},
        "lr.hidden.m_in = '-1': must be a finite number",
    ),
    "an exponent that is none": ({"block_lr": {"m_L": math.nan}}, "block_lr.m_L = nan"),
    "an infinite exponent": ({"block_eps": {"m_L": math.inf}}, "block_eps.m_L = inf"),
    "a flag as an exponent": ({"residual_out_std": {"2L": True}}, "residual_out_std.2L = True"),
    "an exponent without its quantity": ({"lr": {"hidden": -1}}, "lr.hidden = -1: .* a mapping"),
    "a list of pairs": ({"lr": [("hidden", {})]}, "lr = .*: must be a mapping"),
    "a bare role": ({"decayed": "hidden"}, "decayed = 'hidden': must be a tuple"),
    "a list of axes": ({"covers": ["width"]}, r"covers = \['width'\]: must be a tuple"),
    "a flag in words": ({"truncated": "no"}, "truncated = 'no': must be True or False"),
    "a number as a flag": ({"keeps_decay_time": 1}, "keeps_decay_time = 1: must be True or False"),
    "no source": ({"source": " "}, "source = ' ': must be a text, not empty"),
    "no reason": ({"practice": {"depth": ""}}, "practice.depth = '': must be a text"),
    "no name": ({"name": ""}, "name = '': must be a text"),
    "a role that is no text": ({"lr": {None: {}}}, "unknown role 'None'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_rule_refuses_what_is_none_of_its_words(mistake):
    fields, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        Rule(**{"name": "mine", "source": "this test", **fields})
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(RULES["mup"], **fields)


def test_every_field_of_a_rule_is_checked():
    assert set(CHECKS) == {field.name for field in dataclasses.fields(Rule)}


def test_every_word_means_something():
    """A role has a learning-rate multiplier, a point a hyperparameter, a quantity a value."""
    hparams = {field.name for field in dataclasses.fields(HParams)}
    assert {f"lr_mult_{role}" for role in ROLES} <= hparams
    assert tuple(TUNED) == POINTS and set(TUNED.values()) <= hparams
    powers = dict.fromkeys(QUANTITIES, 1)
    everything = Rule(
        name="all", source="this test", eps=powers, lr=dict.fromkeys(ROLES, powers),
        forward=dict.fromkeys(POINTS, dict.fromkeys(MODEL_QUANTITIES, 1)),
    )  # fmt: skip
    table = parametrize(SHAPE, BASE, HParams(lr=1.0), everything)
    up = table.site("blocks.*.mlp.up.weight")  # twice as wide in and out, of density 1
    assert up.lr == 2 * 2 * 1 * (2 * 2 * 1 * 32 * 4)
    assert table.multipliers["readout"].value == 2 * 2 * 1 * 32 * 4
    assert {rule.optimizer for rule in RULES.values()} == set(OPTIMIZERS)


def test_a_layout_of_ones_own_says_what_it_lacks():
    specs, hparams = layout(SHAPE), HParams()
    full = dict.fromkeys(MODEL_QUANTITIES, 1.0)
    with pytest.raises(ConfigError, match="rule 'cerebras' needs d_head"):
        given = {name: full[name] for name in full if name != "d_head"}
        parametrize_layout(specs, specs, given, hparams, "cerebras")
    assert parametrize_layout(specs, specs, given, hparams, "mup").rule == "mup"
    with pytest.raises(ConfigError, match="unknown quantity of the model 'm_l'"):
        parametrize_layout(specs, specs, {**full, "m_l": 1.0}, hparams, "mup")
    with pytest.raises(
        ConfigError, match=r"unknown site of the base 'wpe.weight'; .* 'wte.weight'"
    ):
        parametrize_layout(specs[:2], specs[:1], full, hparams, "mup")
    with pytest.raises(ConfigError, match="unknown role 'hiden'; did you mean 'hidden'"):
        ParamSpec(name="x", role="hiden", shape=(1,))


def test_a_site_that_is_none():
    table = parametrize(SHAPE, BASE, HParams(), "mup")
    with pytest.raises(ConfigError, match=r"mean 'blocks\.\*\.mlp\.up\.weight'"):
        table.site("blocks.*.mlp.upp.weight")
    with pytest.raises(ConfigError, match=r"unknown site 'blocks\.1\.mlp\.up\.weight'"):
        table.site("blocks.1.mlp.up.weight")


def test_axes_are_named_once():
    """The literals for type checkers are the table's names; other tables speak of no other axis."""
    assert set(get_args(AxisName)) == set(AXES)
    assert set(RULE_AXES) < set(AXES) and set(JUDGES) <= set(AXES)
    assert {axis for choice in CHOICES.values() for axis in choice.axes} <= set(AXES)
    assert {row.name for row in AXES.values() if row.grows} == set(get_args(SizeAxis))
    grown = [quantity for row in AXES.values() for quantity in row.grows]
    assert sorted(grown) == sorted(set(QUANTITIES) - {"m_dh", "d_head"})


@pytest.mark.parametrize("row", [row for row in AXES.values() if row.judged], ids=lambda r: r.name)
def test_a_key_moves_its_axis(row):
    """What a sweep varies under a verdict is what a transfer reads as that axis."""
    raw = {"model": "proxy-64", "steps": 8, "batch_size": 2}
    before = row.value(train_config(raw))
    table, _, field = row.key.rpartition(".")
    size = before / 2 if row.judged == "down" else 2 * int(before)
    model = {"preset": "proxy-64"} if table == "model" else {}
    after = train_config({**raw, **({"model": {**model, field: size}} if table else {field: size})})
    assert row.value(after) == size


@pytest.mark.parametrize(("old", "new"), [("batch (sequences)", "batch"), ("horizon", "steps")])
def test_an_axis_is_known_by_its_old_name(old, new):
    assert find_axis(old) is find_axis(new) is AXES[new]
    source = train_config({"model": "proxy-32"})
    json.dumps(transfer(source, "proxy-64", accept=[old]).to_dict())
    with pytest.raises(ConfigError, match=r"unknown axis to accept 'vocabulry'; .* 'vocabulary'"):
        transfer(source, "proxy-64", accept=["vocabulry"])
