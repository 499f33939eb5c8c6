"""Columns of text, and short names."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

__all__ = ["align", "label", "number", "several", "show"]


def align(
    rows: Sequence[Sequence[str]], right: Collection[int], markdown: bool = False
) -> list[str]:
    """Rows as lines with aligned columns; the first one is the header.

    >>> align([("a", "n"), ("b", "10")], right={1})
    ['a   n', 'b  10']
    """
    if markdown:
        rule = ["---:" if i in right else "---" for i in range(len(rows[0]))]
        return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def label(path: Path | str) -> str:
    """What a preset, a file or a folder is called: the last part, without .toml or .json.

    Any other dot belongs to the name, which `Path.stem` would cut.

    >>> [label(name) for name in ("cerebras-gpt-1.3b", "configs/big-1.3b.toml", "runs/old.v2/")]
    ['cerebras-gpt-1.3b', 'big-1.3b', 'old.v2']
    """
    return Path(path).name.removesuffix(".toml").removesuffix(".json")


def number(value: float) -> str:
    """A figure in four digits, a zero as ``0``.

    >>> number(0.0178885), number(0.0)
    ('0.01789', '0')
    """
    return f"{value:.4g}" if value else "0"


def show(value: Any) -> str:
    """A field of a config for a reader: floats in four digits, integers with commas.

    >>> show(0.0178885), show(50257), show("stdlib"), show(True)
    ('0.01789', '50,257', 'stdlib', 'True')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    plain = isinstance(value, str | bool)
    return str(value) if plain else f"{value:,}"


def several(count: int, what: str, ending: str = "s") -> str:
    """A count with its noun.

    >>> several(1, "seed"), several(2, "search", "es")
    ('1 seed', '2 searches')
    """
    return f"{count} {what}{'' if count == 1 else ending}"
