"""How many members train together: the fastest count, within memory and within its price."""

import math

import pytest
import torch
from test_tuning import RAW, spec

import mupgpt.tuning.group_size as size_module
from mupgpt.resolve import train_config
from mupgpt.tuning.group_size import Timing, best_count, members_for, usual
from mupgpt.tuning.spec import load_spec


class Device:
    """Step times of a planted device, on which a timing takes ten steps; counts what that took."""

    def __init__(self, seconds):
        self.seconds, self.spent, self.asked = seconds, 0.0, []

    def __call__(self, count):
        seconds = self.seconds(count)
        spent = 10 * (seconds if math.isfinite(seconds) else 1.0)
        self.asked.append(count)
        self.spent += spent
        return Timing(seconds, spent)


def launches(count):
    """A GPU: bound by launches up to 200 columns, by arithmetic beyond."""
    return max(1.0, count / 200)


def cache(count):
    """A CPU: a cost per step, and half the speed outside a cache of 40 columns."""
    return 4.0 + count * (1.0 if count <= 40 else 2.0)


@pytest.mark.parametrize(
    ("seconds", "first", "found"),
    [
        (launches, 16, 256),
        (cache, 8, 16),
        (cache, 128, 32),
        (lambda k: k**0.9, 16, 16),  # 7 % by each doubling: not worth it
        (lambda k: float(k), 16, 16),  # all the same: what was there stays
        (lambda k: 1.0 if k <= 64 else math.inf, 16, 64),  # memory ends
        (lambda k: 1.0 if k <= 6 else math.inf, 16, 4),  # and did so at the first
        (lambda k: 1.0 * k**2, 16, 1),
    ],
)
def test_the_count_with_the_most_members_a_second(seconds, first, found):
    assert best_count(Device(seconds), first, work=1e9, most=1000) == found


def test_no_more_than_fit_are_tried():
    device = Device(launches)
    assert best_count(device, 16, work=1e9, most=100) == 64
    assert max(device.asked) == 64


@pytest.mark.parametrize("work", [1e4, 1e5, 1e6])
def test_measuring_takes_a_fiftieth_of_the_work_at_most(work):
    device = Device(launches)
    chosen = best_count(device, 4, work, most=10**6)
    rate = 4 / launches(4)
    assert device.spent <= 0.02 * work / rate
    assert chosen == min(256, max(device.asked)) > 4


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def test_little_work_is_not_timed(monkeypatch):
    monkeypatch.setattr(size_module, "time_step", lambda configs: 1 / 0)
    monkeypatch.setattr(size_module, "pick_device", lambda: torch.device("cpu"))
    (cell,) = spec().cells
    tokens = 4 * 16
    assert members_for(cell, work=1000) == usual(cell.config()) == 8192 // tokens


def test_much_work_is_timed_and_said(caplog):
    caplog.set_level("INFO", "mupgpt.worker")
    (cell,) = spec(study={"members": 0}, train={"batch_size": 256}).cells
    chosen = members_for(cell, work=1e5)
    assert chosen in (1, 2, 4, 8, 16) and f"tiny: {chosen} members together" in caplog.text


def test_the_spec_decides_where_it_says_so():
    (cell,) = spec(study={"members": 5}).cells
    assert members_for(cell, work=1e9) == 5
    assert spec(study={"members": 5}).identity == spec().identity


def test_memory_bounds_the_count(monkeypatch):
    """13B in 32 GiB: one at a time; half of the memory, by the plan's own bytes, is used."""
    monkeypatch.setattr(size_module, "pick_device", lambda: torch.device("cpu"))
    config = train_config({**RAW["train"], "data": {}, "batch_size": 1, "precision": "fp32"})
    assert usual(config) == 512
    need = max(m.total for m in size_module.moments(config, "exact", "none"))
    monkeypatch.setattr(size_module, "_memory", lambda: 2 * 10.5 * need)
    assert usual(config) == 10 and usual(config, processes=2) == 5
    monkeypatch.setattr(size_module, "_memory", lambda: 32 * 2**30)
    assert usual(train_config({"model": "cerebras-gpt-13b", "batch_size": 1})) == 1


def test_large_models_train_alone(monkeypatch):
    """The proxies' widths: a cache full of small ones, fewer of larger ones, one of 24 layers."""
    monkeypatch.setattr(size_module, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(size_module, "_memory", lambda: 2**40)
    counts = [usual(train_config({"model": f"proxy-{d}"})) for d in (32, 64, 128, 256)]
    assert counts[:2] == [16, 16] and counts[2] > counts[3] > 1
    assert usual(load_spec("cerebras-proxy-small").cells[0].config()) == 1
