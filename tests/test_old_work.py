"""What version 0.1.0 left on disk opens, and goes on as it would have.

``tests/data/v0_1_0`` was made by that version: a run in float64 that was stopped at step 7 of 12
(``whole.*``: the same run unbroken), a TPE study, a grid study, and a transfer record.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mupgpt.config.plain import load_toml
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError
from mupgpt.evidence.verdict import judge_sweep
from mupgpt.mutransfer.transfer import transfer
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.metrics import read_metrics
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import load_spec
from mupgpt.tuning.study import Sweep

OLD = Path(__file__).parent / "data" / "v0_1_0"


@pytest.fixture(autouse=True)
def _old(tmp_path):
    """A copy of the old work in the folder where the test runs."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "sweeps").rename(tmp_path / "runs" / "sweeps")
    load_corpus.cache_clear()  # of another folder's text.txt


def expected(name):
    return json.loads((OLD / name).read_text())


def near(value, other):
    """Equal but for rounding, which differs between machines."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(near(value[k], other[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(near, value, other))
    return value == pytest.approx(other, rel=1e-4) if isinstance(value, float) else value == other


def test_a_stopped_run_goes_on_to_the_unbroken_ones_weights(tmp_path):
    config = train_config(load_toml("run.toml"))
    assert Trainer(config, "run").fit() == pytest.approx(expected("result.json"), rel=1e-12)
    found = load_file(tmp_path / "run/checkpoints/step-00000012/model.safetensors")
    for name, tensor in load_file(OLD / "whole.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-13)
    old, new = read_metrics(OLD / "whole.jsonl"), read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in new] == [r["step"] for r in old] == [2, 4, 6, 8, 10, 12]
    assert [r["train/loss"] for r in new] == pytest.approx([r["train/loss"] for r in old])


def test_the_best_of_an_old_study_and_its_transfer():
    tuned = best_hparams(Sweep.open("old-joint").studies()["old-joint"])
    old = expected("best.json")["old-joint"]
    assert (tuned.trial, tuned.swept_loss) == (old["trial"], old["swept_loss"])
    assert tuned.loss == pytest.approx(old["loss"], rel=1e-4)
    record, then = transfer(tuned, to=load_toml("to.toml")).to_dict(), expected("transfer.json")
    assert near(record["config"]["hparams"], then["config"]["hparams"])
    assert near(record["sites"], then["sites"]) and near(record["multipliers"], then["multipliers"])


def test_a_sweep_of_one_study_is_taken_by_its_name():
    assert best_hparams("old-joint") == best_hparams(run_sweep(load_spec("old-joint.toml")))
    with pytest.raises(ConfigError, match=r"old-lr' has \d studies: give one of run_sweep"):
        best_hparams("old-lr")


def test_an_old_transfer_is_a_config():
    config = train_config(load_toml("target.toml"))
    assert config == train_config(load_toml("transfer.json")["config"])


def test_the_verdict_on_an_old_study():
    old, found = expected("verdict.json"), judge_sweep("old-lr").to_dict()
    for key in ("verdict", "rule", "axis", "rules", "curves", "corpus"):
        assert near(found[key], old[key]), key


def test_an_old_study_goes_on_to_a_larger_budget():
    before = [
        (t.number, t.value) for t in Sweep.open("old-joint").studies()["old-joint"].get_trials()
    ]
    Path("old-joint.toml").write_text(
        Path("old-joint.toml").read_text().replace("trials = 5", "trials = 7")
    )
    study = run_sweep(load_spec("old-joint.toml"), workers=1)
    after = [(t.number, t.value) for t in study.get_trials()]
    assert len(after) == 7 and after[:5] == before
