"""Somebody's finished sweep: its table becomes the studies that our own workers would have told."""

import csv
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import tomli_w
from optuna.trial import TrialState

from mupgpt.cli import run
from mupgpt.errors import ConfigError
from mupgpt.evidence.verdict import judge_sweep
from mupgpt.mutransfer.transfer import transfer
from mupgpt.resolve import overlay
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.foreign_tables import read_rows
from mupgpt.tuning.import_runs import UNKNOWN, import_sweep
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import parse_spec
from mupgpt.tuning.study import Sweep

RAW = {
    "name": "theirs",
    "study": {"sampler": "grid", "trials": 8, "seeds": [0, 1]},
    "train": {
        "model": {"n_layer": 1, "d_model": 16, "d_head": 8, "vocab_size": 257, "seq_len": 16},
        "base": {
            "d_model": 16,
            "d_ffn": 64,
            "n_head": 2,
            "d_head": 8,
            "n_kv_head": 2,
            "n_layer": 1,
        },
        "hparams": {"lr": 0.02},
        "rule": "mup",
        "steps": 12,
        "batch_size": 4,
        "data": {"source": "text.txt", "eval_tokens": 128},
    },
    "structure": {"model.d_model": [16, 32]},
    "space": {"hparams.lr": {"low": 1e-3, "high": 1.0, "log": True, "points": 3}},
}
LRS, WIDTHS, SEEDS = (0.01, 0.02, 0.04), (16, 32), (0, 1)


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def spec(**changes):
    return parse_spec(overlay(RAW, changes), "theirs.toml")


def planted(lr, width, seed):
    """A loss with its optimum at lr = 0.02, whatever the width."""
    return 3.0 + math.log2(lr / 0.02) ** 2 + 1 / width + 0.01 * seed


def rows(**names):
    """The planted sweep, a run a row; ``names`` renames its columns."""
    names = {"lr": "hparams.lr", "width": "model.d_model", "seed": "seed", "loss": "loss"} | names
    return [
        {names["lr"]: lr, names["width"]: w, names["seed"]: s, names["loss"]: planted(lr, w, s)}
        for lr, w, s in itertools.product(LRS, WIDTHS, SEEDS)
    ]


def write(records, name="runs.csv"):
    path = Path(name)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            columns = list(dict.fromkeys(key for r in records for key in r))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    else:
        path.write_text(json.dumps(records))
    return path


def told(sweep):
    """All that a reader of the studies sees, in an order that does not depend on the table's."""
    return {
        name: sorted(
            (
                sorted(t.params.items()),
                t.value,
                t.state.name,
                t.user_attrs["losses"],
                t.user_attrs["diverged"],
                t.user_attrs["queued"],
                t.constraints,
                sorted(map(str, t.distributions.items())),
            )
            for t in study.trials
        )
        for name, study in sweep.studies().items()
    }


def export(sweep, corpus=True):
    """Our own sweep as somebody would write it down: a run a row."""
    records = []
    for cell in sweep.spec.cells:
        study = sweep.study(cell)
        facts = {f"corpus.{k}": v for k, v in study.user_attrs["corpus"].items()}
        for trial, place in itertools.product(study.trials, range(len(SEEDS))):
            records.append(
                {**cell.values, **trial.params, "seed": SEEDS[place], "steps": 12,
                 "val/loss": trial.user_attrs["losses"][place], **(facts if corpus else {})}
            )  # fmt: skip
    return records


def test_a_sweep_of_ours_comes_back_as_it_was(tmp_path, monkeypatch):
    run_sweep(spec(), workers=1)
    ours = Sweep.open("theirs")
    table = write(export(ours)).resolve()
    study = ours.study(ours.spec.cells[1])
    verdict, best, before = judge_sweep(ours), best_hparams(study, top=2, seeds=1), told(ours)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text(Path("text.txt").read_text())
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = import_sweep(table, spec())
    theirs = found.sweep
    assert found.trials == found.new == sum(map(len, before.values()))
    assert found.notes == ()
    assert told(theirs) == before
    assert judge_sweep("theirs").to_dict() == verdict.to_dict()
    there = theirs.study(theirs.spec.cells[1])
    again = best_hparams(there, top=2, seeds=1)
    assert again.config == best.config and again.swept_loss == best.swept_loss
    assert again.loss == pytest.approx(best.loss, rel=1e-6)
    attrs = [set(s.trials[0].user_attrs) for s in (study, there)]
    assert attrs[0] - {"worker", "seconds"} == attrs[1] - {"imported"}


