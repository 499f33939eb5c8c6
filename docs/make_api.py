"""The page of every public name, from its source: `python docs/make_api.py` writes docs/api.md.

Read from the source and not from the imported objects, so that the page is the same under every
Python: signatures print differently from version to version.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import mupgpt

PAGE = Path(__file__).parent / "api.md"
ROOT = Path(mupgpt.__file__).parent
HEAD = """# Every public name

`import mupgpt as mg`, then `mg.NAME`; the module is where it lives. Made from the docstrings, whose
examples the tests run, by `python docs/make_api.py`.
"""
Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """The whole page: modules in the order of the package's list, names in that of theirs."""
    return "\n".join([HEAD, *(line for home in mupgpt._HOME for line in module(home))]) + "\n"


def module(home: str) -> Iterator[str]:
    """The section of one module."""
    path = ROOT / f"{home.replace('.', '/')}.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    yield f"## mupgpt.{home}\n"
    for name in mupgpt._HOME[home].split():
        yield f"### {name}\n"
        yield from entry(body, name)


def entry(body: list[ast.stmt], name: str) -> Iterator[str]:
    """One name: signature, docstring, and of a class its fields and methods."""
    node = next((n for n in body if isinstance(n, Definition) and n.name == name), None)
    if node is None:
        yield from text(after(body, name))
        return
    call = node if isinstance(node, ast.FunctionDef) else constructor(node)
    if call:
        yield f"```python\n{signature(call)}\n```\n".replace("__init__", name, 1)
    yield from text(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        yield from members(node)


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """What a class is called with, where it says so itself (a dataclass has its fields)."""
    found = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return next(found, None)


def text(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: paragraphs, and examples as code."""
    for part in docstring.split("\n\n"):
        yield f"```python\n{part}\n```\n" if part.lstrip().startswith(">>>") else f"{part}\n"


def members(node: ast.ClassDef) -> Iterator[str]:
    """A class's public fields with what is said below them, and its public methods."""
    lines = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not name_of(item).startswith("_"):
            value = f" = {ast.unparse(item.value)}" if item.value else ""
            field = f"{name_of(item)}: {ast.unparse(item.annotation)}{value}"
            said = " ".join(after(node.body, name_of(item)).split())
            lines.append(f"- `{field}`" + (f": {said}" if said else ""))
        if isinstance(item, ast.FunctionDef) and public(item):
            said = " ".join((ast.get_docstring(item) or "").split("\n\n")[0].split())
            lines.append(f"- `{signature(item)}`: {said}")
    if lines:
        yield "\n".join(lines) + "\n"


def public(node: ast.FunctionDef) -> bool:
    """Whether readers call it."""
    return not node.name.startswith("_")


def name_of(node: ast.AnnAssign) -> str:
    """The field's name."""
    return node.target.id if isinstance(node.target, ast.Name) else "_"


def after(body: list[ast.stmt], name: str) -> str:
    """The string that stands below the assignment to ``name``, where there is one."""
    for item, below in zip(body, [*body[1:], None], strict=True):
        target = item.target if isinstance(item, ast.AnnAssign) else None
        target = item.targets[0] if isinstance(item, ast.Assign) else target
        if isinstance(target, ast.Name) and target.id == name and isinstance(below, ast.Expr):
            return str(ast.literal_eval(below.value))
    return ""


def signature(node: ast.FunctionDef) -> str:
    """The call as the source has it, a property as its name alone."""
    marks = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if marks & {"property", "cached_property"}:
        return f"{node.name}{returns}"
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("cls, ")
    return f"{node.name}({'' if arguments in ('self', 'cls') else arguments}){returns}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
