"""Sweeps: an exact budget whatever dies, Optuna's storage, a spec that is checked as a whole."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import tomli_w
from optuna.storages._rdb.models import BaseModel
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError
from mupgpt.resolve import overlay
from mupgpt.training.population import Population
from mupgpt.tuning import trial_queue, worker as worker_module
from mupgpt.tuning.best import best_hparams, importances
from mupgpt.tuning.pruning import rung_steps
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.samplers import make_sampler
from mupgpt.tuning.space import Dimension, SearchSpace
from mupgpt.tuning.spec import differences, load_spec, parse_spec, put
from mupgpt.tuning.storage import quiet
from mupgpt.tuning.study import Sweep
from mupgpt.tuning.trial_queue import TrialQueue, fill
from mupgpt.tuning.worker import work
from mupgpt.util.bundled import bundled

RAW = {
    "name": "tiny",
    "study": {"trials": 6, "seeds": [0, 1]},
    "train": {
        "model": {"n_layer": 1, "d_model": 16, "n_head": 1, "vocab_size": 257, "seq_len": 16},
        "steps": 12,
        "batch_size": 4,
        "data": {"source": "text.txt", "eval_tokens": 128},
    },
    "space": {"hparams.lr": {"low": 1e-4, "high": 1e-1, "log": True}},
}


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def spec(**changes):
    return parse_spec(overlay(RAW, changes), "tiny.toml")


def states(study):
    return sorted(t.state.name for t in study.trials if t.state != TrialState.FAIL)


def test_the_budget_is_exact_and_a_second_call_adds_nothing():
    study = run_sweep(spec(), workers=1)
    assert isinstance(study, optuna.Study)
    assert states(study) == ["COMPLETE"] * 6
    values = [t.value for t in study.trials]
    again = run_sweep(spec(), workers=1)
    assert [t.value for t in again.trials] == values
    more = run_sweep(spec(study={"trials": 8}), workers=1)
    assert states(more) == ["COMPLETE"] * 8


def test_the_first_trial_is_the_run_as_it_stands():
    study = run_sweep(spec(), workers=1)
    assert study.trials[0].params == {"hparams.lr": 6e-3}


@pytest.mark.parametrize("steps, said", [(1, "costs 5.0 times"), (4, "costs 1.2 times"), (5, "")])
def test_an_evaluation_dearer_than_the_training_is_said(steps, said, capsys):
    """A forward pass is a third of a step: 480 tokens of it cost as much as 5 steps of 32."""
    data = {**RAW["train"]["data"], "eval_tokens": 480}
    tiny = spec(
        study={"trials": 1, "seeds": [0]}, train={"steps": steps, "batch_size": 2, "data": data}
    )
    run_sweep(tiny, workers=1)
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if "evaluation" in line]
    assert len(found) == bool(said) and all(said in line for line in found)


def test_a_trial_is_its_members_trained_alone():
    """The value that Optuna gets is what the trial's config gives by itself, seed by seed."""
    sweep = Sweep.create(spec())
    study = run_sweep(sweep.spec, workers=1)
    trial = study.trials[3]
    losses = []
    for seed in (0, 1):
        config = sweep.spec.cells[0].config(trial.params, seed)
        population = Population([config], load_corpus(config.data))
        population.train()
        losses.append(population.evaluate()[0])
    assert trial.user_attrs["losses"] == pytest.approx(losses, rel=1e-5)
    assert trial.value == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_an_interrupt_gives_trials_back(monkeypatch):
    sweep = Sweep.create(spec())
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])

    def stop():
        return states(study).count("RUNNING") == 6  # inside the first population

    with pytest.raises(KeyboardInterrupt):
        work(sweep, when=stop)
    assert states(study) == ["WAITING"] * 6  # all were in hand
    params = [t.params or t.system_attrs["fixed_params"] for t in study.trials[-6:]]
    done = run_sweep(sweep.spec, workers=1)
    assert states(done) == ["COMPLETE"] * 6
    assert [t.params for t in done.trials if t.state == TrialState.COMPLETE] == params


