"""docs/big-run.md: its commands work, and its planned figures are the plan's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mupgpt.checkpoint.verify import checkpoints, load_newest
from mupgpt.planning.memory import SCHEMES
from mupgpt.planning.plan import GIB, Machine, plan
from mupgpt.resolve import train_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "big-run.md").read_text(encoding="utf-8")
PLAN, REHEARSAL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def run(block):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euc", block], env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip


def test_planning_needs_no_gpu():
    said = run(PLAN)
    assert "12,853,386,240 parameters" in said and "fits in 139 GiB: memory = lean" in said
    needs = json.loads(Path("plan.json").read_text())
    assert needs["fits"] and needs["batch"]["data_parallel"] == 48


@pytest.mark.slow
def test_the_rehearsal_is_one_run_three_times():
    torchrun, alone, launched = (json.loads(line) for line in run(REHEARSAL).splitlines())
    assert torchrun["step"] == 40 and torchrun["val/loss"] < 4
    assert alone == pytest.approx(torchrun, rel=1e-6)
    assert launched == pytest.approx(torchrun, rel=1e-6)
    assert load_newest(Path("runs/small/checkpoints")).step == 40
    assert len(checkpoints(Path("runs/launched/checkpoints"))) == 2


ROW = re.compile(r"^\| (13B|1\.3B) \| `(\w+)` \| (\w+) \| ([\d.]+) \|(.*)\|$", re.MULTILINE)


def test_planned_bytes_are_the_plans():
    rows = ROW.findall(PAGE)
    assert len(rows) == 4
    for size, memory, recomputed, gib, _ in rows:
        batch = 4 if size == "13B" else 8
        model = f"cerebras-gpt-{size.lower()}"
        run = train_config({"model": model, "memory": memory, "batch_size": batch})
        taken = plan(run, Machine(hbm=130.0, reserve=0.0)).taken
        assert (taken.checkpointing, round(taken.peak.total / GIB, 1)) == (recomputed, float(gib))


def test_schemes_are_described_with_their_bytes():
    for name, scheme in SCHEMES.items():
        total = scheme.weights + scheme.remainder + scheme.gradients + scheme.moments
        assert f"| `{name}` | {total} |" in PAGE


def test_the_price_of_a_checkpoint_is_the_record_s():
    path = ROOT / "sweeps" / "results" / "checkpoint_cost.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    cpu = {key: round(1000 * value) for key, value in record["seconds_each"]["cpu"].items()}
    text = " ".join(PAGE.split()).replace("−", "-")
    assert f"{record['bytes'] / 1e6:.0f} MB takes {cpu['median']} ms" in text
    assert f"five pairs of runs: {cpu['low']} and {cpu['high']}" in text and record["rounds"] == 5
    assert f"Five are {100 * record['cpu_share_at_five_in_this_run']:.1f} %" in text
    assert f"ten minutes is {100 * record['cpu_share_at_one_in_ten_minutes']:.3f} %" in text


def test_what_was_not_measured_is_blank():
    """Until the record is there; then the page has to say what it says."""
    measured = (ROOT / "sweeps" / "results" / "gpu_13b.json").is_file()
    for *_, rest in ROW.findall(PAGE):
        figures = [cell.strip() for cell in rest.split("|")][:3]
        assert all(figures) if measured else not any(figures)
