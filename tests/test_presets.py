"""Presets of later models: parameter counts, tables and recipes as they were published."""

import pytest

from mupgpt.config.schedules import lr_factor, warmup_steps
from mupgpt.errors import ConfigError
from mupgpt.mutransfer.transfer import transfer
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import parametrize
from mupgpt.presets import BLOCKS, PRESETS
from mupgpt.resolve import base_dims, get_preset, train_config

COUNTS = {
    "btlm-3b-8k": 2_646_255_744,
    "llama-2-7b": 6_738_415_616,
    "minicpm-2.4b": 2_442_057_984 + 122_753 * 2304,  # the paper counts no embeddings
}
BIAS = "blocks.*.mlp.gate.bias"


def run(name):
    config = train_config({"model": name})
    return config, parametrize(config.model, config.base, config.hparams, config.rule)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_published(name):
    assert count_params(get_preset(name).shape) == COUNTS[name]


GOLDEN = {  # std of embedding, hidden, residual out; lr of hidden matrices; logits ×: modelzoo
    "btlm-3b-8k": (0.073, 0.073 / 10**0.5, 0.0028856, 0.0012, 0.222),
    "jais-13b": (0.073, 0.016323296235748463, 0.0018249999999999998, 0.0006, 0.111),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tables_of_the_later_cerebras_models(name):
    config, table = run(name)
    embedding, hidden, out, lr, logits = GOLDEN[name]
    assert table.site("wte.weight").init_std == embedding
    for site in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"):
        row = table.site(f"blocks.*.{site}.weight")
        assert row.init == "truncated"
        assert (row.init_std, row.lr) == pytest.approx((hidden, lr), rel=1e-9)
    for site in ("attn.o", "mlp.down"):
        row = table.site(f"blocks.*.{site}.weight")
        assert row.init_std == pytest.approx(out, rel=1e-5) and row.lr == pytest.approx(lr)
    assert table.site(BIAS).lr == table.site("wte.weight").lr == 0.012
    assert table.multipliers["readout"].value == pytest.approx(logits, rel=1e-9)
    assert table.multipliers["emb"].value == 14.6
    assert table.multipliers["attn"].value == pytest.approx(config.model.d_head**-0.5)
    assert "wpe.weight" not in table.rows


def test_base_widths_are_fractional():
    """6826 / 682.6 and 2560 / 256 are both exactly 10."""
    dims = base_dims(get_preset("btlm-3b-8k").base)
    assert (dims.d_model, dims.d_ffn, dims.n_head * dims.d_head) == (256, 682.6, 256)
    assert get_preset("btlm-3b-8k").shape.d_ffn == 8 * 2560 // 3


def test_jais_13b_s_recipe():
    config, _ = run("jais-13b")
    assert warmup_steps(config.schedule, config.steps, config.tokens_per_step) == 95
    assert config.tokens == 100_551 * 1920 * 2048
    assert lr_factor(config, config.steps) * 0.012 == pytest.approx(0.0012)
    assert config.hparams.eps == 1e-9


def test_llama_2_7b_s_recipe():
    """arXiv 2307.09288: 2T tokens, 4M a step, 2000 warm-up steps, cosine to a tenth."""
    config, table = run("llama-2-7b")
    assert config.tokens == pytest.approx(2e12, rel=1e-5)
    assert config.tokens_per_step == 2**22
    assert warmup_steps(config.schedule, config.steps, config.tokens_per_step) == 2000
    assert lr_factor(config, config.steps) == pytest.approx(0.1)
    assert {row.lr for row in table.params} == {3e-4}
    assert {row.weight_decay for row in table.params if row.role == "norm"} == {0.0}
    assert not any(row.name.endswith("bias") for row in table.params)


def test_minicpm_s_table():
    """arXiv 2404.06395, Table 7: widths over 256, branches × 1.4/√40, embeddings × 12."""
    _, table = run("minicpm-2.4b")
    row = table.site("blocks.*.mlp.down.weight")
    assert (row.init_std, row.lr) == pytest.approx((0.1 / 3, 0.01 / 9))
    assert table.site("wte.weight").lr == 0.01
    points = {point: m.value for point, m in table.multipliers.items()}
    assert points == pytest.approx({
        "emb": 12.0, "attn": 1.0, "readout": 1 / 9,
        "residual.attn": 1.4 / 40**0.5, "residual.mlp": 1.4 / 40**0.5,
    })  # fmt: skip


def test_minicpm_s_recipe():
    """3.93M tokens a step, 1.1T in all; the rate halves every 5000 steps at the end."""
    config, _ = run("minicpm-2.4b")
    assert config.tokens == pytest.approx(1.1e12, rel=1e-4)
    assert config.tokens_per_step == pytest.approx(3.93e6, rel=1e-3)
    a, b = (lr_factor(config, config.steps - back) for back in (12_000, 7_000))
    assert b / a == pytest.approx(0.5, rel=2e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_byte_level_proxies_keep_their_ratios(block):
    names = [f"{block}-proxy-{width}" for width in (48, 96, 192)]
    shapes = [get_preset(name).shape for name in names]
    assert {shape.d_ffn / shape.d_model for shape in shapes} == {8 / 3}
    assert {shape.d_head for shape in shapes} == {24}
    assert shapes[0].widen(192) == shapes[2]
    assert {PRESETS[name].base for name in names} == {names[0]}


@pytest.mark.parametrize(("block", "to"), [("btlm", "btlm-3b-8k"), ("llama", "llama-2-7b")])
def test_each_block_has_a_proxy_to_tune_on(block, to):
    """From it nothing but text is left open; from another block the plan refuses."""
    plan = transfer(train_config({"model": f"{block}-proxy-48"}), to,
                    accept=["vocabulary", "corpus"])  # fmt: skip
    open_axes = {axis.name for axis in plan.axes if axis.status == "unsupported"}
    assert open_axes == {"vocabulary", "corpus"}
    assert plan.config.phases == train_config({"model": to}).phases
    with pytest.raises(ConfigError, match=r"does not cover: block learned layernorm gelu biases"):
        transfer(train_config({"model": "proxy-32"}), to, accept=["vocabulary", "corpus"])