def test_of_text_that_is_not_here_nothing_is_confirmed_by_training():
    found = import_sweep(write(rows()), spec())
    study = found.sweep.study(found.sweep.spec.cells[0])
    assert study.user_attrs["corpus"] == UNKNOWN
    assert any("corpus is unknown" in line for line in found.notes)
    with pytest.raises(ConfigError, match=r"another corpus .* as they are \(seeds = 0\)"):
        best_hparams(study)
    best = best_hparams(study, seeds=0)
    assert best.config.hparams.lr == 0.02 and not best.confirmed
    assert best.loss == best.swept_loss == pytest.approx(3.0675)
    assert "not confirmed" in str(best)
    assert transfer(best, "proxy-64", ["vocabulary", "corpus"]).config.hparams.lr == 0.02
    with pytest.raises(ConfigError, match="run on another corpus"):
        run_sweep(spec(), workers=1)


def test_the_planted_optimum_is_judged():
    import_sweep(write(rows()), spec())
    verdict = judge_sweep("theirs")
    assert verdict.rules["mup"].shift == pytest.approx(0.0, abs=1e-9)
    assert verdict.corpus["name"] == "unknown" and "corpus unknown" in str(verdict)


def test_importing_again_changes_nothing_and_a_longer_table_adds():
    part = [r for r in rows() if r["hparams.lr"] != 0.04]
    first = import_sweep(write(part), spec())
    assert (first.trials, first.new) == (4, 4)
    before = told(first.sweep)
    again = import_sweep(write(part), spec())
    assert (again.trials, again.new) == (4, 0)
    assert told(again.sweep) == before
    longer = import_sweep(write(rows()), spec())
    assert (longer.trials, longer.new) == (6, 2)
    other = [{**r, "loss": r["loss"] + 1} for r in rows()]
    with pytest.raises(ConfigError, match=r"has hparams.lr = 0.01 with the losses"):
        import_sweep(write(other), spec())
    assert told(longer.sweep) == told(Sweep.open("theirs"))


