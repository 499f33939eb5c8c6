"""Decay shapes, and a decay branched off a stable run: it is the run planned so from the start."""

import itertools
import math
import shutil

import pytest
import torch

from mupgpt.checkpoint.verify import checkpoints, load_newest
from mupgpt.cli import run as cli
from mupgpt.config.schedules import DECAYS, factor
from mupgpt.config.schema import Schedule
from mupgpt.errors import CheckpointError, ConfigError
from mupgpt.resolve import overlay, train_config
from mupgpt.runs.branch import branch, branch_config
from mupgpt.trainer import Trainer
from mupgpt.training.metrics import read_metrics

STEM = {
    "model": {"n_layer": 2, "d_model": 16, "n_head": 2, "vocab_size": 257, "seq_len": 16},
    "batch_size": 4,
    "steps": 24,
    "schedule": {"shape": "constant", "warmup": 0.25},
    "data": {"source": "text.txt", "eval_tokens": 256},
    "tracking": {
        "log_every": 4, "eval_every": 4, "checkpoint_every": 4, "keep": 1, "keep_steps": [10, 16],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def stem(**changes):
    return train_config(overlay(STEM, changes))


def state(folder):
    checkpoint = load_newest(folder / "checkpoints")
    groups = ("model", "optimizer")
    return {f"{g}.{k}": v for g in groups for k, v in checkpoint.tensors(g).items()}


def metrics(folder):
    drop = "perf/tokens_per_s"
    return [
        {k: v for k, v in r.items() if k != drop} for r in read_metrics(folder / "metrics.jsonl")
    ]


# decay → factor at 0, ¼, ½ and all of it, for an end of 1/16
VALUES = {
    "linear": (1, 1 - 15 / 64, 17 / 32, 1 / 16),
    "1-sqrt": (1, 17 / 32, 1 - 15 / 16 * math.sqrt(0.5), 1 / 16),
    "exponential": (1, 1 / 2, 1 / 4, 1 / 16),
    "cosine": (1, 1 / 16 + 15 / 32 * (1 + math.sqrt(0.5)), 17 / 32, 1 / 16),
}


@pytest.mark.parametrize("shape", DECAYS)
def test_decay_shapes(shape):
    schedule = Schedule(shape="wsd", warmup=0.0, end=1 / 16, decay=0.5, decay_shape=shape)
    steps = (512, 640, 768, 1024)
    found = [factor(schedule, step, 1024) for step in steps]
    assert found == pytest.approx(VALUES[shape], abs=1e-12)
    assert all(factor(schedule, step, 1024) == 1.0 for step in range(513))
    falling = [factor(schedule, step, 1024) for step in range(512, 1025)]
    assert all(a > b for a, b in itertools.pairwise(falling))


def test_an_exponential_decay_needs_an_end():
    with pytest.raises(ConfigError, match=r"schedule.end = 0.0: must be > 0 under an exponential"):
        Schedule(shape="wsd", decay_shape="exponential", end=0.0)
    Schedule(shape="cosine", decay_shape="exponential", end=0.0)


@pytest.mark.parametrize(
    ("at", "steps", "decay"),
    [
        (10, 14, {"decay_shape": "1-sqrt", "end": 0.0}),
        (10, 30, {"decay_shape": "exponential", "end": 0.05}),
        (16, 20, {"decay_shape": "cosine"}),
    ],
)
def test_a_branch_is_the_run_planned_from_the_start(tmp_path, at, steps, decay):
    Trainer(stem(), tmp_path / "stem").fit()
    config = branch(tmp_path / "stem", tmp_path / "branch", steps, at, **decay)
    result = Trainer(config, tmp_path / "branch").fit()
    planned = Trainer(config, tmp_path / "planned").fit()
    assert result == planned
    mine, theirs = state(tmp_path / "branch"), state(tmp_path / "planned")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert metrics(tmp_path / "branch") == metrics(tmp_path / "planned")
    assert config.steps == steps and config.schedule.shape == "wsd"


def test_a_branch_leaves_its_stem_alone_and_goes_on(tmp_path):
    Trainer(stem(), tmp_path / "stem").fit()
    before = metrics(tmp_path / "stem"), state(tmp_path / "stem")
    config = branch(tmp_path / "stem", tmp_path / "b", 20, 16)
    first = Trainer(config, tmp_path / "b").fit()
    assert branch(tmp_path / "stem", tmp_path / "b", 20, 16) == config
    assert Trainer(config, tmp_path / "b").fit() == first
    assert metrics(tmp_path / "stem") == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in state(tmp_path / "stem").items())


def test_wanted_checkpoints_are_not_pruned(tmp_path):
    Trainer(stem(), tmp_path / "stem").fit()
    found = [path.name for path in checkpoints(tmp_path / "stem" / "checkpoints")]
    assert found == ["step-00000024", "step-00000016", "step-00000010"]


def test_a_checkpoint_that_is_gone_is_said(tmp_path):
    Trainer(stem(), tmp_path / "stem").fit()
    with pytest.raises(ConfigError, match=r"no checkpoint at step 12 \(kept: 10, 16, 24\)"):
        branch(tmp_path / "stem", tmp_path / "b", 20, 12)
    with pytest.raises(ConfigError, match="be a run's folder"):
        branch(tmp_path / "nowhere", tmp_path / "b", 20)
    assert not (tmp_path / "b").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    Trainer(stem(), tmp_path / "stem").fit()
    (tmp_path / "stem" / "checkpoints" / "step-00000016" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        branch(tmp_path / "stem", tmp_path / "b", 20, 16)


def test_only_a_stable_run_has_branches():
    with pytest.raises(ConfigError, match=r"leaves its peak at step 7 .*'linear'"):
        branch_config(stem(schedule={"shape": "linear"}), at=10, steps=20)
    wsd = stem(schedule={"shape": "wsd", "decay": 0.5})
    assert branch_config(wsd, at=16, steps=20).schedule.decay == 4 / 14
    with pytest.raises(ConfigError, match="leaves its peak at step 16"):
        branch_config(wsd, at=17, steps=20)
    with pytest.raises(ConfigError, match="lie after the warm-up, which ends at step 6"):
        branch_config(stem(), at=5, steps=20)
    with pytest.raises(ConfigError, match="steps = 10: must be beyond the branch point, step 10"):
        branch_config(stem(), at=10, steps=10)


def test_the_command(tmp_path, capsys):
    Trainer(stem(), tmp_path / "stem").fit()
    command = ["branch", "stem", "--at", "16", "--steps", "20", "-o", "out", "--end", "0"]
    assert cli(command) == 0
    assert '"step": 20' in capsys.readouterr().out
    assert cli(command) == 0
    assert cli([*command[:3], "17", *command[4:]]) == 2
    assert "no checkpoint at step 17" in capsys.readouterr().err
    shutil.rmtree("out")
    (tmp_path / "out").mkdir()
    assert cli(command) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
