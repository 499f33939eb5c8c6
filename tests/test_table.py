"""Each cell of each rule as the number its paper gives; every rule is the base at the base."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_kept, count_params
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize
from mupgpt.parametrization.words import POINTS
from mupgpt.planning.flops import CONVENTIONS, flops_per_token
from mupgpt.planning.model_card import model_card
from mupgpt.presets import PRESETS
from mupgpt.resolve import base_dims, get_preset, train_config

BASE = Base(d_model=64, d_ffn=256, n_head=2, d_head=32, n_kv_head=2, n_layer=2)
# m_d = 4, m_f = 8, heads' total 6 times the base's, d_head ratio 1.5, depth ratio 4, density 1/4
WIDE = GPTConfig(
    n_layer=8, d_model=256, n_head=8, d_head=48, d_ffn=2048, vocab_size=11, seq_len=16, tied=False,
    density=0.25,
)  # fmt: skip
HP = HParams(
    lr=0.01, init_std=0.5, emb_mult=3.0, attn_mult=1.25, output_mult=2.0, residual_mult=1.5,
    weight_decay=0.2, eps=1e-6,
)  # fmt: skip


Q, OUT = "blocks.*.attn.q.weight", "blocks.*.attn.o.weight"
UP, DOWN = "blocks.*.mlp.up.weight", "blocks.*.mlp.down.weight"
EMB, HEAD, LAST = "wte.weight", "head.weight", "ln_f.weight"
BIAS, NORM = "blocks.*.mlp.up.bias", "blocks.*.ln1.weight"
SITES = (Q, OUT, UP, DOWN, EMB, HEAD, BIAS, NORM, LAST)

# What is published, as site (or point of the forward) → its numbers. Cerebras-GPT: arXiv
# 2304.03208, appendix G; printed with two to five digits.
PUBLISHED = {
    "cerebras-gpt-40m": {UP: {"std": 0.08, "lr": 6e-3}, DOWN: {"std": 0.011547}, "readout": 1.0},
    "cerebras-gpt-111m": {
        UP: {"std": 0.046188, "lr": 2e-3}, DOWN: {"std": 0.010328}, "readout": 1 / 3,
    },
    "cerebras-gpt-256m": {
        UP: {"std": 0.038806, "lr": 1.4118e-3}, DOWN: {"std": 0.007334}, "readout": 0.235294,
    },
    "cerebras-gpt-590m": {
        UP: {"std": 0.03266, "lr": 1e-3}, DOWN: {"std": 0.005443}, "readout": 1 / 6,
    },
    "cerebras-gpt-1.3b": {
        UP: {"std": 0.028284, "lr": 7.5e-4}, DOWN: {"std": 0.004082}, "readout": 0.125,
    },
    "cerebras-gpt-2.7b": {
        UP: {"std": 0.025298, "lr": 6e-4}, DOWN: {"std": 0.003162}, "readout": 0.1,
    },
    "cerebras-gpt-6.7b": {
        UP: {"std": 0.02, "lr": 3.75e-4}, DOWN: {"std": 0.0025}, "readout": 0.0625,
    },
    "cerebras-gpt-13b": {
        UP: {"std": 0.017889, "lr": 3e-4}, DOWN: {"std": 0.002}, "readout": 0.05,
    },
}  # fmt: skip

# What each rule makes of HP from BASE to WIDE: the sites and points that it moves, by name. What is
# not named is AT_BASE.
EVERYWHERE = "every site"
AT_BASE = {
    **{site: {"std": 0.5, "lr": 0.01, "wd": 0.2, "eps": 1e-6} for site in SITES[:6]},
    **{site: {"std": 0.0, "lr": 0.01, "wd": 0.0, "eps": 1e-6} for site in SITES[6:]},
    "emb": 3.0, "attn": 1.25, "residual.attn": 1.5, "residual.mlp": 1.5, "readout": 2.0,
}  # fmt: skip
EXPECTED = {
    "mup": {
        EVERYWHERE: {"eps": 2.5e-7},
        Q: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        OUT: {"std": 0.125 / math.sqrt(6), "lr": 0.01 / 6, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        DOWN: {"std": 0.125 / math.sqrt(8), "lr": 0.00125, "wd": 1.6},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "sp": {
        OUT: {"std": 0.125},
        DOWN: {"std": 0.125},
    },
    "sp-fanin": {
        Q: {"std": 0.25},
        OUT: {"std": 0.125 / math.sqrt(6)},
        UP: {"std": 0.25},
        DOWN: {"std": 0.125 / math.sqrt(8)},
        HEAD: {"std": 0.25},
    },
    "mup-constant-lr": {
        EVERYWHERE: {"eps": 2.5e-7},
        Q: {"std": 0.25, "wd": 0.8},
        OUT: {"std": 0.125 / math.sqrt(6), "wd": 1.2},
        UP: {"std": 0.25, "wd": 0.8},
        DOWN: {"std": 0.125 / math.sqrt(8), "wd": 1.6},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "cerebras": {
        Q: {"std": 0.25, "lr": 0.0025},
        OUT: {"std": 0.125 / math.sqrt(6), "lr": 0.01 / 6},
        UP: {"std": 0.25, "lr": 0.0025},
        DOWN: {"std": 0.125 / math.sqrt(8), "lr": 0.00125},
        "attn": 1.25 / math.sqrt(48),
        "readout": 0.5,
    },
    "mup-package": {
        Q: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        OUT: {"std": 0.5 / math.sqrt(6), "lr": 0.01 / 6, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        DOWN: {"std": 0.5 / math.sqrt(8), "lr": 0.00125, "wd": 1.6},
        BIAS: {"wd": 0.2},
        NORM: {"wd": 0.2},
        LAST: {"wd": 0.2},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "completep": {
        EVERYWHERE: {"eps": 6.25e-8},
        Q: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        OUT: {"std": 0.5 / math.sqrt(6), "lr": 0.01 / 6, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        DOWN: {"std": 0.5 / math.sqrt(8), "lr": 0.00125, "wd": 1.6},
        EMB: {"eps": 1e-6},
        HEAD: {"eps": 1e-6},
        LAST: {"eps": 1e-6},
        "attn": 1.25 / math.sqrt(1.5),
        "residual.attn": 0.375,
        "residual.mlp": 0.375,
        "readout": 0.5,
    },
    "completep-eps": {
        EVERYWHERE: {"eps": 6.25e-8},
        Q: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        OUT: {"std": 0.5 / math.sqrt(6), "lr": 0.01 / 6, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        DOWN: {"std": 0.5 / math.sqrt(8), "lr": 0.00125, "wd": 1.6},
        EMB: {"eps": 2.5e-7},
        HEAD: {"eps": 2.5e-7},
        LAST: {"eps": 2.5e-7},
        "attn": 1.25 / math.sqrt(1.5),
        "residual.attn": 0.375,
        "residual.mlp": 0.375,
        "readout": 0.5,
    },
    "depth-mup": {
        EVERYWHERE: {"eps": 1.25e-7},
        Q: {"std": 0.25, "lr": 0.00125, "wd": 0.8},
        OUT: {"std": 0.5 / math.sqrt(6), "lr": 0.01 / 12, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.00125, "wd": 0.8},
        DOWN: {"std": 0.5 / math.sqrt(8), "lr": 0.000625, "wd": 1.6},
        EMB: {"eps": 1e-6},
        HEAD: {"eps": 1e-6},
        BIAS: {"lr": 0.005},
        NORM: {"lr": 0.005},
        LAST: {"eps": 1e-6},
        "attn": 1.25 / math.sqrt(1.5),
        "residual.attn": 0.75,
        "residual.mlp": 0.75,
        "readout": 0.5,
    },
    "minicpm": {
        Q: {"std": 0.25, "lr": 0.0025},
        OUT: {"std": 0.25, "lr": 0.0025},
        UP: {"std": 0.25, "lr": 0.0025},
        DOWN: {"std": 0.25, "lr": 0.0025},
        "residual.attn": 0.75,
        "residual.mlp": 0.75,
        "readout": 0.5,
    },
    "supar": {
        EVERYWHERE: {"eps": 2.5e-7},
        OUT: {"std": 0.25 / math.sqrt(6), "lr": 0.04 / 6, "wd": 0.3},
        DOWN: {"std": 0.25 / math.sqrt(8), "lr": 0.005, "wd": 0.4},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "mup-sgd": {
        EVERYWHERE: {"eps": 0.0},
        Q: {"std": 0.25, "lr": 0.015, "wd": 0.8 / 6},
        OUT: {"std": 0.125 / math.sqrt(6), "lr": 0.04 / 6, "wd": 0.3},
        UP: {"std": 0.25, "lr": 0.02, "wd": 0.1},
        DOWN: {"std": 0.125 / math.sqrt(8), "lr": 0.005, "wd": 0.4},
        EMB: {"lr": 0.04, "wd": 0.05},
        HEAD: {"lr": 0.04, "wd": 0.05},
        BIAS: {"lr": 0.08},
        NORM: {"lr": 0.04},
        LAST: {"lr": 0.04},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "mup-lion": {
        EVERYWHERE: {"eps": 0.0},
        Q: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        OUT: {"std": 0.125 / math.sqrt(6), "lr": 0.01 / 6, "wd": 1.2},
        UP: {"std": 0.25, "lr": 0.0025, "wd": 0.8},
        DOWN: {"std": 0.125 / math.sqrt(8), "lr": 0.00125, "wd": 1.6},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
    "mup-muon": {
        EVERYWHERE: {"eps": 2.5e-7},
        Q: {"std": 0.25, "eps": 0.0},
        OUT: {"std": 0.125 / math.sqrt(6), "eps": 0.0},
        UP: {"std": 0.25, "eps": 0.0},
        DOWN: {"std": 0.125 / math.sqrt(8), "eps": 0.0},
        "attn": 1.25 / math.sqrt(1.5),
        "readout": 0.5,
    },
}


def numbers(table):
    """Site → its named numbers, point → its multiplier, as the oracles above say them."""
    keys = {"std": "init_std", "lr": "lr", "wd": "weight_decay", "eps": "eps"}
    rows = {
        row.site: {key: getattr(row, field) for key, field in keys.items()}
        for row, _ in table.sites()
    }
    return rows | {name: m.value for name, m in table.multipliers.items()}


def moved(changes, place):
    """What AT_BASE becomes at a site or a point under the changes of one rule."""
    if place in POINTS:
        return changes.get(place, AT_BASE[place])
    return AT_BASE[place] | changes.get(EVERYWHERE, {}) | changes.get(place, {})


@pytest.mark.parametrize("rule", EXPECTED)
def test_every_cell(rule):
    found = numbers(parametrize(WIDE, BASE, HP, rule))
    assert set(EXPECTED[rule]) <= {EVERYWHERE, *AT_BASE}
    for place in AT_BASE:
        assert found[place] == pytest.approx(moved(EXPECTED[rule], place), rel=1e-12), place


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_family(name):
    config = train_config({"model": name})
    table = parametrize(config.model, config.base, config.hparams, config.rule)
    found = numbers(table)
    for place, said in PUBLISHED[name].items():
        here = found[place] if place in POINTS else {key: found[place][key] for key in said}
        assert here == pytest.approx(said, rel=2e-4), place
    assert config.rule == "cerebras" and table.site(Q).init == "truncated"
    assert table.site(Q).lr == table.site(UP).lr


def test_every_rule_has_its_numbers():
    assert set(EXPECTED) == set(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_is_the_base_at_the_base(rule):
    """All but what a literal takes absolutely: 2L, and the d_head of cerebras."""
    model = dataclasses.replace(WIDE, density=1.0)
    table = parametrize(model, Base.of(model), HP, rule)
    for row in table.params:
        std = 0.5 / math.sqrt(16) if row.residual_out and rule.residual_out_std else 0.5
        assert row.init_std == (std if row.init in ("normal", "truncated") else 0.0)
        assert row.lr == 0.01
        assert row.weight_decay == (0.2 if row.role in rule.decayed else 0.0)
        assert row.eps == (1e-6 if row.optimizer == "adamw" else 0.0)
    attn = 1.25 * (48**-0.5 if rule.name == "cerebras" else 1.0)
    values = {"emb": 3.0, "attn": attn, "residual.attn": 1.5, "residual.mlp": 1.5, "readout": 2.0}
    assert {name: m.value for name, m in table.multipliers.items()} == values


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_parameter_has_an_optimizer(rule):
    """Muon takes the blocks' matrices and leaves the rest to AdamW."""
    for row in parametrize(WIDE, BASE, HP, rule).params:
        assert row.optimizer == (
            ("muon" if row.role == "hidden" else "adamw")
            if rule.name == "mup-muon"
            else {"mup-sgd": "sgd", "mup-lion": "lion"}.get(rule.name, "adamw")
        )
        assert row.why.startswith(row.optimizer) == (rule.optimizer != "adamw")


