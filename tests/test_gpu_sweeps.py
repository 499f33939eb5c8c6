"""What a GPU measures of sweeps is one command; every line of it runs at toy size without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    command = [sys.executable, "gpu_sweeps.py", "--toy", "--out", str(out / "toy.json")]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "toy.json").read_text())


def test_populations_end_where_single_runs_end(record):
    rows = record["speed"]["runs"]
    assert [row["d_model"] for row in rows] == [64, 128, 256] and record["speed"]["toy"]
    for row in rows:
        times, apart = row["goals"]
        assert apart["found"] == row["apart"] < 1e-5 and apart["reached"]
        rate = row["trials_per_hour"]
        assert times["found"] == pytest.approx(rate["population"] / rate["alone"])
        assert ("profile" in row) == (not times["reached"])


def test_verdicts_come_with_their_pictures(record, folder):
    for source, name in (("stdlib", "stdlib"), ("package:torch", "torch")):
        verdict = record["verdict"][source]
        assert set(verdict["rules"]) == {"mup", "sp"} and verdict["tolerance"] == 0.05
        assert (folder / f"lr-16x-{name}.svg").is_file()


def test_the_search_ends_with_its_best(record):
    proxy = record["proxy"]
    assert len(proxy["trials"]) == 4 and all(len(t["params"]) == 3 for t in proxy["trials"])
    assert proxy["loss"] < 5.4  # a uniform guess has 5.55
