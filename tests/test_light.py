"""The long run needs nothing beyond torch, numpy and safetensors: all else is made invisible."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mupgpt

NEEDED = ("torch", "numpy", "safetensors")
IMAGE = """
import sys
from importlib.machinery import PathFinder

class Image(PathFinder):
    absent = {names!r}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in cls.absent:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Image
"""
CONFIG = {
    "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": 257, "seq_len": 16},
    "batch_size": 4, "steps": 6,
    "data": {"source": "text.txt", "eval_tokens": 64},
    "tracking": {"checkpoint_every": 3},  # wandb as by default: mirrored where it is there
}  # fmt: skip


def needed():
    """Distributions that torch, numpy and safetensors install, these included."""
    found, queue = set(), list(NEEDED)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        queue += [re.match(r"[\w.-]+", line)[0] for line in asked if "extra ==" not in line]
    return found


def others():
    """Top-level modules of all other installed distributions."""
    allowed = needed() | {"mupgpt"}
    return sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & allowed
    )


@pytest.fixture
def bare(tmp_path):
    """The environment of processes in an image that has nothing else."""
    names = others()
    assert {"optuna", "wandb", "tyro", "scipy", "matplotlib", "tomli_w", "mup"} <= set(names)
    assert not {*NEEDED, "mupgpt"} & set(names)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "sitecustomize.py").write_text(IMAGE.format(names=names))
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    (tmp_path / "light.json").write_text(json.dumps(CONFIG))
    code = Path(mupgpt.__file__).parent.parent
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path / 'image'}:{code}",
            "OMP_NUM_THREADS": "1"}  # fmt: skip


def python(bare, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=bare, capture_output=True, text=True, check=False
    )


def test_the_image_has_nothing_else(bare):
    """Or the next test could not fail."""
    done = python(bare, "-c", "import torch, mupgpt.trainer; print('so far'); import tyro")
    assert done.stdout == "so far\n" and "No module named 'tyro'" in done.stderr


@pytest.mark.slow
def test_torchrun_trains_continues_and_evaluates_there(bare):
    """Two processes, one process, and one that continues from the checkpoint of the two."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    trainer = ["-m", "mupgpt.trainer", "light.json"]
    two = python(bare, *torchrun, *trainer, "two")
    assert two.returncode == 0, two.stderr
    one = python(bare, *trainer, "one")
    assert one.returncode == 0, one.stderr
    mine, theirs = json.loads(two.stdout), json.loads(one.stdout)
    assert mine["step"] == theirs["step"] == 6
    assert mine == pytest.approx(theirs, rel=1e-4)
    again = python(bare, *trainer, "two")  # elastic: two processes' checkpoint, on one
    assert json.loads(again.stdout) == pytest.approx(mine, rel=1e-6)
    assert "continuing two at step 6" in again.stderr
