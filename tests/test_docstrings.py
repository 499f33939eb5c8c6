"""What a docstring must have: every public callable an example, which the doctests run."""

import pytest

import mupgpt

CALLABLE = [name for name in mupgpt.__all__ if callable(getattr(mupgpt, name))]


def lacks_example(thing):
    return ">>> " not in (thing.__doc__ or "")


@pytest.mark.parametrize("name", CALLABLE)
def test_every_public_callable_has_an_example(name):
    assert not lacks_example(getattr(mupgpt, name))


def test_the_example_test_can_fail():
    def bare():
        """Returns nothing."""

    assert lacks_example(bare)
