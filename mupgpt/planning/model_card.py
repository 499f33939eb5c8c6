"""Cerebras-GPT's model card, figures from formulas."""

from typing import Any

from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import flops_per_token
from mupgpt.presets import PRESETS, Preset

__all__ = ["model_card"]


def model_card() -> list[dict[str, Any]]:
    """The Cerebras-GPT model card, one row a model, figures from formulas.

    Tokens are steps × batch × 2048 with floor(20 N / batch tokens) steps; FLOPs follow the
    convention ``cerebras``.

    >>> row = model_card()[0]
    >>> row["n_params"], row["steps"], row["tokens"], row["flops"]
    (111050496, 9037, '2.22E+09', '2.6E+18')
    """
    return [_card_row(preset) for preset in PRESETS.values() if preset.card]


def _card_row(preset: Preset) -> dict[str, Any]:
    shape, recipe = preset.shape, preset.recipe
    tokens = recipe["steps"] * recipe["batch_size"] * shape.seq_len
    fields = ("n_layer", "d_model", "n_head", "d_head", "d_ffn")
    return {
        "name": preset.label,
        "preset": preset.name,
        "n_params": count_params(shape),
        **{name: getattr(shape, name) for name in fields},
        "steps": recipe["steps"],
        "tokens": f"{tokens:.2E}",
        "flops": f"{flops_per_token(shape, 'cerebras') * tokens:.1E}",
        "flops_convention": "cerebras",
        "flops_palm": f"{flops_per_token(shape, 'palm') * tokens:.1E}",
        **preset.card,
    }
