"""docs/speed.md says what its records say, and nothing else."""

import doctest
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_page_is_made_from_the_records():
    speed = importlib.import_module("speed")
    folder = ROOT / "sweeps" / "results"
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in speed.BENCHMARKS}
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == speed.page(records)


@pytest.mark.parametrize("name", ["measure", "speed", "gemm_share"])
def test_examples_in_the_benchmarks_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_turns_alternate_and_ratios_are_of_one_round():
    measure = importlib.import_module("measure")
    order, clock = [], iter(range(1, 100))

    def side(name, factor):
        def call():
            order.append(name)
            seconds = float(factor * next(clock))
            return measure.Cost(seconds, seconds / 2)

        return call

    costs = measure.take_turns({"a": side("a", 1), "b": side("b", 1)}, rounds=2, warm=1)
    assert order == ["a", "b", "b", "a", "a", "b"]  # who began last ends first
    assert [c.wall for c in costs["a"]] == [4.0, 5.0] and [c.wall for c in costs["b"]] == [3.0, 6.0]
    faster = measure.times_faster(costs["a"], costs["b"])
    assert faster["wall"]["median"] == faster["cpu"]["median"] == pytest.approx((4 / 3 + 5 / 6) / 2)
    assert measure.goal("x", 1.1, most=1.0)["reached"] is False
    assert measure.goal("x", 1.1, least=1.0)["reached"] is True
