"""`mupgpt fit`: planted laws come back, 13B is predicted, bad data is one clear error."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mupgpt.cli import run as cli
from mupgpt.config.plain import to_dict
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import flops_per_token
from mupgpt.resolve import train_config
from mupgpt.runs.folders import read_curves, read_folders, step_rates
from mupgpt.scaling import (
    HOFFMANN_2022,
    annealing_areas,
    fit_chinchilla,
    synthetic_isoflop,
    synthetic_runs,
)
from mupgpt.scaling.named import LAWS

CARD = json.loads((Path(__file__).parent / "model_card.json").read_text())["models"]
EXACT_FLOPS = (2.6437e18, 1.2762e19, 6.1304e19, 2.8155e20, 1.0835e21, 6.2821e21, 2.2665e22)
FLOPS = np.geomspace(1e18, 1e21, 9)
SIZES = np.array([1e8, 2e8, 4e8, 8e8, 1e8, 2e8])
LOSSES = np.linspace(1.6, 2.8, 7)
TOKENS = np.array([2e9, 4e9, 8e9, 16e9, 32e9, 64e9])


def write(name, **columns):
    with Path(name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return name


def columns_of(runs):
    return {name: getattr(runs, name) for name in ("n_params", "tokens", "loss")}


def fit(capsys, *arguments):
    assert cli(["fit", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    assert cli(["fit", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_13b_from_the_six_smaller(capsys):
    losses = [row["pile_test_xent"] for row in CARD]
    data = write("card.csv", flops=EXACT_FLOPS[:6], loss=losses[:6])
    at = ("--predict", EXACT_FLOPS[6])
    found = fit(capsys, data, "--law", "power", *at, "--convention", "cerebras")
    assert found["prediction"] == pytest.approx(losses[6], rel=0.02)
    low, high = found["prediction_interval"]
    assert low < losses[6] < high
    assert found["convention"] == "cerebras"
    assert any("without an irreducible loss" in note for note in found["notes"])


def test_chinchilla(capsys):
    data = write("runs.csv", **columns_of(synthetic_runs(HOFFMANN_2022, noise=0.002)))
    found = fit(capsys, data, "--law", "chinchilla", "--predict", "n_params=7e10", "tokens=1.4e12")
    for name in ("E", "alpha", "beta", "n_exponent"):
        low, high = found["intervals"][name]
        assert low < found["parameters"][name] < high
    assert found["parameters"]["alpha"] == pytest.approx(HOFFMANN_2022.alpha, abs=0.02)
    assert found["prediction"] == pytest.approx(float(HOFFMANN_2022.loss(7e10, 1.4e12)), rel=0.01)


def test_the_optimum_of_a_budget():
    runs = synthetic_runs(HOFFMANN_2022, noise=0.002)
    fitted = fit_chinchilla(runs, start=HOFFMANN_2022, draws=20)
    found = LAWS["chinchilla"].predict[("flops",)](fitted, 1e21)
    expected = HOFFMANN_2022.optimum(1e21)
    for name, (value, interval) in found.items():
        assert value == pytest.approx(getattr(expected, name), rel=0.1)
        assert interval.low < value < interval.high


@pytest.mark.parametrize(
    ("law", "runs"),
    [
        ("isoflop", synthetic_isoflop(HOFFMANN_2022, noise=0.001)),
        ("envelope", synthetic_runs(HOFFMANN_2022)),
    ],
)
def test_frontiers(capsys, law, runs):
    found = fit(capsys, write("runs.csv", **columns_of(runs)), "--law", law, "--predict", "1e21")
    expected = HOFFMANN_2022.optimum(1e21)
    assert found["parameters"]["n_exponent"] == pytest.approx(0.4566, abs=0.02)
    assert found["prediction"]["n_params"] == pytest.approx(expected.n_params, rel=0.1)
    low, high = found["prediction_interval"]["tokens"]
    assert low < found["prediction"]["tokens"] < high


# law → (columns, inputs, quantity, value): what is planted without noise comes back
PLANTED = {
    "power": ({"flops": FLOPS, "loss": 600 * FLOPS**-0.15 + 1.5}, "1e22", 600 * 1e22**-0.15 + 1.5),
    "compute": ({"flops": FLOPS, "loss": 12 - 0.5 * np.log10(FLOPS)}, "1e22", 1.0),
    "overtraining": (
        {"n_params": SIZES, "tokens": TOKENS, "loss": 1.8 + 400 / SIZES**0.3 + 600 / TOKENS**0.3},
        "n_params=1e9 tokens=1e11",
        1.8 + 400 / 1e9**0.3 + 600 / 1e11**0.3,
    ),
    "downstream": (
        {"loss": LOSSES, "error": 0.9 - 2 * np.exp(-1.1 * LOSSES)},
        "1.5",
        0.9 - 2 * np.exp(-1.1 * 1.5),
    ),
    "critical-batch": (
        {"batch": [1e5, 1e6, 4e6, 8e6], "tokens": [1.1e9, 2e9, 5e9, 9e9]}, "2e6", 3e9,
    ),
    "batch": ({"tokens": [1e9, 1e10, 1e11], "batch": [100.0, 200.0, 400.0]}, "1e12", 800.0),
    "timescale": ({"tokens_per_param": [20, 80, 320], "fraction": [0.2, 0.1, 0.05]}, "1280", 0.025),
    "step-time": (
        {
            "seconds": [0.05, 0.09, 0.19, 0.28, 0.271],
            "copies": [2e8, 4e8, 2e8, 9e8, 8.1e8],
            "flops": [1e10, 2e10, 8e10, 9e10, 9e10],
        },
        "copies=1e8 flops=5e10",
        0.12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("law", PLANTED)
def test_planted(capsys, law):
    columns, at, expected = PLANTED[law]
    found = fit(capsys, write("runs.csv", **columns), "--law", law, "--predict", *at.split())
    assert found["prediction"] == pytest.approx(expected, rel=1e-3)
    assert found["residual_rms"] < 1e-3
    assert found["parameters"].keys() >= found["intervals"].keys()
    assert found["law"] == law and found["runs"] == len(next(iter(columns.values())))


def test_optimal_learning_rates(capsys):
    n, d, lr = (
        a.ravel() for a in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10], [1e-3, 2e-3, 4e-3, 8e-3])
    )
    best = 3e-3 * (n / 1e8) ** -0.1 * (d / 3e9) ** -0.05
    loss = 3 + 0.1 * np.log(lr / best) ** 2
    data = write("grid.csv", n_params=n, tokens=d, batch=np.full(len(n), 32), lr=lr, loss=loss)
    at = ("--predict", "n_params=1e10", "tokens=1e11")
    found = fit(capsys, data, "--law", "optimal", *at)
    expected = 3e-3 * 100**-0.1 * (1e11 / 3e9) ** -0.05
    assert found["prediction"] == pytest.approx(expected, rel=1e-3)


def test_every_law_is_tested():
    assert {*PLANTED, "chinchilla", "isoflop", "envelope", "optimal"} == set(LAWS)


def test_text_and_picture(capsys, tmp_path):
    data = write("runs.csv", flops=FLOPS, loss=12 - 0.5 * np.log10(FLOPS))
    command = ["fit", data, "--law", "compute", "--predict", "flops=1e22", "--picture", "law"]
    assert cli(command) == 0
    said = capsys.readouterr().out
    assert "drop = 0.5  [" in said and "at flops = 1e+22" in said and "convention 6N" in said
    assert (tmp_path / "law.svg").read_text().count("<svg") == 1
    first = (tmp_path / "law.png").read_bytes()
    assert cli(command) == 0
    assert (tmp_path / "law.png").read_bytes() == first


MODEL = {"n_layer": 1, "d_head": 8, "vocab_size": 257, "seq_len": 16}


def folder(name, width, steps, loss, curve=None, **changes):
    """A finished run's folder, as the trainer leaves it."""
    raw = {"model": {**MODEL, "d_model": width}, "steps": steps, **changes}
    config = train_config(raw)
    path = Path(name)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    curve = curve or {steps: loss}
    lines = [{"step": step, "val/loss": value} for step, value in curve.items()]
    lines.insert(0, {"step": 1, "train/loss": 5.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_run_folders(capsys):
    def law(n, d):
        return 1.2 + 30 / n**0.4 + 40 / d**0.4

    pairs = [(8, 100), (8, 400), (16, 100), (16, 200), (32, 100), (32, 400), (64, 50)]
    folders = []
    for width, steps in pairs:
        config = train_config({"model": {**MODEL, "d_model": width}, "steps": steps})
        loss = law(count_params(config.model), config.tokens)
        folders.append(folder(f"w{width}-{steps}", width, steps, loss))
    at = ("--predict", "n_params=1e6", "tokens=1e6")
    found = fit(capsys, *folders, "--law", "overtraining", *at)
    assert found["prediction"] == pytest.approx(law(1e6, 1e6), rel=1e-4)
    runs = read_folders(folders, "palm")
    config = train_config({"model": {**MODEL, "d_model": 8}, "steps": 100})
    assert runs.column("flops")[0] == flops_per_token(config.model, "palm") * config.tokens


def annealed(name, shape, **schedule):
    """A run folder whose losses follow the annealing law with λ = .98."""
    raw = {"schedule": {"shape": shape, "warmup": 0.05, **schedule}, "hparams": {"lr": 0.01}}
    rates = step_rates(train_config({"model": {**MODEL, "d_model": 8}, "steps": 1000, **raw}))
    s1, s2 = annealing_areas(rates, 0.98)
    loss = 1.5 + 0.8 * s1**-0.4 - 0.5 * s2
    curve = {step: loss[step - 1] for step in range(20, 1001, 20)}
    return folder(name, 8, 1000, 0.0, curve, **raw), loss[-1]


def test_annealing_predicts_another_schedule(capsys):
    seen = [annealed(shape, shape)[0] for shape in ("constant", "cosine")]
    other, final = annealed("wsd", "wsd", decay=0.2, decay_shape="1-sqrt")
    at = ("--predict", other / "config.json")
    found = fit(capsys, *seen, "--law", "annealing", *at)
    assert found["prediction"] == pytest.approx(final, rel=1e-3)
    assert found["parameters"]["decay"] == 0.98
    assert found["parameters"]["L0"] == pytest.approx(1.5, rel=0.01)
    assert len(read_curves(seen, begin=500)[0].loss) == 25


def test_bad_tables(capsys, tmp_path):
    good = {"flops": FLOPS, "loss": 3 * FLOPS**-0.01}
    power = ("--law", "power")
    bad = {**good, "loss": [*good["loss"][:-1], float("nan")]}
    assert "loss[8] = nan" in refused(capsys, write("nan.csv", **bad), *power)
    bad = {**good, "flops": [-1.0, *FLOPS[1:]]}
    assert "flops[0] = -1" in refused(capsys, write("neg.csv", **bad), *power)
    assert "no column 'loss'" in refused(capsys, write("x.csv", flops=FLOPS), *power)
    same = {k: [v[0]] * 4 for k, v in good.items()}
    assert "runs 0 and 1 are the same" in refused(capsys, write("dup.csv", **same), *power)
    word = write("word.csv", flops=["1e18", "many"], loss=[3, 2])
    assert "word.csv line 3: flops is 'many'" in refused(capsys, word, *power)
    assert "no column 'error'" in refused(capsys, write("y.csv", **good), "--law", "downstream")
    odd = write("odd.csv", loss=[2, 3], error=["a", "b"])
    assert "could not convert" in refused(capsys, odd, "--law", "downstream")
    assert "No such file" in refused(capsys, "gone.csv", *power)
    Path("empty.csv").write_text("")
    assert "no runs" in refused(capsys, "empty.csv", *power)
    mixed = write(
        "mix.csv", n_params=[1e8] * 3, tokens=[2e9, 3e9, 4e9], flops=[9e18] * 3, loss=[3, 2, 1]
    )
    assert 'convention is "6N"' in refused(capsys, mixed, *power)


def test_bad_arguments(capsys):
    data = write("runs.csv", flops=FLOPS, loss=3 * FLOPS**-0.01)
    assert "must be a CSV file or run folders" in refused(capsys, "--law", "power")
    assert "did you mean 'power'" in refused(capsys, data, "--law", "powr")
    power = (data, "--law", "power")
    assert "did you mean 'palm'" in refused(capsys, *power, "--convention", "plam")
    assert "must be a positive number" in refused(capsys, *power, "--predict", "much")
    assert "predicts from flops" in refused(capsys, *power, "--predict", "tokens=3")
    assert "give flops=…" in refused(capsys, *power, "--predict", "1", "2")
    assert "the law reads whole curves" in refused(capsys, data, "--law", "annealing")


def test_bad_folders(capsys, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "be a CSV file or a run's folder" in refused(capsys, "nothing", "--law", "power")
    half = folder("half", 8, 100, 3.0, {50: 3.0})
    assert "stands at step 50 of 100" in refused(capsys, half, "--law", "power")
    other = folder("other", 8, 100, 3.0, data={"source": "package:json"})
    with pytest.raises(ConfigError, match=r"data of .*'stdlib'.* and of other"):
        read_folders([folder("one", 8, 100, 3.0), other])
    wide = folder("wide", 16, 100, 3.0)
    assert "model of half" in refused(capsys, half, wide, "--law", "annealing")
    assert "be a CSV with" in refused(capsys, half, "--law", "downstream")
    assert "no evaluation after that step" in refused(
        capsys, half, "--law", "annealing", "--begin", "60"
    )


def test_the_replications_file_is_recognized(tmp_path, capsys):
    """Its headings, tokens as C/(6N), the five highest losses left out."""
    law = HOFFMANN_2022
    runs = synthetic_runs(law, noise=1e-3, seed=3)
    lines = ["x,y,color,Model Size,Training FLOP,hex_color,loss"]
    n, d = runs.column("n_params"), runs.column("tokens")
    lines += [f"0,0,c,{a},{6 * a * b},#,{x}" for a, b, x in zip(n, d, runs.loss, strict=True)]
    lines += [f"0,0,c,1e8,{6e8 * (i + 1) * 1e9},#,{40 + i}" for i in range(5)]
    (tmp_path / "svg.csv").write_text("\n".join(lines))
    assert cli(["fit", "svg.csv", "--law", "chinchilla", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"] == len(runs.loss)
    assert data["parameters"]["E"] == pytest.approx(law.E, abs=0.01)
    assert data["parameters"]["alpha"] == pytest.approx(law.alpha, abs=0.01)
