"""Every example runs, is short, and imports mupgpt alone; the README's code runs as printed."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mupgpt.parametrization.rules import RULES
from mupgpt.util.bundled import bundled

ROOT = Path(__file__).parent.parent
EXAMPLES = bundled("examples")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES[name]), "--smoke"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short_and_self_contained(name):
    text = EXAMPLES[name].read_text()
    assert text.count("\n") < 80
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    outside = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert outside <= {"mupgpt", "torch", "transformers"}


@pytest.fixture
def readme():
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.fail("tests run in a checkout: README.md is beside them")
    return path.read_text()


def block(readme, heading, kind):
    """The first block of code below a heading."""
    below = readme[readme.index(heading) :]
    return re.search(rf"```{kind}\n(.*?)```", below, re.S).group(1)


def test_the_readmes_first_block_runs_up_to_the_table(readme, tmp_path):
    code = block(readme, "## From Python", "python")
    code = code[: code.index("mg.Trainer")]
    assert "print(plan.table)" in code
    (tmp_path / "readme.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "readme.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "blocks.*.mlp.down.weight" in done.stdout


TINY = """
[study]
sampler = "grid"
trials = 3
seeds = [0]
[train]
model = "proxy-32"
base = "proxy-32"
steps = 4
[structure]
"model.d_model" = [32, 64, 96]
[space]
"hparams.lr" = { low = 1e-3, high = 1e-2, log = true, points = 3 }
"""
CUT = {
    r"^trials = \d+": "trials = 3",
    r"^rungs = \d+": "rungs = 0",
    r"^steps = \d+": "steps = 20",
    r"^batch_size = \d+": "batch_size = 2",
    r"^eval_tokens = \d+": "eval_tokens = 512",
}
"""What a file of the story is cut down to as soon as it is there."""
FLAGS = {
    "mupgpt train proxy-32": "--steps 20 --data.eval_tokens 512",
    "mupgpt coord-check": "--widths 64 128 256 --seeds 0 1 2 3",
}
"""The same for commands whose budget is in no file."""
MAY_SAY_NO = ("mupgpt check-proxy", "mupgpt sweep run lr && mupgpt verdict lr", "mupgpt bridge")
"""On so small a budget the answer is noise: any answer, but no mistake."""


def brought(folder):
    """What the reader brings: finished runs, texts; and a tiny sweep that goes before lr."""
    (folder / "runs.csv").write_text("lr,output_mult,val_loss\n1e-3,1,2.5\n2e-3,1,2.4\n")
    (folder / "my-texts").mkdir()
    for i in range(30):
        (folder / "my-texts" / f"{i}.txt").write_text(f"text {i}: " + "some words. " * 20)
    (folder / "lr").write_text(TINY)


def cut(folder):
    for path in folder.glob("*.toml"):
        text = path.read_text()
        for old, new in CUT.items():
            text = re.sub(old, new, text, flags=re.M)
        path.write_text(text)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_readmes_commands_are_a_story_that_runs(readme, tmp_path):
    brought(tmp_path)
    program = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "WANDB_MODE": "disabled"}
    lines = [line.split("  #")[0].strip() for line in
             block(readme, "## From the shell", "").splitlines()]  # fmt: skip
    assert len(lines) > 15 and all(line.startswith("mupgpt ") for line in lines)
    for line in lines:
        flags = next((more for start, more in FLAGS.items() if line.startswith(start)), "")
        done = subprocess.run(
            f"{line} {flags}", shell=True, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        allowed = (0, 1) if line.startswith(MAY_SAY_NO) else (0,)
        assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        cut(tmp_path)


def test_the_readmes_13b_table_is_the_commands(readme, capsys):
    from mupgpt.cli import run

    run(["table", "cerebras-gpt-13b", "--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    missing = [row for row in rows if row not in readme]
    assert not missing, f"run: mupgpt table cerebras-gpt-13b --markdown\n{missing[0]}"


def test_the_readme_names_every_rule_and_no_missing_file(readme):
    for rule in RULES:
        assert f"`{rule}`" in readme
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readme):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
