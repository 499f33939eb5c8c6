"""A plain single-file page: jinja2, inline SVG, no script, readable from disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

__all__ = ["Section", "inline_svg", "write_page"]

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; font-size: 12.5px; line-height: 1.35; padding: .8rem;
      border: 1px solid #8886; border-radius: 6px; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; }
</style>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.heading }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.svg %}<figure>{{ section.svg | safe }}</figure>{% endif %}
{% if section.pre %}<pre>{{ section.pre }}</pre>{% endif %}
{% endfor %}
</html>
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page: a heading, and any of a paragraph, a picture and preformatted text."""

    heading: str
    text: str = ""
    pre: str = ""
    svg: str = ""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page; everything but pictures is escaped."""
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    path.write_text(template.render(title=title, sections=sections), encoding="utf-8")


def inline_svg(path: Path) -> str:
    """The ``<svg>`` element of a file, for a page."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