def test_trials_of_a_dead_worker_of_this_machine_are_taken_at_once():
    sweep = Sweep.create(spec())
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])
    with quiet():
        lost = study.ask(sweep.spec.cells[0].search_space.distributions)
    lost.set_user_attr("worker", f"{socket.gethostname()}:{gone()}")
    done = run_sweep(sweep.spec, workers=1)
    assert states(done) == ["COMPLETE"] * 6
    assert lost.params in [t.params for t in done.trials if t.state == TrialState.COMPLETE]


def test_a_silent_worker_of_another_machine_is_replaced(monkeypatch):
    """Its heartbeat is too old: the trial is queued again with the same values."""
    monkeypatch.setattr("mupgpt.tuning.storage.MISSED_BEATS", 1)
    monkeypatch.setattr(worker_module, "POLL_S", 0.2)
    sweep = Sweep.create(spec(study={"heartbeat": 1}))
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])
    with quiet():
        lost = study.ask(sweep.spec.cells[0].search_space.distributions)
    lost.set_user_attr("worker", "elsewhere:1")
    sweep.storage.record_heartbeat(lost._trial_id)
    work(sweep)
    assert states(study) == ["COMPLETE"] * 6
    assert study.trials[lost.number].state == TrialState.FAIL
    assert lost.params in [t.params for t in study.trials if t.state == TrialState.COMPLETE]


def test_a_worker_that_died_before_it_said_who_it_is(monkeypatch):
    """Killed between asking and its first sign of life: the trial is queued again in the end."""
    monkeypatch.setattr(trial_queue, "MISSED_BEATS", 0)
    sweep = Sweep.create(spec())
    fill(sweep)
    with quiet():
        lost = sweep.study(sweep.spec.cells[0]).ask(sweep.spec.cells[0].search_space.distributions)
    study = run_sweep(sweep.spec, workers=1)
    assert states(study) == ["COMPLETE"] * 6
    assert lost.params in [t.params for t in study.trials if t.state == TrialState.COMPLETE]


def test_a_queued_point_survives_a_worker_that_died_before_it_had_its_values():
    """Popped from the queue, without its parameters yet: the queue's point comes back."""
    sweep = Sweep.create(spec())
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])
    trial = study.get_trials(deepcopy=False)[0]
    sweep.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    sweep.storage.set_trial_user_attr(trial._trial_id, "worker", f"{socket.gethostname()}:{gone()}")
    for _ in range(2):  # two that find the same dead worker queue its trial once
        TrialQueue(sweep, sweep.spec.cells[0]).reclaim()
    again = study.get_trials(deepcopy=False)
    assert [t.state.name for t in again] == ["FAIL", "WAITING"]
    assert again[1].system_attrs["fixed_params"] == {"hparams.lr": 6e-3}
    assert again[1].user_attrs["deaths"] == 1 and "worker" not in again[1].user_attrs


def gone():
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as dead:
        return dead.pid


def take_everything(queue, start):
    """A worker that only takes: the numbers of the trials it got."""
    sweep = Sweep.open("tiny")
    ours = TrialQueue(sweep, sweep.spec.cells[0], salt=str(os.getpid()))
    start.wait()
    taken = []
    while True:
        with ours.turn():
            trial = ours.ask() if ours.left else None
        if trial is None:
            break
        taken.append(trial.number)
    queue.put(taken)


