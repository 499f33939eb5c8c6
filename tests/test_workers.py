"""Who works on a sweep: one worker a device, samplers of one's own; and no password is repeated."""

import logging
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from test_tuning import RAW, spec, states

from mupgpt.errors import ConfigError
from mupgpt.resolve import overlay
from mupgpt.training.device import visible_gpus
from mupgpt.training.population import Population
from mupgpt.tuning import run as run_module
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import parse_spec
from mupgpt.tuning.study import Sweep
from mupgpt.tuning.trial_queue import fill
from mupgpt.tuning.urls import STORAGE, shown, unsaid
from mupgpt.tuning.worker import Seat, Worker, work
from mupgpt.util.stopping import Stop

SECRET = "hunter2%40x"  # as a URL writes hunter2@x


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def two_values(**study):
    """A sweep that can only repeat itself."""
    raw = {**RAW, "name": "two", "space": {"hparams.lr": {"values": [6e-3, 2e-3]}}}
    return parse_spec(overlay(raw, {"study": {"sampler": "random", **study}}), "two.toml")


@pytest.fixture
def begun(monkeypatch):
    """The learning rate and seed of every run that was really begun."""
    runs, begin, replace = [], Population.__init__, Population.replace

    def noted(configs):
        runs.extend((c.hparams.lr, c.seed) for c in configs)
        return configs

    monkeypatch.setattr(
        Population, "__init__", lambda self, configs, corpus: begin(self, noted(configs), corpus)
    )
    monkeypatch.setattr(
        Population, "replace", lambda self, m, configs: replace(self, m, noted(configs))
    )
    return runs


@pytest.mark.parametrize("members", [4, 40])
def test_what_is_known_is_not_trained_again(begun, members):
    """Ten trials with two values: in groups of two, or all in hand at once."""
    study = run_sweep(two_values(trials=10, members=members), workers=1)
    assert states(study) == ["COMPLETE"] * 10
    assert sorted(begun) == [(2e-3, 0), (2e-3, 1), (6e-3, 0), (6e-3, 1)]
    copies = [t for t in study.trials if "copied_from" in t.user_attrs]
    assert len(copies) == 8
    for copy in copies:
        twin = study.trials[copy.user_attrs["copied_from"]]
        assert "copied_from" not in twin.user_attrs and twin.number < copy.number
        assert (copy.params, copy.value, copy.constraints) == (
            twin.params, twin.value, twin.constraints)  # fmt: skip
        for key in ("losses", "diverged", "seconds"):
            assert copy.user_attrs[key] == twin.user_attrs[key]


def test_a_copy_is_what_training_it_again_would_give(begun):
    """Bit for bit, in another population."""
    study = run_sweep(two_values(trials=6), workers=1)
    copy = next(t for t in study.trials if "copied_from" in t.user_attrs)
    sweep = Sweep.open("two")
    config = [sweep.spec.cells[0].config(copy.params, seed) for seed in (0, 1)]
    population = Population(config, run_module.load_corpus(config[0].data))
    population.train()
    assert list(population.evaluate().values()) == pytest.approx(
        copy.user_attrs["losses"], rel=1e-6
    )


def test_who_is_stopped_early_takes_its_copies_along(begun):
    study = run_sweep(two_values(trials=8, rungs=1, reduction=2), workers=1)
    assert len(begun) == 4
    by_value = {
        lr: [t for t in study.trials if t.params["hparams.lr"] == lr] for lr in (6e-3, 2e-3)
    }
    for same in by_value.values():
        assert len({t.state for t in same}) == 1
        assert len({tuple(t.intermediate_values.items()) for t in same}) == 1
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_copy_whose_twin_was_taken_away_is_trained(monkeypatch, begun):
    """Both were in hand here; the first is another worker's now, whose retry comes later."""
    sweep = Sweep.create(two_values(trials=3))
    fill(sweep)
    (cell,) = sweep.spec.cells
    evaluate, taken = Population.evaluate, []

    def lost(self, members):
        running = [t for t in sweep.study(cell).trials if t.state == TrialState.RUNNING]
        if not taken:
            taken.append(running[0].number)
            sweep.storage.set_trial_state_values(running[0]._trial_id, TrialState.FAIL)
        return evaluate(self, members)

    monkeypatch.setattr(Population, "evaluate", lost)
    work(sweep)
    study = sweep.study(cell)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[taken[0]].state == TrialState.FAIL


