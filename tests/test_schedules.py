"""Schedules at the start, the end of the warm-up, the middle and the end; FLOPs of the card."""

import pytest

from mupgpt.config.schedules import SHAPES, factor, warmup_steps
from mupgpt.config.schema import GPTConfig, Schedule
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import flops_per_token
from mupgpt.presets import PRESETS

# shape → factor at steps 0, 9, 10, 55, 77.5 % of the decay, and 100 of 100, ten of warm-up, end 0.1
VALUES = {
    "constant": (0.1, 1.0, 1.0, 1.0, 1.0),
    "linear": (0.1, 1.0, 1.0, 0.55, 0.1),
    "cosine": (0.1, 1.0, 1.0, 0.55, 0.1),
    "wsd": (0.1, 1.0, 1.0, 1.0, 0.1),
}


@pytest.mark.parametrize("shape", VALUES)
def test_values(shape):
    schedule = Schedule(shape=shape, warmup=0.1, end=0.1, decay=0.2)
    found = tuple(factor(schedule, step, 100) for step in (0, 9, 10, 55, 100))
    assert found == pytest.approx(VALUES[shape], abs=1e-12)


def test_every_shape_has_its_values():
    assert set(VALUES) == set(SHAPES)


def test_wsd_decays_at_the_end_only():
    schedule = Schedule(shape="wsd", warmup=0.0, end=0.0, decay=0.2)
    assert [factor(schedule, s, 100) for s in (79, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])


def test_to_zero_is_d2z():
    """η(t) = η_max (1 − (t − W)/(S − W)), arXiv 2502.15938."""
    schedule = Schedule(shape="linear", warmup=0.2, end=0.0)
    for step in range(20, 101):
        assert factor(schedule, step, 100) == pytest.approx(1 - (step - 20) / 80)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.card])
def test_published_warmup_is_375m_tokens(name):
    recipe = PRESETS[name].recipe
    tokens = recipe["batch_size"] * 2048
    steps = warmup_steps(Schedule(**recipe["schedule"]), recipe["steps"], tokens)
    expected = {"111m": 1525, "256m": 693, "590m": 693, "1.3b": 346, "2.7b": 346, "6.7b": 176,
                "13b": 254}  # fmt: skip
    assert steps == expected[name.removeprefix("cerebras-gpt-")]


def test_no_warmup_and_all_warmup():
    assert factor(Schedule(warmup=0.0), 0, 10) == 1.0
    assert factor(Schedule(warmup=1.0), 9, 10) == 1.0


EXACT = [2.6437e18, 1.2762e19, 6.1304e19, 2.8155e20, 1.0835e21, 6.2821e21, 2.2665e22]


def test_the_cerebras_convention_is_the_card():
    cards = [p for p in PRESETS.values() if p.card]
    for preset, expected in zip(cards, EXACT, strict=True):
        tokens = preset.recipe["steps"] * preset.recipe["batch_size"] * 2048
        assert flops_per_token(preset.shape, "cerebras") * tokens == pytest.approx(
            expected, rel=5e-5
        )


def test_conventions_differ_by_what_they_say():
    c = GPTConfig(n_layer=3, d_model=20, n_head=4, vocab_size=50, seq_len=16)
    n, attention = count_params(c), 3 * 20 * 16
    assert flops_per_token(c, "6N") == 6 * n
    assert flops_per_token(c, "palm") == 6 * n + 12 * attention
    linear = 3 * 12 * 400
    chinchilla = 3 * (4 * 50 * 20 + 2 * linear + 4 * attention + 3 * 3 * 4 * 16)
    assert flops_per_token(c, "chinchilla") == chinchilla
    with pytest.raises(ConfigError, match="did you mean 'palm'"):
        flops_per_token(c, "plam")
