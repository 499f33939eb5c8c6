"""Every example runs, is short, and imports mupgpt alone; the README's code runs as printed."""

import ast
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


def test_the_readmes_first_block_runs_up_to_the_table(readme, tmp_path):
    block = re.search(r"```python\n(.*?)```", readme, re.S).group(1)
    code = block[: block.index("mg.Trainer")]
    assert "print(plan.table)" in code
    (tmp_path / "readme.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "readme.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "blocks.*.mlp.down.weight" in done.stdout


def test_the_readmes_13b_table_is_the_commands(readme, capsys):
    from mupgpt.cli import run

    run(["table", "cerebras-gpt-13b", "--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    missing = [row for row in rows if row not in readme]
    assert not missing, f"run: mupgpt table cerebras-gpt-13b --markdown\n{missing[0]}"


def test_the_readme_names_every_rule_and_no_missing_file(readme):
    for rule in RULES:
        assert f"`{rule}`" in readme
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