def test_the_best_are_told_apart_from_their_copies(begun):
    """Three that compete are three points, and none is confirmed twice."""
    study = run_sweep(two_values(trials=10), workers=1)
    begun.clear()
    best_hparams(study, top=3, seeds=2)
    assert len(begun) == len(set(begun)) == 4


def test_an_interrupt_gives_back_who_waits_for_a_twin():
    sweep = Sweep.create(two_values(trials=10))
    fill(sweep)
    (cell,) = sweep.spec.cells

    def all_in_hand():
        return states(sweep.study(cell)).count("RUNNING") == 10

    with pytest.raises(KeyboardInterrupt):
        work(sweep, when=all_in_hand)
    assert states(sweep.study(cell)) == ["WAITING"] * 10
    assert states(run_sweep(sweep.spec, workers=1)) == ["COMPLETE"] * 10


@pytest.fixture
def started(monkeypatch):
    """What would be started: commands with their environments."""
    children = []

    class Child:
        returncode = 0

        def __init__(self, command, env, **_):
            children.append((command, env))

        def poll(self):
            return 0

    monkeypatch.setattr(run_module.subprocess, "Popen", Child)
    return children


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, as far as counting goes."""

    def have(count, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


@pytest.mark.parametrize(
    ("count", "visible", "found"),
    [(0, None, []), (3, None, ["0", "1", "2"]), (2, "5,7", ["5", "7"]), (1, "GPU-a1", ["GPU-a1"]),
     (0, "", []), (1, "4,-1,6", ["4"])],
)  # fmt: skip
def test_one_entry_a_visible_gpu(gpus, count, visible, found):
    gpus(count, visible)
    assert visible_gpus() == found


def test_one_worker_a_gpu_each_given_its_own(gpus, started):
    gpus(2, "5,7")
    run_sweep(spec())
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["5", "7"]
    assert [command[3:] for command, _ in started] == [
        ["tiny", "0", "2", "1"], ["tiny", "1", "2", "1"]]  # fmt: skip


def test_more_workers_than_gpus_share_them(gpus, started):
    gpus(2)
    run_sweep(spec(), workers=3)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["0", "1", "0"]
    assert {command[-1] for command, _ in started} == {"2"}


def test_on_a_cpu_one_worker_a_core_that_is_ours(gpus, started, monkeypatch):
    gpus(0)
    monkeypatch.setattr(run_module, "cores", lambda: 3)
    run_sweep(spec())
    assert [command[3:] for command, _ in started] == [["tiny", str(i), "3", "3"] for i in range(3)]
    assert all("CUDA_VISIBLE_DEVICES" not in env for _, env in started)


def test_memory_is_shared_by_those_on_one_device(monkeypatch):
    shares = []
    monkeypatch.setattr(
        "mupgpt.tuning.worker.members_for",
        lambda cell, work, sharing, check: shares.append((work, sharing)) or 12,
    )
    sweep = Sweep.create(spec())
    fill(sweep)
    Worker(sweep, Stop(), Seat(0, 4, 2)).run()
    assert shares == [(6 * 2 * 12 / 4, 2)]  # trials × seeds × steps over the workers


def test_a_sampler_of_ones_own():
    seeds = []

    def own(seed):
        seeds.append(seed)
        return RandomSampler(seed=7)

    study = run_sweep(spec(), workers=1, sampler=own)
    alone = optuna.create_study(sampler=RandomSampler(seed=7))
    space = Sweep.open("tiny").spec.cells[0].search_space.distributions
    expected = [alone.ask(space).params for _ in range(5)]
    assert [t.params for t in study.trials[1:]] == expected and seeds
    assert study.user_attrs["sampler"].endswith(":test_a_sampler_of_ones_own.<locals>.own")
    run_sweep(spec(), workers=1)  # whose own it was decides no trial's result


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 2, "sampler": lambda seed: RandomSampler(seed)}, "or set workers = 1"),
        (
            {"workers": 1, "sampler": "nowhere:f"},
            "name an importable function as 'module:function'",
        ),
        ({"workers": 1, "sampler": "optuna"}, "name an importable function"),
        ({"workers": 1, "sampler": int}, "it must return an optuna.samplers.BaseSampler"),
    ],
)
def test_a_sampler_that_cannot_be_used_is_refused_at_once(options, said):
    with pytest.raises(ConfigError, match=said):
        run_sweep(spec(), **options)
    assert not Path("runs").exists()


def test_a_grid_takes_no_sampler():
    with pytest.raises(ConfigError, match="a grid has its points"):
        run_sweep(spec(study={"sampler": "grid"}), workers=1, sampler=RandomSampler)


@pytest.mark.slow
def test_several_workers_import_a_sampler_by_name(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_sampler.py").write_text(
        "from optuna.samplers import RandomSampler\n"
        "def edge(seed):\n"
        "    class Edge(RandomSampler):\n"
        "        def sample_independent(self, *_):\n"
        "            return 0.1\n"
        "    return Edge(seed)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    study = run_sweep(spec(), workers=2, sampler="my_sampler:edge")
    assert states(study) == ["COMPLETE"] * 6
    assert {t.params["hparams.lr"] for t in study.trials} == {6e-3, 0.1}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"postgresql+psycopg://me:{SECRET}@there:5/x", "postgresql+psycopg://me:***@there:5/x"),
        (f"postgresql://me@there/x?password={SECRET}", "postgresql://me@there/x?password=***"),
        ("postgresql://me:hunter2@x@there/x", "postgresql://***"),
        ("postgresql://me:hunter2@there:x/x", "postgresql://***"),
        ("postgresql://me@there/x", "postgresql://me@there/x"),
        ("sqlite:///runs/x.db", "sqlite:///runs/x.db"),
        ("journal:a@b.log", "journal:a@b.log"),
    ],
)
def test_a_url_is_shown_without_its_password(url, said):
    assert shown(url) == said
    secret = " hunter2@x, hunter2%40x," if "hunter2" in url else ""
    assert "hunter2" not in unsaid(f"cannot open {url}:{secret} it is wrong", url)


@pytest.mark.parametrize("url", [
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://me@127.0.0.1:1/x?password={SECRET}",
    "nosuch://me:hunter2@x@127.0.0.1/x",
    "sqlite://me:hunter2@x/y",
])  # fmt: skip
def test_no_error_repeats_a_password(url, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError, match="cannot open storage") as refused:
        run_sweep(spec(), workers=1, storage=url)
    chain = [refused.value, refused.value.__cause__]
    said = [*map(str, chain), repr(Sweep(spec(), url)), *capsys.readouterr(), caplog.text]
    assert "hunter2" not in "".join(said)


def test_workers_hear_of_the_storage_in_their_environment(started):
    url = "sqlite:///elsewhere.db"
    run_sweep(spec(), workers=2, storage=url)
    assert len(started) == 2
    for command, env in started:
        assert env[STORAGE] == url and not any("elsewhere" in word for word in command)


def test_the_environment_names_a_storage(monkeypatch):
    monkeypatch.setenv(STORAGE, "sqlite:///named.db")
    run_sweep(spec(study={"trials": 1}), workers=1)
    assert Path("named.db").is_file() and not list(Path("runs").rglob("study.db"))
    assert len(Sweep.open("tiny").studies()["tiny"].trials) == 1


def test_optuna_stays_as_talkative_as_it_was():
    program = "import optuna, mupgpt.tuning.run; print(optuna.logging.get_verbosity())"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) == optuna.logging.INFO
