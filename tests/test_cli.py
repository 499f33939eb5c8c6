"""The command line: every verb has help, mistakes are one line with exit 2, results are JSON."""

import json
import math
import tomllib
from pathlib import Path

import pytest

from mupgpt.cli import run
from mupgpt.resolve import train_config

TEXT = "".join(f"line {i}: {i * i}\n" for i in range(700))
SPEC = """
[study]
trials = 4
[train]
model = {preset = "proxy-32", d_model = 8, d_head = 8, n_layer = 1, seq_len = 16}
base = {d_model = 8, d_ffn = 32, n_head = 1, d_head = 8, n_kv_head = 1, n_layer = 1}
steps = 8
batch_size = 2
data = {source = "text.txt", eval_tokens = 64}
[space]
"hparams.lr" = { low = 1e-3, high = 1e-1, log = true }
"""


@pytest.fixture(autouse=True)
def _files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tiny.toml").write_text(SPEC)
    (tmp_path / "list.json").write_text("[1]")


def out(capsys, *argv):
    """stdout of a command that succeeds."""
    assert run(list(argv)) == 0
    return capsys.readouterr().out


def fails(capsys, *argv):
    """The one line of a command that the user got wrong."""
    code = run(list(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and said[-1].startswith("error: "), (code, said)
    return said[-1]


VERBS = ["", "presets", "table", "plan", "ls", "cp", "train", "train proxy-32", "launch",
         "generate", "verdict", "transfer", "coord-check", "check-proxy", "rungs", "branch", "fit",
         "propose", "demo", "sweep", "sweep run", "sweep import", "sweep status", "sweep best",
         "sweep importance", "sweep dashboard", "data", "data prepare"]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        run([*verb.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: mupgpt {verb}".strip() in said and len(said) > 200


def test_13b_as_data(capsys):
    data = json.loads(out(capsys, "table", "cerebras-gpt-13b", "--rule", "cerebras", "--json"))
    rows = {row["name"]: row for row in data["params"]}
    assert len(rows) == 644
    down = rows["blocks.39.mlp.down.weight"]
    assert (down["site"], down["role"]) == ("blocks.*.mlp.down.weight", "hidden")
    assert down["residual_out"] is True and down["shape"] == [5120, 20480]
    assert down["init_std"] == pytest.approx(0.002)
    assert down["lr"] == pytest.approx(3e-4)
    assert (down["weight_decay"], down["eps"]) == (0.1, 1e-8)
    assert rows["blocks.0.attn.q.weight"]["init_std"] == pytest.approx(0.017889, abs=5e-7)
    assert data["multipliers"]["readout"] == pytest.approx(0.05)
    assert data["multipliers"]["emb"] == 10.0


def test_plan_is_arithmetic(capsys):
    """16 bytes a parameter; tokens · FLOPs over devices · peak · MFU; state divided by devices."""
    argv = ("plan", "cerebras-gpt-13b", "--gpus", "8", "--mfu", "0.5", "--json")
    data = json.loads(out(capsys, *argv))
    n, tokens = 12853386240, 174335 * 720 * 2048
    flops = 6 * n + 12 * 40 * 5120 * 2048
    assert (data["n_params"], data["tokens"], data["flops_per_token"]) == (n, tokens, flops)
    assert data["state_gib"]["weights"] == pytest.approx(n * 4 / 8 / 2**30)
    assert sum(data["state_gib"].values()) == pytest.approx(191.534 / 8, abs=1e-3)
    assert data["fits"] is True
    assert data["days"] == pytest.approx(tokens * flops / (8 * 9.89e14 * 0.5) / 86400)
    assert "does not fit in 90 GiB" in out(capsys, "plan", "cerebras-gpt-13b", "--hbm", "90")
    assert "mfu = 2.0: must be in (0, 1]" in fails(capsys, "plan", "proxy-32", "--mfu", "2")


def test_a_proposal_can_be_planned(capsys):
    out(capsys, "propose", "--flops", "1e21", "-o", "run.toml")
    data = json.loads(out(capsys, "plan", "run.toml", "--json"))
    assert 6 * data["n_params"] * data["tokens"] == pytest.approx(1e21, rel=0.01)


def test_13b_fits_a_screen(capsys):
    text = out(capsys, "table", "cerebras-gpt-13b")
    assert len(text.splitlines()) < 36
    assert "÷√20 (m_in) ÷√80 (2L); lr ÷20 (m_in)" in text
    assert "lr 0.006, std 0.08, emb × 10" in text and "base 24 × 256" in text


def test_another_rule_and_base(capsys):
    argv = ("table", "cerebras-gpt-111m", "--rule", "mup", "--base", "cerebras-gpt-256m", "--json")
    data = json.loads(out(capsys, *argv))
    row = next(r for r in data["params"] if r["name"] == "blocks.0.mlp.up.weight")
    assert row["lr"] == pytest.approx(6e-3 * 1088 / 768)
    assert row["eps"] == pytest.approx(1e-8 * 1088 / 768)


def test_compare_shows_what_differs(capsys):
    text = out(capsys, "table", "proxy-64", "--compare", "sp")
    assert "blocks.*.mlp.up.weight" in text and "×2" in text
    assert "agree on every figure" in out(capsys, "table", "proxy-32", "--compare", "sp")


def test_markdown(capsys):
    text = out(capsys, "table", "proxy-64", "--markdown")
    assert "| wte.weight | " in text and "| ---: |" in text


def test_presets_are_the_card(capsys):
    data = json.loads(out(capsys, "presets", "--json"))
    last = data["models"][-1]
    assert (last["name"], last["n_params"], last["flops"]) == ("13B", 12853386240, "2.3E+22")
    assert [p["name"] for p in data["proxies"]][:2] == ["cerebras-gpt-40m", "proxy-32"]
    assert "2.57E+11" in out(capsys, "presets")


def test_ls_and_cp(capsys, tmp_path):
    assert "smoke" in out(capsys, "ls")
    out(capsys, "cp", "smoke", "mine.toml")
    assert tomllib.loads((tmp_path / "mine.toml").read_text())["study"]["trials"] == 12
    assert "mine.toml" in fails(capsys, "cp", "smoke", "mine.toml")
    assert "did you mean 'smoke'" in fails(capsys, "cp", "smoek", "other.toml")


def test_the_whole_job(capsys, tmp_path):
    """sweep → best → transfer → train → generate, as a user types it."""
    assert "4 complete" in out(capsys, "sweep", "run", "tiny.toml", "--workers", "1")
    assert "4 complete; best" in out(capsys, "sweep", "status", "tiny")
    best = json.loads(out(capsys, "sweep", "best", "tiny", "--json"))["tiny"]
    assert best["study"] == "tiny" and best["spread"] > 0
    (tmp_path / "wide.toml").write_text(
        'model = {preset = "proxy-32", d_model = 16, d_head = 8, n_layer = 1, seq_len = 16}\n'
        "steps = 8\nbatch_size = 2\n"
    )
    text = out(capsys, "transfer", "tiny", "--to", "wide.toml", "-o", "target.toml")
    assert "width" in text and "×2  covered: Yang et al. 2022" in text
    config = train_config(tomllib.loads((tmp_path / "target.toml").read_text()))
    assert config.hparams.lr == best["config"]["hparams"]["lr"]
    assert config.model.d_model == 16 and config.base.d_model == 8
    result = json.loads(out(capsys, "train", "target.toml", "--tracking.wandb", "off"))
    assert result["step"] == 8 and math.isfinite(result["val/bpb"])
    assert (tmp_path / "runs" / "target" / "metrics.jsonl").is_file()
    said = out(capsys, "generate", "runs/target", "--prompt", "line 1", "--max-tokens", "5")
    assert said.startswith("line 1")


def test_flags_reach_every_field_and_keep_derived_ones(capsys):
    argv = ("train", "tiny-run.toml", "--hparams.lr", "3e-3", "--steps=2", "--model.d_model", "16")
    Path("tiny-run.toml").write_text(
        'model = {preset = "proxy-32", n_layer = 1, d_head = 8, d_model = 8, seq_len = 16}\n'
        'batch_size = 2\ndata = {source = "text.txt", eval_tokens = 64}\n'
    )
    out(capsys, *argv, "--run", "here")
    config = json.loads(Path("here/config.json").read_text())
    assert (config["hparams"]["lr"], config["steps"]) == (3e-3, 2)
    assert (config["model"]["n_head"], config["model"]["d_ffn"]) == (2, 64)


def test_a_flag_counts_even_when_it_says_what_the_file_says(capsys):
    Path("r.toml").write_text(
        'model = {preset = "proxy-32", n_layer = 1, d_head = 8, d_model = 16, seq_len = 16}\n'
        'batch_size = 2\ntokens = 6400\ndata = {source = "text.txt", eval_tokens = 64}\n'
    )
    out(capsys, "train", "r.toml", "--steps", "3", "--model.d_model", "32", "--model.n_head", "2",
        "--run", "a")  # fmt: skip
    config = json.loads(Path("a/config.json").read_text())
    assert (config["steps"], config["model"]["n_head"]) == (3, 2)


def test_flags_that_fit_together_are_not_held_against_what_they_replace(capsys):
    """A big preset made small by flags: key-value heads and FFN follow the new shape."""
    out(capsys, "train", "cerebras-gpt-111m", "--model.d_model", "16", "--model.n_head", "1",
        "--model.n_layer", "1", "--model.seq_len", "16", "--batch_size", "2", "--steps", "1",
        "--data.source", "text.txt", "--data.tokenizer", "bytes", "--data.eval_tokens", "64",
        "--schedule.warmup_tokens", "0", "--run", "small")  # fmt: skip
    model = json.loads(Path("small/config.json").read_text())["model"]
    assert (model["n_kv_head"], model["d_ffn"], model["d_head"]) == (1, 64, 16)
    said = fails(capsys, "train", "proxy-32", "--model.n_kv_head", "3", "--run", "x")
    assert "model.n_kv_head = 3 does not divide 1" in said


def test_a_renamed_sweep_is_found_by_its_name(capsys):
    Path("file.toml").write_text('name = "other"\n' + SPEC)
    assert "other: 4 complete" in out(capsys, "sweep", "run", "file.toml", "--workers", "1")


def test_data_prepare_makes_shards_that_train(capsys):
    out(capsys, "data", "prepare", "text.txt", "shards/toy", "--tokenizer", "bytes")
    argv = ["train", "proxy-32", "--steps", "1", "--data.source", "shards/toy_*.bin"]
    assert json.loads(out(capsys, *argv))["step"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("table nosuch", "neither a preset nor a file"),
        ("table proxy-32 --rule mupp", "did you mean 'mup'"),
        ("table proxy-32 --base proxy-33", "did you mean 'proxy-32'"),
        ("train nosuch.toml", "neither a preset nor a file"),
        ("train proxy-32 --data.source nowhere", "no such file, folder or glob"),
        ("train proxy-32 --model.vocab_size 100", "model.vocab_size = 100"),
        ("sweep run smok", "did you mean 'smoke'"),
        ("sweep run nosuch.toml", "no file 'nosuch.toml'"),
        ("sweep status smoke", "no sweep 'smoke' here; start it with: mupgpt sweep run smoke"),
        ("sweep best smoke", "no sweep 'smoke' here"),
        ("verdict lr", "no sweep 'lr' here"),
        ("transfer joint --to proxy-64", "no sweep 'joint' here"),
        ("transfer cerebras-gpt-40m --to nosuch", "neither a preset nor a file"),
        ("generate nowhere", "has no checkpoint"),
        ("data prepare nowhere out", "no such file"),
        ("data prepare text.txt text.txt/x --tokenizer bytes", "text.txt"),
        ("train proxy-32 --steps 1 --run text.txt", "text.txt"),
        ("sweep run tiny.toml --workers -1", "workers = -1: must be >= 1"),
        ("sweep status tiny --storage sqlite:///typo.db", "there is no file typo.db"),
        ("transfer cerebras-gpt-40m --to cerebras-gpt-13b -o text.txt/x", "text.txt"),
        ("table list.json", "hold a table of keys"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(capsys, argv, message):
    assert message in fails(capsys, *argv.split())


def test_a_wrong_flag_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["train", "proxy-32", "--hparams.lrr", "1"])
    assert stop.value.code == 2
    assert "--hparams.lr" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mupgpt.tuning.run.run_sweep", interrupted)
    assert run(["sweep", "run", "tiny.toml"]) == 130
    said = capsys.readouterr().err
    assert said == "\nstopped; what finished is kept: the same command continues\n"


def test_published_values_transfer_without_a_sweep(capsys, tmp_path):
    text = out(capsys, "transfer", "cerebras-gpt-40m", "--to", "cerebras-gpt-13b", "-o", "13b.toml")
    assert "12,853,386,240 parameters" in text
    config = train_config(tomllib.loads((tmp_path / "13b.toml").read_text()))
    assert (config.rule, config.steps, config.hparams.lr) == ("cerebras", 174335, 6e-3)
    record = json.loads(
        out(capsys, "transfer", "cerebras-gpt-40m", "--to", "cerebras-gpt-13b", "--json")
    )
    assert {a["name"]: a["ratio"] for a in record["axes"]}["width"] == 20.0
