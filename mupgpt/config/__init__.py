"""What decides a run: frozen dataclasses, and the one way from plain data into them and back."""

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

__all__ = [
    "Base",
    "DataConfig",
    "GPTConfig",
    "HParams",
    "ParallelConfig",
    "PhaseConfig",
    "Prediction",
    "Schedule",
    "TrackingConfig",
    "TrainConfig",
    "from_dict",
    "load_toml",
    "to_dict",
]