def test_no_trial_is_taken_twice():
    """Three processes take from one SQLite study at once; it has no row locks: they take turns."""
    fill(Sweep.create(spec(study={"trials": 60})))
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Barrier(3)
    workers = [context.Process(target=take_everything, args=(queue, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    numbers = [n for part in taken for n in part]
    assert sorted(numbers) == list(range(60))
    assert sum(map(bool, taken)) >= 2


def test_what_two_machines_queue_at_the_same_moment_is_tried_once():
    sweep = Sweep.create(spec())
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])
    study.enqueue_trial({"hparams.lr": 6e-3})  # the other machine had not seen ours
    done = run_sweep(sweep.spec, workers=1)
    values = [t.params["hparams.lr"] for t in done.trials if t.state == TrialState.COMPLETE]
    assert len(values) == len(set(values)) == 6


def test_two_workers_never_overshoot():
    sweep = Sweep.create(spec())
    fill(sweep)
    fill(sweep)
    study = sweep.study(sweep.spec.cells[0])
    for _ in range(9):  # more is begun elsewhere than the budget has
        study.enqueue_trial({})
    work(sweep)
    assert states(study) == ["COMPLETE"] * 6


def test_divergence_is_a_finite_penalty_and_a_constraint():
    raw = {"space": {"hparams.lr": {"values": [6e-3, 1e30]}}, "study": {"sampler": "random"}}
    study = run_sweep(parse_spec({**RAW, **raw, "name": "nan"}, "x"), workers=1)
    wild = [t for t in study.trials if t.params["hparams.lr"] > 1]
    assert wild and all(t.state == TrialState.COMPLETE for t in wild)
    assert {t.value for t in wild} == {math.log(257) + 1}
    assert all(t.constraints == {"diverged": 1.0} for t in wild)
    assert all(t.constraints == {"diverged": 0.0} for t in study.trials if t not in wild)
    assert best_hparams(study).config.hparams.lr == 6e-3


def test_a_sweep_is_repeatable(tmp_path, monkeypatch):
    """One worker, the same spec, another folder: the same trials with the same values."""
    trials = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Path("text.txt").write_bytes((tmp_path / "text.txt").read_bytes())
        study = run_sweep(spec(), workers=1)
        trials.append([(t.params, t.value) for t in study.trials])
    assert trials[0] == trials[1]


def assert_paired_gain(study, best):
    """The run as it stands, trained on the winner's own fresh seeds, against the winner."""
    fresh = study.user_attrs["confirmed"]
    stood, won = (fresh[json.dumps({"hparams.lr": lr})] for lr in (6e-3, best.config.hparams.lr))
    gains = [a - b for a, b in zip(stood, won, strict=True)]
    mean, half = best.gain
    assert mean == pytest.approx(statistics.fmean(gains))
    assert half == pytest.approx(4.302653 * statistics.stdev(gains) / 3**0.5)  # t, 2 degrees
    assert ("no more than the noise" in str(best)) == (mean <= half)


def test_a_diverged_confirmation_is_a_penalty():
    raw = {"space": {"hparams.lr": {"values": [6e-3, 5e-3]}}, "study": {"sampler": "random"}}
    study = run_sweep(parse_spec({**RAW, **raw, "name": "confirm"}, "x"), workers=1)
    real = Population.evaluate

    def broken(self, *members):
        return {k: math.nan if k == 0 else loss for k, loss in real(self, *members).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Population, "evaluate", broken)
        best = best_hparams(study, top=2, seeds=2)
    assert math.isfinite(best.loss) and best.loss < math.log(257)


def test_a_trial_that_was_taken_meanwhile_is_left_alone(monkeypatch, caplog):
    """Its heartbeats came too late: it is somebody else's now, and the worker goes on."""
    sweep = Sweep.create(spec(study={"rungs": 1, "reduction": 2}))
    fill(sweep)
    original = Population.evaluate

    def evaluate(self, members):
        study = sweep.study(sweep.spec.cells[0])
        running = [t for t in study.trials if t.state == TrialState.RUNNING]
        sweep.storage.set_trial_state_values(running[0]._trial_id, TrialState.FAIL)
        study.enqueue_trial(running[0].params)
        monkeypatch.setattr(Population, "evaluate", original)
        return original(self, members)

    monkeypatch.setattr(Population, "evaluate", evaluate)
    work(sweep)
    assert "was given to another worker meanwhile" in caplog.text
    ended = states(sweep.study(sweep.spec.cells[0]))
    assert len(ended) == 6 and set(ended) <= {"COMPLETE", "PRUNED"}


def test_halving_stops_the_worse_and_counts_them():
    raw = {"study": {"trials": 9, "seeds": [0], "rungs": 1, "reduction": 3, "sampler": "qmc"}}
    study = run_sweep(spec(**raw), workers=1)
    by_state = {s: [t for t in study.trials if t.state == s] for s in TrialState}
    assert len(by_state[TrialState.COMPLETE]) + len(by_state[TrialState.PRUNED]) == 9
    assert by_state[TrialState.PRUNED]
    rung = {t.number: t.intermediate_values[4] for t in study.trials}
    survived = [rung[t.number] for t in by_state[TrialState.COMPLETE]]
    stopped = [rung[t.number] for t in by_state[TrialState.PRUNED]]
    assert max(survived) < min(stopped)
    assert len(survived) == 3


def test_a_trial_is_in_hand_from_its_ask_to_its_end(monkeypatch):
    """What heartbeats cover: also while others are asked for, which may take a sampler long."""
    seen, ask, beating = [], optuna.Study.ask, worker_module._heartbeat

    def heartbeat(storage, in_hand):
        seen.append(in_hand)
        return beating(storage, in_hand)

    def asked(study, *args):
        trial = ask(study, *args)
        covered.append([t.number for t in seen[-1]()])
        return trial

    covered = []
    monkeypatch.setattr(worker_module, "_heartbeat", heartbeat)
    monkeypatch.setattr(optuna.Study, "ask", asked)
    run_sweep(spec(study={"trials": 4}), workers=1)
    assert covered == [[], [0], [0, 1], [0, 1, 2]]
    assert seen[-1]() == []


def test_free_places_are_taken_by_the_next_trials(monkeypatch):
    """A population stays full while there is work, and each trial is the run it would be alone."""
    sizes = []
    original = Population.train

    def train(self, until):
        sizes.append(len(self.members))
        return original(self, until)

    monkeypatch.setattr(Population, "train", train)
    sweep = Sweep.create(spec(study={"trials": 15, "rungs": 1, "reduction": 2, "members": 6}))
    study = run_sweep(sweep.spec, workers=1)
    monkeypatch.setattr(Population, "train", original)
    assert len(states(study)) == 15 and states(study).count("PRUNED") >= 5
    last_full = len(sizes) - sizes[::-1].index(6)
    assert set(sizes[:last_full]) == {6} and last_full > 12  # more than one run's steps
    cell = sweep.spec.cells[0]
    ended = [t for t in study.trials if t.state == TrialState.COMPLETE]
    for trial in ended:
        alone = [cell.config(trial.params, seed) for seed in (0, 1)]
        population = Population(alone, load_corpus(alone[0].data))
        population.train()
        assert trial.user_attrs["losses"] == pytest.approx(list(population.evaluate().values()))
    assert any(t.number >= 3 for t in ended)  # one that began in another's place


@pytest.mark.parametrize("sampler", ["tpe", "gp", "carbs", "qmc", "random"])
def test_every_sampler_fills_the_space(sampler):
    """No point is drawn twice, over several populations and a second session."""
    search = {"sampler": sampler, "seeds": [0], "members": 4}
    run_sweep(spec(study={**search, "trials": 7}), workers=1)
    study = run_sweep(spec(study={**search, "trials": 12}), workers=1)
    values = [t.params["hparams.lr"] for t in study.trials]
    assert len(set(values)) == 12
    assert min(values) < 1e-3 and max(values) > 1e-2
    assert type(make_sampler(spec(study={"sampler": sampler}).study)).__name__.lower() in (
        f"{sampler}sampler"
    )


def test_the_grid_starts_at_the_run_and_reaches_two_points_beyond_each_lowest():
    raw = {
        "study": {"sampler": "grid", "trials": 20},
        "space": {"hparams.lr": {"low": 1e-6, "high": 10.0, "log": True, "points": 3, "ratio": 3}},
        "train": {"hparams": {"lr": 2e-4}},
    }
    study = run_sweep(spec(**raw), workers=1)
    points = sorted((t.params["hparams.lr"], t.user_attrs["losses"]) for t in study.trials)
    for (a, _), (b, _) in itertools.pairwise(points):
        assert b / a == pytest.approx(3.0)
    for seed in range(2):
        losses = [y[seed] for _, y in points]
        lowest = losses.index(min(losses))
        assert 2 <= lowest <= len(losses) - 3


def test_extension_by_hand():
    space = SearchSpace({"hparams.lr": Dimension(low=1e-3, high=64.0, log=True)})
    curve = {1.0: [3.0, 1.0], 2.0: [2.0, 2.0], 4.0: [1.0, 3.0]}
    new = [p["hparams.lr"] for p in space.extension(curve)]
    assert sorted(new) == [0.25, 0.5, 8.0, 16.0]
    bounded = SearchSpace({"hparams.lr": Dimension(low=0.4, high=9.0, log=True)})
    assert sorted(p["hparams.lr"] for p in bounded.extension(curve)) == [0.5, 8.0]
    inside = {x: [abs(math.log2(x))] for x in (0.25, 0.5, 1.0, 2.0, 4.0)}
    assert space.extension(inside) == []


def test_the_winner_is_confirmed_on_fresh_seeds_once(monkeypatch):
    study = run_sweep(spec(), workers=1)
    best = best_hparams(study, top=2, seeds=3)
    fresh = study.user_attrs["confirmed"]
    # The top two, the winner's half and double, and the run as it stands.
    assert all(len(losses) == 3 for losses in fresh.values()) and len(fresh) == 5
    top = [t.params for t in sorted(study.trials, key=lambda t: t.value)[:2]]
    means = [statistics.fmean(fresh[json.dumps(params)]) for params in top]
    assert best.loss == pytest.approx(min(means))
    assert best.spread > 0
    monkeypatch.setattr("mupgpt.tuning.best.Population", None)  # asking again trains nothing
    assert best_hparams(study, top=2, seeds=3) == best
    assert_paired_gain(study, best)


def test_importances_find_the_planted_one():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with pytest.raises(ConfigError, match="has 0 finished trials: importances need 20"):
        importances(study)

    def planted(trial):
        return trial.suggest_float("a", -1, 1) ** 2 + 0.01 * trial.suggest_float("b", -1, 1)

    study.optimize(planted, n_trials=200)
    shares = importances(study)
    assert sum(shares.values()) == pytest.approx(1) and shares["a"] > 0.9


def test_an_optimum_at_the_edge_is_said():
    raw = {"space": {"hparams.lr": {"low": 1e-5, "high": 6.1e-3, "log": True}}}
    best = best_hparams(run_sweep(spec(**raw, name="edge"), workers=1))
    assert best.edges == {"hparams.lr": "high"}
    assert "lies at the high edge of its range: widen the space" in str(best)
    d = Dimension(low=1.0, high=16.0, log=True)
    assert [d.at_edge(x) for x in (1.1, 4.0, 15.0)] == ["low", "", "high"]


def test_a_study_of_another_spec_is_refused_and_nothing_lost():
    run_sweep(spec(), workers=1)
    with pytest.raises(ConfigError, match=r"another spec \(train.steps: 12 there, 13 here\)"):
        run_sweep(spec(train={"steps": 13}), workers=1)
    Path("text.txt").write_text("another text " * 500)
    load_corpus.cache_clear()
    with pytest.raises(ConfigError, match="was run on another corpus"):
        run_sweep(spec(), workers=1)
    assert states(Sweep.open("tiny").studies()["tiny"]) == ["COMPLETE"] * 6


def test_the_difference_is_named_past_what_decides_nothing():
    """Budget and group size differ too, and are not what is refused."""
    run_sweep(spec(study={"trials": 2}), workers=1)
    changed = spec(study={"trials": 3, "members": 4, "heartbeat": 5, "sampler": "qmc"})
    with pytest.raises(ConfigError, match=r"study\.sampler: 'tpe' there, 'qmc' here"):
        run_sweep(changed, workers=1)
    with pytest.raises(ConfigError, match=r"\(train\.steps: 12 there, 13 here\)"):
        run_sweep(spec(study={"trials": 3}, train={"steps": 13}), workers=1)


def test_the_old_name_of_the_group_size_is_understood():
    """In files, and in the studies of 0.1.0, which had it with its default."""
    old, new = spec(study={"columns": 6}), spec(study={"members": 6})
    assert old == new and old.identity == new.identity == spec().identity
    sweep = Sweep.create(spec(study={"trials": 2}))
    study = sweep.study(sweep.spec.cells[0])
    stored = study.user_attrs["spec"]
    del stored["study"]["members"]
    study.set_user_attr("spec", {**stored, "study": {**stored["study"], "columns": 6}})
    assert Sweep.open("tiny").spec.study.members == 6
    with pytest.raises(ConfigError, match=r"study.columns = 6: is study.members by now"):
        spec(study={"columns": 6, "members": 6})


def test_structure_makes_a_study_each():
    raw = {"structure": {"rule": ["mup", "sp"], "model": {"d_model": [16, 32]}},
           "study": {"trials": 2}}  # fmt: skip
    studies = run_sweep(spec(**raw), workers=1)
    assert list(studies) == [
        f"tiny/rule={r}/model.d_model={d}" for r in ("mup", "sp") for d in (16, 32)
    ]
    assert all(states(s) == ["COMPLETE"] * 2 for s in studies.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"hparams.lrr": {"low": 1, "high": 2}}}, "did you mean 'hparams.lr'"),
        ({"space": {"model.d_model": {"low": 1, "high": 2}}}, r"what changes shapes is \[struct"),
        ({"space": {"hparams.lr": {"low": 2, "high": 1}}}, "a range needs low < high"),
        ({"space": {"hparams.lr": {"lo": 2, "high": 1}}}, "did you mean 'space.hparams.lr.low'"),
        ({"study": {"sampler": "bayes"}}, "unknown value of study.sampler 'bayes'"),
        ({"study": {"trials": 0}}, "study.trials = 0: must be > 0"),
        ({"study": {"sampler": "grid", "rungs": 1}}, "study.rungs = 1: must be 0 for a grid"),
        ({"study": {"rungs": 5}}, "study.rungs = 5: must leave .* below 12 steps"),
        ({"name": "../up"}, "name = '../up': must be letters"),
        ({"structure": {"model": [5]}}, "model = 5: must be a preset's name"),
        (
            {
                "study": {"sampler": "grid"},
                "space": {"hparams.lr": {"low": 1, "high": 2, "log": True}},
            },
            "fewer than three grid points around the run's own values",
        ),
        ({"study": {"seeds": []}}, "study.seeds"),
        ({"train": {"stepz": 5}}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"train": {"rule": "mupp"}}, "did you mean 'mup'"),
        ({"train": {"seed": 3}}, "a sweep's seeds are study.seeds"),
        ({"structure": {"rule": "mup"}}, "expected a list of values"),
        ({"structure": {"model.d_modl": [3]}}, "did you mean 'model.d_model'"),
        (
            {"space": {"hparams.lr": {"min": 1e-4, "max": 1e-1}}},
            r"space.hparams.lr = .* must be a range { low = …, high = … } or { values",
        ),
        ({"space": {"hparams.lr": 1e-3}}, "space.hparams.lr = 0.001: must be a range { low"),
        ({"space": {"hparams.lr": {"values": [1e-3, 2e-3, 1e-3]}}}, "name each value once"),
        (
            {"space": {"hparams.lr": {"values": [1e-3, 2e-3], "low": 1e-4}}},
            "space.hparams.lr.low = 0.0001: must be left out beside values",
        ),
        ({"space": {"hparams.lr": {"values": [math.nan]}}}, r"lr\.values\[0\] = nan: .* a number"),
        (
            {"space": {"hparams.lr": {"low": 1, "high": 1e300}}},
            r"space.hparams.lr.high = .* <= 1e\+30",
        ),
        ({"structure": {"model.d_model": [32, 32]}}, r"d_model = \[32, 32\]: .* each value once"),
        ({"structure": {"steps": [12, 12.0]}}, r"structure.steps = .* each value once"),
        (
            {"structure": {"steps": list(range(6, 300)), "batch_size": list(range(1, 300))}},
            "'87,906 studies': must make at most 10,000",
        ),
        ({"study": {"seeds": [0, -1]}}, r"study.seeds\[1\] = -1: must be >= 0"),
        ({"study": {"sampler_seed": 2**32}}, "study.sampler_seed = 4294967296: must be <="),
        ({"study": {"rungs": 10**9}}, "study.rungs = 1000000000: must be <= 30"),
        (
            {"study": {"sampler": "grid"}, "space": {"hparams.lr": {"points": 10**9}}},
            "points = 1000000000: must be <= 1,000",
        ),
    ],
)
def test_a_typo_in_a_spec_is_named(change, message):
    raw = overlay({**RAW, "space": {}} if "space" in change else RAW, change)
    with pytest.raises(ConfigError, match=message):
        parse_spec(raw, "tiny.toml")


