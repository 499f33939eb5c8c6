"""Plain data in and out of dataclasses: the one way in which a table becomes a config, or fails."""

import dataclasses
import json
import math
import reprlib
import tomllib
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mupgpt.config.fields import check
from mupgpt.errors import ConfigError, require, unknown

__all__ = ["finite", "from_dict", "load_toml", "settle", "to_dict"]


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
        raise ConfigError(f"{path or cls.__name__} = {_short(raw)}: expected a table of keys")
    known = _typed(cls)
    for key in raw:
        if key not in known:
            raise unknown("key", _dotted(path, key), [_dotted(path, name) for name in known])
    for name, (f, _) in known.items():
        given = name in raw or f.default is not dataclasses.MISSING
        if not given and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {_dotted(path, name)!r}: it has no default")
    return cls(
        **{key: _settled(*known[key], value, _dotted(path, key)) for key, value in raw.items()}
    )


def settle(config: Any, path: str = "") -> None:
    """Treat the fields of a new frozen dataclass as `from_dict` would; for its ``__post_init__``.

    So a config made in Python takes what a file may say, and refuses it with the same words.

    >>> from mupgpt.config.schema import TrackingConfig
    >>> TrackingConfig(keep_steps=[400, 800]).keep_steps
    (400, 800)
    >>> TrackingConfig(keep="two")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: tracking.keep = 'two': expected int, got str
    """
    for name, (f, hint) in _typed(type(config)).items():
        value = getattr(config, name)
        settled = _settled(f, hint, value, _dotted(path, name))
        if settled is not value:
            object.__setattr__(config, name, settled)


@cache
def _typed(cls: Any) -> dict[str, tuple["dataclasses.Field[Any]", Any]]:
    """Name → field and type of a dataclass."""
    hints = get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls)}


def _settled(field: "dataclasses.Field[Any]", hint: Any, value: Any, path: str) -> Any:
    """``value`` with the field's type and inside its bounds."""
    value = _coerce(hint, value, path)
    check(field, value, path)
    return value


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


MAX_NUMBER = 1e300  # beyond it an int has no float


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or an error that names the path."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{path}: the number is too large ({str(value)[:20]}…)")
    if type(value) is hint and hint in (bool, int, float, str):
        return value
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
    if hint is float and number:
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    expected = "list" if origin is tuple else getattr(origin or hint, "__name__", str(hint))
    raise ConfigError(f"{path} = {_short(value)}: expected {expected}, got {type(value).__name__}")


def _short(value: Any) -> str:
    """``value`` in so many characters that a message stays a line."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain data, which `from_dict` accepts back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def finite(x: float) -> float | None:
    """``x`` as plain data: None where it is infinite or no number, which JSON does not know.

    >>> finite(0.5), finite(math.inf)
    (0.5, None)
    """
    return x if math.isfinite(x) else None


def load_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML (or resolved JSON) file, or an error that names the file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark (BOM)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    kind = path.suffix.lstrip(".") or "toml"
    try:
        data = _parse_json(text) if kind == "json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: {TOO_DEEP}") from error
    if _depth(data) > MAX_DEPTH:
        raise ConfigError(f"{path}: {TOO_DEEP}")
    require(isinstance(data, dict), str(path), data, "hold a table of keys")
    return data


MAX_DEPTH = 32
TOO_DEEP = f"tables and lists must nest at most {MAX_DEPTH} deep; a config needs three"


def _parse_json(text: str) -> Any:
    """JSON with every key once, as TOML demands it: of two values one would be lost."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one table; keep one of them")
    return table


def _depth(data: Any) -> int:
    """How deep ``data`` nests, as far as one past what is allowed."""
    depth, level = 0, [data]
    while level and depth <= MAX_DEPTH:
        depth += 1
        tables = [list(one.values()) if isinstance(one, dict) else one for one in level
                  if isinstance(one, dict | list)]  # fmt: skip
        level = [below for table in tables for below in table]
    return depth
