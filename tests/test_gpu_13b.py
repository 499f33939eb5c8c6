"""The measurement on a GPU is one command, and every line of it runs at toy size without one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mupgpt.planning.flops import flops_per_token
from mupgpt.resolve import train_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the whole command writes, at toy size."""
    out = tmp_path_factory.mktemp("toy") / "toy.json"
    measure(out)
    return json.loads(out.read_text())


def measure(out, *arguments):
    command = [sys.executable, "gpu_13b.py", "--toy", "--out", str(out), *arguments]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)


@pytest.mark.slow
def test_timed_steps_are_clipped_real_ones_and_mfu_is_palms(record):
    assert record["rate"]["flops_per_s"] > 0
    runs = {row["memory"]: row for row in record["speed"]["runs"]}
    assert set(runs) == {"exact", "split", "lean"} and len(record["eager"]["runs"]) == 3
    for row in runs.values():
        assert row["step_seconds"]["timed"] >= 20
        assert len(row["losses"]) == len(row["grad_norms"]) == 24  # 3 + 20, and a profiled one
        assert all(map(math.isfinite, row["losses"])) and row["losses"][-1] < row["losses"][0]
        assert max(row["grad_norms"]) > row["grad_clip"] > 0
        assert row["losses"] == pytest.approx(runs["exact"]["losses"], rel=5e-3)
        shares = [part["share"] for part in row["profile"]]
        assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
        assert row["planned_gib"] > 0
    shape = train_config({"model": {"n_layer": 2, "d_model": 64, "n_head": 2, "vocab_size": 257,
                                    "seq_len": 64}}).model  # fmt: skip
    exact = runs["exact"]
    reached = flops_per_token(shape, "palm") * exact["tokens_per_s"]
    assert exact["mfu"] == pytest.approx(reached / record["rate"]["flops_per_s"])


@pytest.mark.slow
def test_coordinates_are_checked_with_optimizer_steps(record):
    """Slope and standard error of activations, attention logits and updates by role."""
    check = record["coord"]
    assert check["passed"] and len(check["sizes"]) == 3 and len(check["seeds"]) == 3
    assert check["steps"] >= 2
    found = {(row["measure"], row["probe"]) for row in check["probes"]}
    assert {("change", "scores"), ("change", "residual.last")} <= found
    assert {("update", role) for role in ("input", "hidden", "residual_out", "norm")} <= found
    assert all(row["se"] >= 0 for row in check["probes"])


@pytest.mark.slow
def test_a_killed_run_is_the_unbroken_one_and_a_checkpoint_has_a_price(record):
    assert record["resume"]["largest_difference"] == {"train/loss": 0.0, "val/loss": 0.0}
    assert record["hf"]["tokens_per_s"]["hf"] > 0 and record["hf"]["times_faster"] > 0
    saved = record["save"]
    assert saved["gib"] * 2**30 == pytest.approx(8 * 120_640, rel=0.05)  # bytes a parameter
    assert 0 < saved["blocked_seconds"]["median"] <= saved["until_on_disk_seconds"]["median"]


@pytest.mark.slow
def test_nothing_begins_after_its_time(tmp_path):
    measure(tmp_path / "late.json", "rate", "coord", "--minutes", "0")
    record = json.loads((tmp_path / "late.json").read_text())
    assert record["rate"] == record["coord"] == {"seconds": 0.0, "left": True}


def test_without_a_gpu_only_the_toy_runs():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "gpu_13b.py", "rate"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no GPU is here; --toy runs" in done.stderr