def same(a, b):
    """Whether two tables say the same numbers."""
    rows = [[dataclasses.replace(row, why="") for row in table.params] for table in (a, b)]
    points = [{name: m.value for name, m in table.multipliers.items()} for table in (a, b)]
    return rows[0] == rows[1] and points[0] == points[1]


def test_supar_is_mup_where_nothing_is_masked():
    dense = dataclasses.replace(WIDE, density=1.0)
    assert same(parametrize(dense, BASE, HP, "supar"), parametrize(dense, BASE, HP, "mup"))
    assert not same(parametrize(WIDE, BASE, HP, "supar"), parametrize(WIDE, BASE, HP, "mup"))
    sparse_base = dataclasses.replace(BASE, density=0.25)
    assert same(parametrize(WIDE, sparse_base, HP, "supar"), parametrize(dense, BASE, HP, "mup"))


def test_minicpms_published_multipliers():
    """40 layers of width 2304, base 256: branches × 1.4/√40, logits ÷ 9, from any base depth."""
    model = GPTConfig(n_layer=40, d_model=2304, n_head=36, vocab_size=11, seq_len=8)
    base = Base(d_model=256, d_ffn=1024, n_head=4, d_head=64, n_kv_head=4, n_layer=10)
    hp = HParams(lr=0.01, init_std=0.1, emb_mult=12.0, residual_mult=1.4 / math.sqrt(10))
    table = parametrize(model, base, hp, "minicpm")
    values = {name: m.value for name, m in table.multipliers.items()}
    assert values["residual.mlp"] == pytest.approx(1.4 / math.sqrt(40))
    assert values["readout"] == pytest.approx(256 / 2304) and values["emb"] == 12.0
    assert table.site(UP).lr == pytest.approx(0.01 * 256 / 2304)


