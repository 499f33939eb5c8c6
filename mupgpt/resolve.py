"""Plain data to the run that it describes: a preset below, what was said on top."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mupgpt.config.fields import TOKENS
from mupgpt.config.plain import from_dict, to_dict
from mupgpt.config.schema import Base, GPTConfig, TrainConfig
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.presets import PRESETS, Preset

__all__ = ["base_dims", "get_preset", "overlay", "train_config"]


def get_preset(name: str) -> Preset:
    """The preset of that name.

    >>> get_preset("cerebras-gpt-13").name
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: unknown preset 'cerebras-gpt-13'; did you mean 'cerebras-gpt-13b'?
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``under`` with the values of ``over``, tables merged key by key.

    >>> overlay({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = overlay(below, value) if both else value
    return merged


def train_config(raw: Mapping[str, Any]) -> TrainConfig:
    """The run that plain data describes; ``model`` is a preset's name or fields (or both).

    A preset brings its recipe, base, rule and hyperparameters; what ``raw`` says wins, and its
    phases replace the preset's steps. Fields without a preset are their own base, unless ``base``
    names another one.

    >>> config = train_config({"model": {"preset": "proxy-64", "d_model": 128}})
    >>> config.model.n_head, config.base.d_model, config.rule
    (4, 32.0, 'mup')
    """
    require(isinstance(raw, Mapping), "config", raw, "be a table of keys")
    raw = dict(raw)
    both = "tokens" in raw and "steps" in raw
    require(not both, "tokens", raw.get("tokens"), "be left out where steps is given")
    model = raw.pop("model", None)
    if model is None:
        names = ", ".join(PRESETS)
        raise ConfigError(f"missing key 'model': give a preset's name ({names}) or its fields")
    named = isinstance(model, str)
    require(named or isinstance(model, Mapping), "model", model, "be a preset's name or a table")
    fields: dict[str, Any] = {"preset": model} if isinstance(model, str) else dict(model)
    if "preset" in fields:
        name = fields.pop("preset")
        require(isinstance(name, str), "model.preset", name, "be a preset's name")
        preset = get_preset(name)
        recipe = {"base": preset.base, "rule": preset.rule, "hparams": to_dict(preset.hparams)}
        recipe |= {k: v for k, v in preset.recipe.items() if k != "steps" or "phases" not in raw}
        raw = overlay(recipe, raw)
        fields = overlay(preset.model, fields)
    raw["model"] = from_dict(GPTConfig, fields, "model")
    base = raw.get("base", raw["model"])
    raw["base"] = base_dims(base)
    tokens = raw.pop("tokens", None)
    config = from_dict(TrainConfig, raw)
    phased = tokens is not None and config.phases
    require(not phased, "tokens", tokens, "be left out where phases say how long the run is")
    return config if tokens is None else replace(config, steps=_steps(config, tokens))


def base_dims(base: str | GPTConfig | Mapping[str, Any] | Base) -> Base:
    """The dimensions that a preset's name, a shape or plain fields stand for."""
    if isinstance(base, Base):
        return base
    if isinstance(base, str):
        base = get_preset(base).shape
    table = isinstance(base, GPTConfig | Mapping)
    require(table, "base", base, "be a preset's name or a table of dimensions")
    return Base.of(base) if isinstance(base, GPTConfig) else from_dict(Base, dict(base), "base")


def _steps(config: TrainConfig, tokens: Any) -> int:
    number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
    require(number and tokens > 0, "tokens", tokens, "be a number > 0")
    require(tokens <= TOKENS, "tokens", tokens, f"be <= {TOKENS:,}")
    return max(1, int(tokens // config.tokens_per_step))
