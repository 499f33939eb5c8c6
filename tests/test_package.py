"""The package: what its metadata say, and what its wheel ships."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mupgpt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_said_once_and_cited():
    assert PROJECT["dynamic"] == ["version"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {mupgpt.__version__}" in cited
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines()
                  if line.startswith("## "))  # fmt: skip
    assert newest.split()[1] == mupgpt.__version__.partition(".dev")[0]


def test_the_metadata_are_complete():
    assert [author["name"] for author in PROJECT["authors"]] == ["mupgpt developers"]
    assert all(url.startswith("https://github.com/mupgpt/mupgpt")
               for url in PROJECT["urls"].values())  # fmt: skip
    lowest = int(PROJECT["requires-python"].removeprefix(">=3."))
    for minor in range(lowest, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]


@pytest.mark.slow
def test_the_wheel_ships_every_module_and_the_type_marker(tmp_path):
    """And no module is left out because git ignores a folder of its name."""
    built = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), "."]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True, env=dict(os.environ))
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    package = Path(mupgpt.__file__).parent
    modules = {f"mupgpt/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert modules | {"mupgpt/py.typed", "mupgpt/_bundled/sweeps/smoke.toml"} <= names