IGNORED = {
    "memory": "lean", "parallel.compile": True, "parallel.tensor": 2,
    "parallel.checkpointing": "full", "tracking.eval_every": 3, "tracking.wandb": "off",
    "prediction.source": "a law",
}  # fmt: skip


@pytest.mark.parametrize("key", IGNORED)
def test_what_a_sweep_would_ignore_is_refused_by_name(key):
    """But a stored sweep opens: its trials are what they would be without."""
    raw = put({"model": {"n_head": 2}}, key, IGNORED[key])
    with pytest.raises(ConfigError, match=rf"^tiny.toml: {key} = .* must be left out: a sweep"):
        spec(train=raw)
    assert parse_spec(overlay(RAW, {"train": raw}), "tiny.toml", stored=True).name == "tiny"


def test_what_a_population_honours_is_no_mistake():
    honoured = {"accumulate": 2, "precision": "fp64", "memory": "exact",
                "parallel": {"checkpointing": "none"}}  # fmt: skip
    assert spec(train=honoured).cells[0].config().accumulate == 2


def test_a_changed_spec_names_the_key_that_differs_and_both_values():
    """Budgets differ freely, and a key that an older version did not know is at its default."""
    old, new = spec().to_dict(), spec(study={"trials": 9, "heartbeat": 3}).to_dict()
    del old["study"]["each"]
    assert differences(old, new) == []
    changed = spec(study={"trials": 9, "sampler": "gp"}, space={"hparams.lr": {"low": 2e-4}})
    assert differences(old, changed.to_dict()) == [
        "study.sampler: 'tpe' there, 'gp' here",
        "space.hparams.lr.low: 0.0001 there, 0.0002 here",
    ]
    moved = spec(train={"hparams": {"lr": 0.01}}).to_dict()
    assert differences(old, moved) == ["train.hparams.lr: not set there, 0.01 here"]