NESTED = [
    {
        "state": "finished",
        "config": {"hparams": {"lr": r["hparams.lr"]}, "model": {"d_model": r["model.d_model"]},
                   "seed": r["seed"], "steps": 12, "rule": "mup"},
        "summary": {"val/loss": r["loss"], "train/loss": 0.0, "_runtime": 3},
    }
    for r in rows()
]  # fmt: skip
FORMS = {
    "flat.csv": rows(),
    "aliases.csv": rows(lr="Learning Rate", width="n_embd", loss="val_loss"),
    "prefixes.csv": rows(lr="config.lr", width="config.d_model", loss="summary.val_loss"),
    "optuna.csv": rows(lr="params_hparams.lr", width="user_attrs_width", loss="value"),
    "records.json": rows(),
    "nested.json": NESTED,
    "nested.jsonl": NESTED,
    "table.json": {"columns": list(rows()[0]), "data": [list(r.values()) for r in rows()]},
    "shuffled.csv": random.Random(0).sample(rows(), len(rows())),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_trials(name):
    expected = told(import_sweep(write(rows(), "plain.csv"), spec()).sweep)
    found = import_sweep(write(FORMS[name], name), spec(name="other"))
    assert {k.replace("other", "theirs"): v for k, v in told(found.sweep).items()} == expected


def test_columns_may_be_named_and_what_is_named_wins():
    table = [{**r, "loss": 0.0, "tail": r["loss"], "a, b=c": r["hparams.lr"]} for r in rows()]
    given = {"loss": "tail", "hparams.lr": "a, b=c"}
    found = import_sweep(write(table), spec(), given)
    assert found.columns["loss"] == "tail"
    assert told(found.sweep) == told(
        import_sweep(write(rows()), spec(), storage="sqlite:///o.db").sweep
    )


@pytest.mark.parametrize("loss", ["nan", "NaN", "inf", "Infinity", "99"])
def test_a_loss_that_is_not_finite_is_a_diverged_run(loss):
    table = rows()
    table[0]["loss"] = loss
    study = import_sweep(write(table), spec()).sweep.study(spec().cells[0])
    (trial,) = [t for t in study.trials if t.user_attrs["diverged"]]
    worst = math.log(257) + 1
    assert (trial.params, trial.value) == ({"hparams.lr": 0.01}, worst)
    assert trial.state == TrialState.COMPLETE and trial.constraints == {"diverged": 1.0}
    assert trial.user_attrs["losses"] == [worst, planted(0.01, 16, 1)]


def test_runs_that_did_not_finish_count_for_nothing_unless_they_diverged():
    extra = [
        {**rows()[0], "hparams.lr": 0.08, "State": state, "loss": loss}
        for state, loss in (("crashed", 3.0), ("running", ""), ("failed", ""))
    ]
    table = [{**r, "State": "finished"} for r in rows()] + extra
    found = import_sweep(write(table), spec())
    assert found.trials == 6
    assert found.notes[-1] == "3 rows count for nothing: their runs did not finish"
    table[0] |= {"State": "failed", "loss": "nan"}
    again = import_sweep(write(table), spec(name="other")).sweep
    assert sum(t.user_attrs["diverged"] for t in again.study(again.spec.cells[0]).trials) == 1


def test_a_study_without_a_row_stays_empty_aloud():
    found = import_sweep(write(rows()), spec(structure={"model.d_model": [16, 32, 48]}))
    assert found.notes[-1] == "1 studies stay empty: no row is of theirs/model.d_model=48"


def test_what_is_absent_is_assumed_aloud():
    table = [{k: v for k, v in r.items() if k != "seed"} for r in rows()]
    found = import_sweep(write(table), spec(structure={"rule": ["mup"]}))
    assert found.notes[:2] == (
        "rule is taken as mup, the spec's only one",
        "seeds are taken as 0, 1, in the order of rows with equal values",
    )
    trials = found.sweep.study(found.sweep.spec.cells[0]).trials
    assert trials[0].user_attrs["losses"] == [planted(0.01, 16, 0), planted(0.01, 16, 1)]


def test_a_run_counts_for_every_dimension_that_is_searched_alone():
    both = spec(
        study={"each": True},
        structure={"model.d_model": [16]},
        space={"hparams.output_mult": {"low": 0.25, "high": 4.0, "log": True, "points": 3}},
    )
    table = [
        {"lr": lr, "output_mult": mult, "seed": seed, "loss": 3 + lr + mult}
        for lr, mult in ((0.01, 1.0), (0.02, 1.0), (0.04, 1.0), (0.02, 0.5), (0.02, 2.0))
        for seed in SEEDS
    ]
    found = import_sweep(write(table), both)
    points = [t.params for study in found.sweep.studies().values() for t in study.trials]
    assert [list(point.values()) for point in points] == [
        [0.01], [0.02], [0.04], [1.0], [0.5], [2.0]
    ]  # fmt: skip
    odd = [*table, {"lr": 0.01, "output_mult": 2.0, "seed": 0, "loss": 3}]
    with pytest.raises(ConfigError, match=r"row 11: hparams\.\w+ is '.*', and in the spec"):
        import_sweep(write(odd), both)


def changed(place, **values):
    table = rows()
    table[place] = table[place] | values
    return table


MISTAKES = {
    "no column": (
        [{k: v for k, v in r.items() if k != "loss"} for r in rows()],
        r"no column for loss among hparams.lr, model.d_model, seed; map them: --columns loss=NAME",
    ),
    "two candidates": (
        [{**r, "val_loss": 1.0} for r in rows()],
        r"loss could be any of the columns 'loss', 'val_loss'; say which: --columns 'loss=loss'",
    ),
    "a width that is not searched": (
        changed(3, **{"model.d_model": 64}),
        r"row 4: model.d_model is '64', and in the spec 16 or 32; take the row out",
    ),
    "another run": (
        [{**r, "config.steps": 500} for r in rows()],
        r"row 1: steps is '500', and in the spec 12",
    ),
    "another rule": ([{**r, "rule": "sp"} for r in rows()], r"row 1: rule is 'sp', .* spec mup"),
    "out of range": (
        changed(2, **{"hparams.lr": 2.0}),
        r"row 3: hparams.lr = 2.0: must lie in \[0.001, 1\]; widen \[space\]",
    ),
    "no number": (changed(1, loss="low"), r"row 2: loss = 'low' must be a number"),
    "no loss": (changed(1, loss=""), r"row 2: loss = '': must be there; .* nan if .* diverged"),
    "unknown seed": (changed(1, seed=7), r"row 2: seed = 7.0: must be one of study.seeds \(0, 1\)"),
    "missing seed": (rows()[:-1], r"hparams.lr = 0.04 in theirs/model.d_model=32 lacks seed 1 of"),
    "twice": ([*rows(), rows()[0]], r"row 13: hparams.lr = 0.01 with seed 0 is there twice"),
    "more runs than seeds": (
        [{k: v for k, v in r.items() if k != "seed"} for r in rows() * 2],
        r"this run is there 3 times, study.seeds has 2, and no column tells seeds apart",
    ),
    "two texts": (
        [{**r, "corpus.sha256": f"{i:064}"} for i, r in enumerate(rows())],
        r"row 2: its corpus is .* losses on different text do not compare",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_stored(mistake):
    table, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        import_sweep(write(table), spec())
    assert not Path("runs/sweeps/theirs").exists()


def test_mistakes_in_columns():
    with pytest.raises(ConfigError, match=r"unknown key 'hparams.lrr'; did you mean 'hparams.lr'"):
        import_sweep(write(rows()), spec(), {"hparams.lrr": "lr"})
    with pytest.raises(ConfigError, match="loss=los: unknown column 'los'; did you mean 'loss'"):
        import_sweep(write(rows()), spec(), {"loss": "los"})


FILES = {
    "runs.xlsx": ("", r"unknown kind of table '.xlsx'; known: .csv"),
    "empty.csv": ("lr,loss\n", r"hold at least one run"),
    "torn.csv": ("lr,loss\n0.1\n", r"line 2 has not 2 fields"),
    "wide.csv": ("lr,loss\n0.1,2,3\n", r"line 2 has not 2 fields"),
    "twice.csv": ("lr,lr\n1,2\n", r"two columns are called 'lr'"),
    "torn.json": ("[{", r"cannot read torn.json"),
    "value.json": ("3", r"expected a list of objects"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_tables(name):
    text, message = FILES[name]
    Path(name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(Path(name))
    with pytest.raises(ConfigError, match=r"cannot read gone.csv"):
        read_rows(Path("gone.csv"))


def test_a_quoted_field_may_hold_anything():
    Path("q.csv").write_text('\ufeffnote,loss\n"two\nlines, and a comma",2.5\n', encoding="utf-8")
    assert read_rows(Path("q.csv")) == [{"note": "two\nlines, and a comma", "loss": "2.5"}]


def test_the_command(capsys):
    Path("theirs.toml").write_text(tomli_w.dumps({k: v for k, v in RAW.items() if k != "name"}))
    write(rows(lr="step size", loss="tail, last"))
    flags = ["--columns", "loss=tail, last,hparams.lr=step size"]
    assert run(["sweep", "import", "runs.csv", "--spec", "theirs.toml"]) == 2
    assert "--columns hparams.lr=NAME loss=NAME" in capsys.readouterr().err
    assert run(["sweep", "import", "runs.csv", "--spec", "theirs.toml", *flags]) == 0
    said = capsys.readouterr().out
    assert "12 rows are 6 trials in 2 studies (6 new)" in said and "corpus is unknown" in said
    assert run(["sweep", "best", "theirs"]) == 2
    assert "seeds = 0" in capsys.readouterr().err
    assert run(["sweep", "best", "theirs", "--seeds", "0"]) == 0
    assert "lr = 0.02" in capsys.readouterr().out
    assert run(["verdict", "theirs"]) == 0
    capsys.readouterr()
    target = ["--to", "proxy-64", "--accept", "vocabulary", "--accept", "corpus", "--seeds", "0"]
    assert run(["transfer", "theirs", *target, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["hparams"]["lr"] == 0.02
    assert record["origin"]["corpus"] == UNKNOWN and record["origin"]["confirmed"] is False