@pytest.mark.parametrize("convention", sorted(CONVENTIONS.keys() - {"6N-stored"}))
def test_masks_save_the_flops_of_their_matrices(convention):
    """Six FLOPs per dropped weight and token; parameters are stored whole."""
    dense = dataclasses.replace(WIDE, density=1.0)
    dropped = 0.75 * 8 * (4 * 256 * 384 + 2 * 256 * 2048)
    saved = flops_per_token(dense, convention) - flops_per_token(WIDE, convention)
    assert saved == pytest.approx(6 * dropped, rel=1e-12)
    assert count_params(WIDE) == count_params(dense) == count_kept(WIDE) + dropped


@pytest.mark.parametrize("control", ["sp", "sp-fanin"])
def test_mup_is_the_control_bit_for_bit_at_the_base(control):
    model = get_preset("proxy-64").shape
    tables = (parametrize(model, Base.of(model), HP, rule) for rule in ("mup", control))
    assert same(*tables)


def test_13b_is_twenty_lines():
    preset = get_preset("cerebras-gpt-13b")
    table = parametrize(preset.shape, base_dims(preset.base), preset.hparams, "cerebras")
    assert len(table.params) == 40 * 16 + 4
    assert len(list(table.sites())) == 20  # fits one screen


def test_fractional_base():
    model = GPTConfig(
        n_layer=1, d_model=2560, n_head=32, d_ffn=6826, vocab_size=50257, seq_len=2048
    )
    base = Base(d_model=256, d_ffn=682.6, n_head=3.2, d_head=80, n_kv_head=3.2, n_layer=32)
    table = parametrize(model, base, HParams(lr=0.012, init_std=0.073), "mup")
    assert table.site(DOWN).lr == pytest.approx(1.2e-3)
    assert table.site(UP).init_std == pytest.approx(0.0230846, rel=1e-5)