@pytest.mark.parametrize("name", sorted(bundled("sweeps").keys() - {"ladder", "ladder-long"}))
def test_every_shipped_sweep_resolves(name):
    loaded = load_spec(name)
    assert loaded.name == name
    assert loaded.cells[0].config(dict(loaded.cells[0].center()))


def test_put_keeps_a_preset():
    assert put({"model": "proxy-64"}, "model.d_model", 3) == {
        "model": {"preset": "proxy-64", "d_model": 3}
    }


def test_rungs():
    assert rung_steps(spec(study={"rungs": 2, "reduction": 2}).study, 100) == [25, 50]
    assert rung_steps(spec().study, 100) == []


def test_optuna_lists_our_studies():
    run_sweep(spec(), workers=1)
    url = "sqlite:///runs/sweeps/tiny/study.db"
    command = [str(Path(sys.executable).parent / "optuna"), "trials", "--study-name", "tiny"]
    out = subprocess.run(
        [*command, "--storage", url, "-f", "json"], capture_output=True, text=True, check=True
    ).stdout
    assert [row["state"] for row in json.loads(out)] == ["COMPLETE"] * 6


def test_two_processes_make_the_tables_of_a_new_database(monkeypatch):
    """The second one finds them half made, and waits for the first; any other error is said."""
    make, tried = BaseModel.metadata.create_all, []

    def create_all(*args, **kwargs):
        tried.append(len(tried))
        if len(tried) == 1:  # as if the other had been a moment quicker
            make(*args, **kwargs)
            raise OperationalError("CREATE TABLE", {}, Exception("table studies already exists"))
        make(*args, **kwargs)

    monkeypatch.setattr(BaseModel.metadata, "create_all", create_all)
    assert states(run_sweep(spec(), workers=1)) == ["COMPLETE"] * 6
    assert len(tried) >= 2


