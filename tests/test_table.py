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


def cells(rule):
    """site → (std, lr, weight decay, eps) under a rule, and the multipliers."""
    table = parametrize(WIDE, BASE, HP, rule)
    keys = ("init_std", "lr", "weight_decay", "eps")
    rows = {row.site: tuple(getattr(row, key) for key in keys) for row, _ in table.sites()}
    return rows, {name: m.value for name, m in table.multipliers.items()}


Q, OUT = "blocks.*.attn.q.weight", "blocks.*.attn.o.weight"
UP, DOWN = "blocks.*.mlp.up.weight", "blocks.*.mlp.down.weight"
BIAS, NORM = "blocks.*.mlp.up.bias", "blocks.*.ln1.weight"
SITES = (Q, OUT, UP, DOWN, "wte.weight", "head.weight", BIAS, NORM, "ln_f.weight")
FANIN = (0.25, 0.5 / math.sqrt(6) / 4, 0.25, 0.5 / math.sqrt(8) / 4)  # residual outputs ÷ √(2·8)
DEEP = (0.25, 0.5 / math.sqrt(6), 0.25, 0.5 / math.sqrt(8))  # the same without 2L
# name → rows (std, lr, wd, eps) of the sites above; then attn, residual, readout
EXPECTED = {
    "mup": (
        (FANIN[0], 0.0025, 0.8, 2.5e-7),
        (FANIN[1], 0.01 / 6, 1.2, 2.5e-7),
        (FANIN[2], 0.0025, 0.8, 2.5e-7),
        (FANIN[3], 0.00125, 1.6, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "sp": (
        (0.5, 0.01, 0.2, 1e-6),
        (0.125, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.125, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        1.25,
        1.5,
        2.0,
    ),
    "sp-fanin": (
        (FANIN[0], 0.01, 0.2, 1e-6),
        (FANIN[1], 0.01, 0.2, 1e-6),
        (FANIN[2], 0.01, 0.2, 1e-6),
        (FANIN[3], 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.25, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        1.25,
        1.5,
        2.0,
    ),
    "mup-constant-lr": (
        (FANIN[0], 0.01, 0.8, 2.5e-7),
        (FANIN[1], 0.01, 1.2, 2.5e-7),
        (FANIN[2], 0.01, 0.8, 2.5e-7),
        (FANIN[3], 0.01, 1.6, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "cerebras": (
        (FANIN[0], 0.0025, 0.2, 1e-6),
        (FANIN[1], 0.01 / 6, 0.2, 1e-6),
        (FANIN[2], 0.0025, 0.2, 1e-6),
        (FANIN[3], 0.00125, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        1.25 / math.sqrt(48),
        1.5,
        0.5,
    ),
    "mup-package": (
        (DEEP[0], 0.0025, 0.8, 1e-6),
        (DEEP[1], 0.01 / 6, 1.2, 1e-6),
        (DEEP[2], 0.0025, 0.8, 1e-6),
        (DEEP[3], 0.00125, 1.6, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.2, 1e-6),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "completep": (
        (DEEP[0], 0.0025, 0.8, 6.25e-8),
        (DEEP[1], 0.01 / 6, 1.2, 6.25e-8),
        (DEEP[2], 0.0025, 0.8, 6.25e-8),
        (DEEP[3], 0.00125, 1.6, 6.25e-8),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.0, 6.25e-8),
        (0.0, 0.01, 0.0, 6.25e-8),
        (0.0, 0.01, 0.0, 1e-6),
        1.25 / math.sqrt(1.5),
        0.375,
        0.5,
    ),
    "completep-eps": (
        (DEEP[0], 0.0025, 0.8, 6.25e-8),
        (DEEP[1], 0.01 / 6, 1.2, 6.25e-8),
        (DEEP[2], 0.0025, 0.8, 6.25e-8),
        (DEEP[3], 0.00125, 1.6, 6.25e-8),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.0, 0.01, 0.0, 6.25e-8),
        (0.0, 0.01, 0.0, 6.25e-8),
        (0.0, 0.01, 0.0, 2.5e-7),
        1.25 / math.sqrt(1.5),
        0.375,
        0.5,
    ),
    "depth-mup": (
        (DEEP[0], 0.00125, 0.8, 1.25e-7),
        (DEEP[1], 0.01 / 12, 1.2, 1.25e-7),
        (DEEP[2], 0.00125, 0.8, 1.25e-7),
        (DEEP[3], 0.000625, 1.6, 1.25e-7),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.005, 0.0, 1.25e-7),
        (0.0, 0.005, 0.0, 1.25e-7),
        (0.0, 0.01, 0.0, 1e-6),
        1.25 / math.sqrt(1.5),
        0.75,
        0.5,
    ),
    "minicpm": (
        (0.25, 0.0025, 0.2, 1e-6),
        (0.25, 0.0025, 0.2, 1e-6),
        (0.25, 0.0025, 0.2, 1e-6),
        (0.25, 0.0025, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.5, 0.01, 0.2, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        (0.0, 0.01, 0.0, 1e-6),
        1.25,
        0.75,
        0.5,
    ),
    "supar": (
        (0.5, 0.01, 0.2, 2.5e-7),
        (1 / math.sqrt(6) / 4, 0.04 / 6, 0.3, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (1 / math.sqrt(8) / 4, 0.005, 0.4, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "mup-sgd": (
        (FANIN[0], 0.015, 0.8 / 6, 0.0),
        (FANIN[1], 0.04 / 6, 0.3, 0.0),
        (FANIN[2], 0.02, 0.1, 0.0),
        (FANIN[3], 0.005, 0.4, 0.0),
        (0.5, 0.04, 0.05, 0.0),
        (0.5, 0.04, 0.05, 0.0),
        (0.0, 0.08, 0.0, 0.0),
        (0.0, 0.04, 0.0, 0.0),
        (0.0, 0.04, 0.0, 0.0),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "mup-lion": (
        (FANIN[0], 0.0025, 0.8, 0.0),
        (FANIN[1], 0.01 / 6, 1.2, 0.0),
        (FANIN[2], 0.0025, 0.8, 0.0),
        (FANIN[3], 0.00125, 1.6, 0.0),
        (0.5, 0.01, 0.2, 0.0),
        (0.5, 0.01, 0.2, 0.0),
        (0.0, 0.01, 0.0, 0.0),
        (0.0, 0.01, 0.0, 0.0),
        (0.0, 0.01, 0.0, 0.0),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
    "mup-muon": (
        (FANIN[0], 0.01, 0.2, 0.0),
        (FANIN[1], 0.01, 0.2, 0.0),
        (FANIN[2], 0.01, 0.2, 0.0),
        (FANIN[3], 0.01, 0.2, 0.0),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.5, 0.01, 0.2, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        (0.0, 0.01, 0.0, 2.5e-7),
        1.25 / math.sqrt(1.5),
        1.5,
        0.5,
    ),
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_every_cell(rule):
    rows, multipliers = cells(rule)
    *expected, attn, residual, readout = EXPECTED[rule]
    for site, values in zip(SITES, expected, strict=True):
        assert rows[site] == pytest.approx(values, rel=1e-12), site
    assert multipliers["attn"] == pytest.approx(attn, rel=1e-12)
    assert multipliers["residual.attn"] == multipliers["residual.mlp"] == residual
    assert multipliers["readout"] == pytest.approx(readout, rel=1e-12)
    assert multipliers["emb"] == 3.0


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


@pytest.mark.parametrize("convention", CONVENTIONS.keys() - {"6N-stored"})
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


# Width → (hidden std, residual-output std, hidden lr, readout), peers' golden rows of the family.
GOLDEN = {
    "cerebras-gpt-40m": (0.08, 0.011547, 6e-3, 1.0),
    "cerebras-gpt-111m": (0.046188, 0.010328, 2e-3, 1 / 3),
    "cerebras-gpt-256m": (0.038806, 0.007334, 1.4118e-3, 0.235294),
    "cerebras-gpt-590m": (0.03266, 0.005443, 1e-3, 1 / 6),
    "cerebras-gpt-1.3b": (0.028284, 0.004082, 7.5e-4, 0.125),
    "cerebras-gpt-2.7b": (0.025298, 0.003162, 6e-4, 0.1),
    "cerebras-gpt-6.7b": (0.02, 0.0025, 3.75e-4, 0.0625),
    "cerebras-gpt-13b": (0.017889, 0.002, 3e-4, 0.05),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_family(name):
    config = train_config({"model": name})
    table = parametrize(config.model, config.base, config.hparams, config.rule)
    std, out_std, lr, readout = GOLDEN[name]
    assert config.rule == "cerebras"
    assert table.site(UP).init_std == pytest.approx(std, rel=2e-4)
    assert table.site(DOWN).init_std == pytest.approx(out_std, rel=2e-4)
    assert table.site(Q).lr == pytest.approx(lr, rel=2e-4)
    assert table.multipliers["readout"].value == pytest.approx(readout, rel=2e-4)
    assert table.site(Q).init == "truncated"


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
