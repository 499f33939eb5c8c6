"""Plain data in and out of dataclasses: the one way in which a table becomes a config, or fails."""

import dataclasses
import json
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mupgpt.errors import ConfigError, require, unknown

__all__ = ["from_dict", "load_toml", "to_dict"]


T = TypeVar("T")


def from_dict(cls: type[T], raw: Any, path: str = "") -> T:
    """An instance of the dataclass ``cls`` from plain data; unknown keys and wrong types fail.

    >>> from mupgpt.config.schema import Schedule
    >>> from_dict(Schedule, {"shape": "cosine", "end": 0}).end
    0.0
    >>> from_dict(Schedule, {"warmpu": 0.1}, "schedule")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: unknown key 'schedule.warmpu'; did you mean 'schedule.warmup'?
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or cls.__name__} = {raw!r}: expected a table of keys")
    hints = get_type_hints(cls)
    dotted = {f.name: f"{path}.{f.name}".lstrip(".") for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in dotted:
            raise unknown("key", f"{path}.{key}".lstrip("."), dotted.values())
    missing = [
        dotted[f.name]
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in raw
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {missing[0]!r}: it has no default")
    return cls(**{k: _coerce(hints[k], v, dotted[k]) for k, v in raw.items()})


MAX_NUMBER = 1e300  # beyond it an int has no float


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or an error that names the path."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)  # type: ignore
    if origin is Literal:
        if value in args:
            return value
        raise unknown(f"value of {path}", str(value), args)
    if origin in (Union, types.UnionType):
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_coerce(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _coerce(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{path}: the number is too large ({str(value)[:20]}…)")
    if hint is float and number:
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{path} = {value!r}: expected {name}, got {type(value).__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain data, which `from_dict` accepts back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML (or resolved JSON) file, as plain data.

    Raises `ConfigError` with the file and the line for what cannot be read.

    >>> load_toml("no.toml")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: cannot read no.toml: [Errno 2] No such file or directory: 'no.toml'
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = path.suffix.lstrip(".") or "toml"
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    require(isinstance(data, dict), str(path), data, "hold a table of keys")
    return data
