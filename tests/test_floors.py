"""The structure: imports go down, light commands stay light, the public names are what is said."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import mupgpt

ROOT = Path(mupgpt.__file__).parent
FLOORS = (
    "errors util config parametrization scaling planning presets resolve mutransfer",
    "model optim data distributed checkpoint interop",
    "training trainer runs",
    "tuning evidence tuner",
    "report cli __init__ __main__",
)
"""Rooms (a folder or a module of the package), from the ground up."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
NO_TORCH, NO_OPTUNA = 1, 3  # floors below these know nothing of it
HEAVY = {"torch", "optuna", "wandb", "scipy", "matplotlib", "mup", "transformers"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def room(path):
    """The room of a file: the first part of its path below the package."""
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
        if floor < NO_TORCH and parts[0] in HEAVY - {"scipy"}:
            yield f"{path.name}:{line} imports {module} on floor {floor}"
        elif floor < NO_OPTUNA and parts[0] == "optuna":
            yield f"{path.name}:{line} imports optuna on floor {floor}"


def test_every_room_has_a_floor():
    """And they are few: what one finds in the folder is what stands in the list."""
    found = {room(path) for path in modules()} - {"_bundled"}
    assert found == set(FLOOR) and len(found) <= 30


def test_every_folder_is_a_package():
    """Else doctests import its modules a second time, as top-level ones."""
    folders = {path.parent for path in modules() if "_bundled" not in path.parts}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert list(violations(path, imports(path), FLOOR[room(path)])) == []


def test_the_floor_test_can_fail():
    below = violations(Path("table.py"), [("mupgpt.model", 1), ("torch", 2), ("optuna", 3)], 0)
    assert len(list(below)) == 3
    assert len(list(violations(Path("x.py"), [("optuna", 1)], 2))) == 1


def arrows(files):
    """Room → the rooms that it imports, itself left out."""
    found = {}
    for path, below in files:
        for module, _ in below:
            parts = module.split(".")
            if parts[0] == "mupgpt" and len(parts) > 1 and parts[1] != room(path):
                found.setdefault(room(path), set()).add(parts[1])
    return found


def circles(found):
    """Rooms from which one comes back to where one was."""
    reached = {start: set(ends) for start, ends in found.items()}
    for _ in reached:
        for ends in reached.values():
            ends |= set().union(*(reached.get(end, set()) for end in ends))
    return sorted(start for start, ends in reached.items() if start in ends)


def test_rooms_have_no_circle():
    """A door of the package itself is no room of its own: it leads everywhere."""
    inside = [p for p in modules() if room(p) not in ("__init__", "__main__")]
    assert circles(arrows((path, imports(path)) for path in inside)) == []


def test_the_circle_test_can_fail():
    a, b = ROOT / "model" / "gpt.py", ROOT / "data" / "corpus.py"
    pair = [(a, [("mupgpt.data.corpus", 1)]), (b, [("mupgpt.model.gpt", 1)])]
    assert circles(arrows(pair)) == ["data", "model"]


def test_modules_of_a_room_have_no_circle():
    for folder in {path.parent for path in modules()} - {ROOT}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        names = {
            f"mupgpt.{p.relative_to(ROOT).with_suffix('')}".replace("/", "."): p for p in files
        }
        found = {
            name: {below for below, _ in imports(path) if below in names and below != name}
            for name, path in names.items()
        }
        assert circles(found) == [], folder.name


LIGHT = [
    "import mupgpt",
    "import mupgpt; mupgpt.parametrize, mupgpt.layout, mupgpt.transfer, mupgpt.PRESETS",
    "from mupgpt.cli import run; run(['table', 'cerebras-gpt-13b'])",
    "from mupgpt.cli import run; run(['presets'])",
    "from mupgpt.cli import run; run(['plan', 'cerebras-gpt-13b'])",
    "from mupgpt.cli import run; run(['ls'])",
    "from mupgpt.cli import run; run(['check-proxy', 'proxy-128', '--to', 'proxy-256'])",
    "from mupgpt.cli import run; run(['bridge', 'cerebras-gpt-40m', '--to', 'cerebras-gpt-13b'])",
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
import mupgpt.trainer, mupgpt.training.population, mupgpt.runs.generate, mupgpt.data.corpus
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_exist_and_say_what_they_are():
    assert sorted(mupgpt.__all__) == list(mupgpt.__all__)
    for name in mupgpt.__all__:
        value = getattr(mupgpt, name)
        described = value.__doc__ if callable(value) else True
        assert described, f"{name} has no docstring"


def test_the_names_for_type_checkers_are_the_public_ones():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    said = {alias.asname: node.module for node in block.body for alias in node.names}
    assert said == {name: f"mupgpt.{home}" for name, home in mupgpt._MODULE_OF.items()}


def test_public_names_are_not_hidden_by_modules():
    """Importing a submodule binds it on its package, so none may bear a public name."""
    rooms = {
        path.stem if path.parent == ROOT else path.parts[len(ROOT.parts)] for path in modules()
    }
    assert rooms & set(mupgpt.__all__) == set()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mupgpt.nothing


def test_all_is_what_others_import():
    """What another module takes from a module is in that module's ``__all__``, and public."""
    exported = {}
    for path in modules():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assigned = [node for node in body if isinstance(node, ast.Assign)]
        found = [n for n in assigned if getattr(n.targets[0], "id", "") == "__all__"]
        name = f"mupgpt.{path.relative_to(ROOT).with_suffix('')}".replace("/", ".")
        exported[name] = ast.literal_eval(found[0].value) if found and path.parent != ROOT else None
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno} takes {alias.name} of {node.module}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and exported.get(node.module) is not None
        for alias in node.names
        if alias.name not in exported[node.module]
    ]
    assert missing == []


