"""Pruning: a population stands at a rung together, judged against all that ever stood there."""

import pytest
from optuna.trial import FrozenTrial, TrialState
from test_tuning import RAW, spec

from mupgpt.errors import ConfigError
from mupgpt.tuning.pruning import bracket, passing
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import StudyConfig, parse_spec


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def at_rung(losses, rung=10):
    """Trials 0, 1, … with these losses at the rung."""
    return [
        FrozenTrial(number=number, trial_id=number, state=TrialState.RUNNING, value=None,
                    datetime_start=None, datetime_complete=None, params={}, distributions={},
                    user_attrs={}, system_attrs={}, intermediate_values={rung: loss})
        for number, loss in enumerate(losses)
    ]  # fmt: skip


def test_halving_passes_the_best_share_of_all_that_were_seen():
    config = StudyConfig(rungs=1, reduction=3)
    trials = at_rung([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert passing(config, trials, [10], 10, {3, 4, 5}) == {3}  # the best 2 of 6 are 1 and 3
    assert passing(config, trials, [10], 10, {0, 2, 5}) == set()  # none of them is
    assert passing(config, trials, [10], 10, {1, 99}) == {1}  # one that did not report is left out
    assert passing(config, trials, [10], 10, {99}) == set()
    trials[1].state = TrialState.FAIL  # given back: its retry stands for it
    assert passing(config, trials, [10], 10, {2, 3}) == {3}


def test_the_median_passes_the_better_half():
    config = StudyConfig(rungs=1, pruner="median")
    trials = at_rung([5.0, 1.0, 4.0, 2.0, 3.0])
    assert passing(config, trials, [10], 10, {0, 1, 2, 3, 4}) == {1, 3, 4}
    assert passing(config, trials, [10], 10, {0, 2}) == set()


def test_hyperband_judges_each_bracket_by_itself_and_from_its_own_rung():
    config = StudyConfig(rungs=2, reduction=2, pruner="hyperband")
    losses = [float(n) for n in range(24)]  # a later trial is a worse one
    groups = [[n for n in range(24) if bracket(n, 2, 2) == b] for b in range(3)]
    assert all(groups)
    everyone = set(range(24))
    first = passing(config, at_rung(losses, 5), [5, 10], 5, everyone)
    assert first == {*groups[0][: len(groups[0]) // 2], *groups[1], *groups[2]}
    second = passing(config, at_rung(losses, 10), [5, 10], 10, everyone)
    halves = {*groups[0][: len(groups[0]) // 2], *groups[1][: len(groups[1]) // 2]}
    assert second == halves | {*groups[2]}


@pytest.mark.parametrize("pruner", ["halving", "hyperband", "median"])
def test_every_pruner_ends_a_sweep_at_its_budget(pruner):
    study = run_sweep(spec(study={"trials": 9, "rungs": 2, "reduction": 2, "pruner": pruner}),
                      workers=1)  # fmt: skip
    ended = [t for t in study.trials if t.state.is_finished()]
    assert len(ended) == 9 and {t.state.name for t in ended} == {"COMPLETE", "PRUNED"}
    for trial in ended:
        stopped = trial.state.name == "PRUNED"
        assert sorted(trial.intermediate_values) in ([[3], [3, 6]] if stopped else [[3, 6]])


@pytest.mark.parametrize("sampler", ["tpe", "qmc", "random"])
def test_a_warm_start_tries_the_earlier_best_first(sampler):
    """After the run as it stands come the earlier sweep's best, as far as they lie inside; and what
    is sampled then is new."""
    earlier = run_sweep(spec(study={"sampler": sampler}), workers=1)
    best = [t.params for t in sorted(earlier.trials, key=lambda t: t.value)]
    warm = {"warm_start": "tiny", "warm_top": 2, "trials": 5, "sampler": sampler}
    raw = {**RAW, "name": "warm", "study": {**RAW["study"], **warm}}
    study = run_sweep(parse_spec(raw, "x"), workers=1)
    tried = [t.params for t in study.trials]
    first = [{"hparams.lr": 6e-3}, *best[:2]]
    unique = [p for i, p in enumerate(first) if p not in first[:i]]
    assert tried[: len(unique)] == unique and len(tried) == 5
    assert not any(p in best for p in tried[len(unique) :])


def test_a_warm_start_from_nothing_is_refused():
    with pytest.raises(ConfigError, match="no sweep 'nowhere'"):
        run_sweep(spec(study={"warm_start": "nowhere"}), workers=1)
    with pytest.raises(ConfigError, match=r"study\.warm_start"):
        spec(study={"warm_start": "tiny", "sampler": "grid"})


def test_a_misspelled_warm_start_leaves_nothing_behind():
    """Corrected, the same sweep starts: the name was refused before anything was written."""
    with pytest.raises(ConfigError, match="no sweep 'nowhere'"):
        run_sweep(spec(study={"warm_start": "nowhere"}), workers=1)
    assert len(run_sweep(spec(), workers=1).trials) == 6
    with pytest.raises(ConfigError, match="be another sweep's name"):
        spec(study={"warm_start": "tiny"})
