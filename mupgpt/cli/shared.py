"""What several commands share."""

import json
from pathlib import Path
from typing import Any

from mupgpt.config.plain import load_toml
from mupgpt.errors import ConfigError
from mupgpt.presets import PRESETS
from mupgpt.util.text import label

__all__ = ["one_thread", "print_json", "read_config", "stem", "write_text"]


def read_config(name: str) -> dict[str, Any]:
    """Raw config of a preset's name or a file."""
    if name in PRESETS:
        return {"model": name}
    if not Path(name).is_file():
        raise ConfigError(
            f"{name!r} is neither a preset nor a file; `mupgpt presets` lists the presets"
        )
    return load_toml(name)


def stem(name: str) -> str:
    """A sweep's name from its file's, or the name itself."""
    return label(name) if name.endswith(".toml") else name


def one_thread() -> None:
    """One thread a process: two on a busy machine are slower than one (docs/decisions.md)."""
    from mupgpt.training.device import settle_cpu

    settle_cpu()


def write_text(path: Path, text: str) -> None:
    """Write a result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def print_json(data: Any) -> None:
    """Print strict JSON."""
    print(json.dumps(data, indent=1, allow_nan=False))