MOVED = ["rules", "table", "plain", "population", "tuning.verdict", "tracking"]


@pytest.mark.parametrize("name", MOVED)
def test_old_paths_lead_to_the_modules_of_today(name):
    from mupgpt.util.moved import NOW

    with pytest.warns(DeprecationWarning, match=f"mupgpt.{NOW[name]} now"):
        sys.modules.pop(f"mupgpt.{name}", None)
        old = importlib.import_module(f"mupgpt.{name}")
    assert old is importlib.import_module(f"mupgpt.{NOW[name]}")
    assert old.__spec__.name == f"mupgpt.{NOW[name]}"


def test_every_old_path_leads_somewhere():
    from mupgpt.util.moved import FUNCTIONS, NOW

    for module in (*NOW.values(), *FUNCTIONS.values()):
        assert importlib.util.find_spec(f"mupgpt.{module}"), module
    with pytest.raises(ModuleNotFoundError, match="is a function; the module is"):
        importlib.import_module("mupgpt.transfer")


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


LONG = {"config/schema.py", "presets.py"}  # literals
SHORT = 350  # lines of a file


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_and_functions_stay_readable():
    """No file over 350 lines but those of literals, no function over 80, and few over 30."""
    for path in modules():
        if str(path.relative_to(ROOT)) not in LONG:
            assert path.read_text(encoding="utf-8").count("\n") <= SHORT, path.name
    lengths = sorted(f.end_lineno - f.lineno + 1 for path in modules() for f in functions(path))
    assert lengths[-1] <= 81 and lengths[int(0.95 * len(lengths))] <= 30


def test_functions_take_few_parameters():
    """At most ten take six or more, but for commands, whose parameters are flags."""
    many = [
        f"{path.relative_to(ROOT)}: {f.name}"
        for path in modules()
        if room(path) != "cli"
        for f in functions(path)
        if len([a for a in (*f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "ctx")]) >= 6
    ]
    assert len(many) <= 10, many