def test_journal_storage_is_accepted():
    study = run_sweep(spec(), workers=1, storage="journal:study.journal")
    assert states(study) == ["COMPLETE"] * 6
    with pytest.raises(ConfigError, match="cannot read journal"):
        run_sweep(spec(), workers=1, storage="journal:/nope/x")
    with pytest.raises(ConfigError, match=r"no sweep 'tiny': there is no file typo\.db"):
        Sweep.open("tiny", "sqlite:///typo.db")
    with pytest.raises(ConfigError, match="cannot open storage 'nosuch://x'"):
        run_sweep(spec(), workers=1, storage="nosuch://x")


SLOW = overlay(
    RAW, {"study": {"trials": 24, "seeds": [0]}, "train": {"steps": 40, "batch_size": 256}}
)  # two columns a population: from the first that ends on, some are complete and some in hand
RUN = [sys.executable, "-m", "mupgpt", "sweep", "run", "tiny.toml", "--workers", "2"]


def count(state):
    """How many trials of the study are in ``state``; none where there is no study yet."""
    try:
        return states(Sweep.open("tiny").studies()["tiny"]).count(state)
    except (ConfigError, KeyError):
        return 0


def holders():
    """Process ids of the workers that hold a trial."""
    try:
        trials = Sweep.open("tiny").studies()["tiny"].trials
    except (ConfigError, KeyError):
        return set()
    held = (t.user_attrs.get("worker") for t in trials if t.state == TrialState.RUNNING)
    return {int(worker.split(":")[1]) for worker in held if worker}


