"""The structure: imports go down, light commands stay light, the public names are what is said."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mupgpt

ROOT = Path(mupgpt.__file__).parent
FLOORS = {
    0: "plain config text memory plan presets layout rules slopes table flops schedules scaling "
    "transfer choices axes adequacy phases rungs",
    1: "cpu layers positions losses lean recompute model init optim shards interop",
    2: "data checkpoint distributed parallel state tracking progress stopping bundled",
    3: "training population trainer branch generate coord_check module_check probes runfolders "
    "launch health watch memory_trace capture",
    4: "tuning",
    5: "report cli __init__ __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
ALLOWED = {0: {"numpy", "scipy"}, 1: {"torch"}, 2: {"safetensors", "wandb", "tiktoken"}}
HEAVY = {"torch", "optuna", "wandb", "scipy", "matplotlib", "mup", "transformers"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def head(path):
    """The first part of a module's name below the package."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """(module, line) of every import in a file, lazy ones included; TYPE_CHECKING blocks not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node.lineno


def violations(path, found, floor):
    for module, line in found:
        parts = module.split(".")
        if parts[0] == "mupgpt" and len(parts) > 1 and FLOOR[parts[1]] > floor:
            yield f"{path.name}:{line} imports {module} from floor {FLOOR[parts[1]]}"
        if floor == 0 and parts[0] in HEAVY - ALLOWED[0]:
            yield f"{path.name}:{line} imports {module} on floor 0"
        if floor < 4 and parts[0] == "optuna":
            yield f"{path.name}:{line} imports optuna below floor 4"


def test_every_module_has_a_floor():
    assert {head(path) for path in modules()} - {"_bundled"} <= set(FLOOR)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert list(violations(path, imports(path), FLOOR[head(path)])) == []


def test_the_floor_test_can_fail():
    below = violations(Path("table.py"), [("mupgpt.model", 1), ("torch", 2), ("optuna", 3)], 0)
    assert len(list(below)) == 4


LIGHT = [
    "import mupgpt",
    "import mupgpt; mupgpt.parametrize, mupgpt.layout, mupgpt.transfer, mupgpt.PRESETS",
    "from mupgpt.cli import run; run(['table', 'cerebras-gpt-13b'])",
    "from mupgpt.cli import run; run(['presets'])",
    "from mupgpt.cli import run; run(['plan', 'cerebras-gpt-13b'])",
    "from mupgpt.cli import run; run(['ls'])",
    "from mupgpt.cli import run; run(['check-proxy', 'proxy-128', '--to', 'proxy-256'])",
    "from mupgpt.cli import run; run(['rungs', 'cerebras-gpt-40m', '--to', 'cerebras-gpt-13b'])",
    "from mupgpt.cli import run\ntry: run(['--help'])\nexcept SystemExit: pass",
]


def loaded(code):
    """Which heavy packages a fresh process has after running ``code``."""
    program = f"{code}\nimport sys; print('\\n', *sorted({HEAVY!r} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    return out.splitlines()[-1].split()


@pytest.mark.parametrize("code", LIGHT)
def test_light_commands_load_nothing_heavy(code):
    assert loaded(code) == []


def test_the_light_test_can_fail():
    assert "torch" in loaded("import mupgpt; mupgpt.GPT")


def test_a_worker_starts_with_nothing_that_only_other_samplers_need():
    assert loaded("import mupgpt.tuning.worker") == ["optuna", "torch"]


def test_the_trainer_needs_torch_numpy_and_safetensors_only():
    """GPU images lack the rest: model, trainer and population import without it."""
    banned = "optuna wandb mup tyro scipy matplotlib rich jinja2 tomli_w tiktoken pydantic"
    program = f"""
import sys
for name in {banned.split()!r}:
    sys.modules[name] = None
import mupgpt.trainer, mupgpt.population, mupgpt.generate
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_exist_and_say_what_they_are():
    assert sorted(mupgpt.__all__) == list(mupgpt.__all__)
    for name in mupgpt.__all__:
        value = getattr(mupgpt, name)
        described = value.__doc__ if callable(value) else True
        assert described, f"{name} has no docstring"


def test_functions_keep_their_names_after_their_modules_load():
    for name in ("layout", "transfer"):
        importlib.import_module(f"mupgpt.{name}")
        assert callable(getattr(mupgpt, name)) and not hasattr(getattr(mupgpt, name), "__path__")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mupgpt.nothing


def public_nodes(path):
    """Public functions and classes of a module, and public methods of its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(n for c in classes if c.name[0] != "_" for n in c.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_what_is_public_is_documented():
    for path in modules():
        for node in public_nodes(path):
            said = ast.get_docstring(node) or node.name == "forward"
            assert said, f"{path.name}: {node.name}"


def test_files_and_functions_stay_readable():
    """A file over 450 lines or a function over 80 needs to be taken apart."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path.name}: {node.name}"
