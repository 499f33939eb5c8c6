"""The sweeps and examples that come with the package, by name."""

from pathlib import Path

from mupgpt.errors import ConfigError, unknown

__all__ = ["bundled", "find_bundled"]

PACKAGE = Path(__file__).parents[1]
SUFFIX = {"sweeps": ".toml", "examples": ".py"}


def bundled(kind: str) -> dict[str, Path]:
    """Name → path of each shipped file of ``sweeps`` or ``examples``.

    >>> "smoke" in bundled("sweeps")
    True
    """
    inside, beside = PACKAGE / "_bundled" / kind, PACKAGE.parent / kind
    folder = inside if inside.is_dir() else beside
    return {p.stem: p for p in sorted(folder.glob(f"*{SUFFIX[kind]}"))}


def find_bundled(name: str) -> Path:
    """The path of a shipped sweep or example, or of an existing file."""
    if Path(name).is_file():
        return Path(name)
    files = {n: p for kind in SUFFIX for n, p in bundled(kind).items()}
    if name in files:
        return files[name]
    if Path(name).suffix:
        raise ConfigError(f"no file {name!r}; `mupgpt ls` lists what is shipped by name")
    raise unknown("sweep or example", name, files)
