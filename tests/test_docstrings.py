"""What a docstring must have: every public callable an example, which the doctests run."""

import runpy
from pathlib import Path

import pytest

import mupgpt

CALLABLE = [name for name in mupgpt.__all__ if callable(getattr(mupgpt, name))]
DOCS = Path(__file__).parent.parent / "docs"


def lacks_example(thing):
    return ">>> " not in (thing.__doc__ or "")


@pytest.mark.parametrize("name", CALLABLE)
def test_every_public_callable_has_an_example(name):
    assert not lacks_example(getattr(mupgpt, name))


def test_the_example_test_can_fail():
    def bare():
        """Returns nothing."""

    assert lacks_example(bare)


def test_the_page_of_public_names_is_that_of_the_docstrings():
    made = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    stored = (DOCS / "api.md").read_text(encoding="utf-8")
    assert made == stored, "run: python docs/make_api.py"
    assert [line for line in stored.splitlines() if line.startswith("### ")] == [
        f"### {name}" for names in mupgpt._HOME.values() for name in names.split()
    ]
    assert sorted(" ".join(mupgpt._HOME.values()).split()) == mupgpt.__all__