def wait_until(condition, child):
    """Poll until ``condition()``, as long as the sweep is running."""
    while not condition():
        if child.poll() is not None:
            said = child.stderr.read() if child.stderr else ""
            pytest.fail(f"the sweep ended before the moment came (exit {child.returncode}): {said}")
        time.sleep(0.2)


def test_an_interrupt_in_the_middle_of_an_ask_loses_nothing(monkeypatch):
    """The signal comes while Optuna is popping a trial, at the very worst moment."""
    sweep = Sweep.create(spec())
    fill(sweep)
    ask, sent = optuna.Study.ask, []

    def interrupted(study, *args):
        trial = ask(study, *args)
        if not sent:  # a second signal would act at once
            os.kill(os.getpid(), signal.SIGINT)
        sent.append(trial.number)
        return trial

    monkeypatch.setattr(optuna.Study, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(sweep)
    counts = sweep.counts()
    assert counts[TrialState.WAITING] == len(sent) and not counts[TrialState.RUNNING]
    assert states(run_sweep(sweep.spec, workers=1)) == ["COMPLETE"] * 6


@pytest.mark.slow
def test_ctrl_c_gives_back_and_says_so(tmp_path):
    """One SIGINT to the parent: workers put their trials back; the same command ends the budget."""
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(SLOW))
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored below a script's `&`
    with subprocess.Popen(RUN, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as child:
        wait_until(lambda: count("RUNNING") and count("COMPLETE"), child)
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1]
    assert child.returncode == 130 and "the same command continues" in said
    assert "Traceback" not in said
    assert 0 < count("COMPLETE") < 24 and not count("RUNNING")
    subprocess.run(RUN, check=True, capture_output=True)
    assert count("COMPLETE") == 24


@pytest.mark.slow
def test_kill_9_of_everything_loses_nothing_that_finished(tmp_path):
    """Parent and workers killed twice; the same command ends at exactly the budget."""
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(SLOW))
    finished = {}
    for enough in (1, 12):
        with subprocess.Popen(RUN, stderr=subprocess.DEVNULL) as child:
            wait_until(lambda n=enough: holders() and count("COMPLETE") >= n, child)
            workers = holders()
            for pid in (child.pid, *workers):
                os.kill(pid, signal.SIGKILL)
        study = Sweep.open("tiny").studies()["tiny"]
        before = {t.number: t.value for t in study.trials if t.state == TrialState.COMPLETE}
        assert workers and finished.items() <= before.items()
        finished = before
    subprocess.run(RUN, check=True, capture_output=True)
    study = Sweep.open("tiny").studies()["tiny"]
    assert states(study) == ["COMPLETE"] * 24
    after = {t.number: t.value for t in study.trials if t.state == TrialState.COMPLETE}
    assert finished.items() <= after.items()