def test_diff_names_the_row():
    table = parametrize(WIDE, BASE, HP, "mup")
    assert table.diff(json.loads(json.dumps(table.to_dict()))) == []
    other = parametrize(WIDE, BASE, dataclasses.replace(HP, lr=0.02), "mup")
    lines = table.diff(other.to_dict())
    assert len(lines) == len(table.params)
    assert lines[0] == "wte.weight: lr 0.01 here, 0.02 there"
    close = parametrize(WIDE, BASE, dataclasses.replace(HP, lr=0.01 * (1 + 1e-10)), "mup")
    assert table.diff(close.to_dict()) == []


def test_depths_may_differ_but_a_site_has_one_row():
    table = parametrize(WIDE, BASE, HP, "mup")
    rows = [r for r in table.params if r.site == UP]
    assert len(rows) == 8
    assert len({dataclasses.replace(r, name="") for r in rows}) == 1


def test_model_card_to_every_printed_digit():
    card = json.loads((Path(__file__).parent / "model_card.json").read_text())
    ours = {row["name"]: row for row in model_card()}
    for row in card["models"]:
        for key, value in row.items():
            assert ours[row["name"]][key] == value, (row["name"], key)
    counts = [111050496, 255977024, 590310912, 1315723264, 2651553280, 6658404352, 12853386240]
    assert [row["n_params"] for row in model_card()] == counts


def test_unknown_names_say_what_was_meant():
    with pytest.raises(ConfigError, match="did you mean 'sp-fanin'"):
        parametrize(WIDE, BASE, HP, "sp-fan-in")
    with pytest.raises(ConfigError, match="did you mean 'cerebras-gpt-13b'"):
        train_config({"model": "cerebras-gpt-13"})
    assert len(PRESETS) == 24
