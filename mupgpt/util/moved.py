"""Module paths of 0.1.0 that README and docs named: they lead to where the module is now."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["follow_old_paths"]

NOW = {
    "adequacy": "mutransfer.proxy_check",
    "axes": "mutransfer.axes",
    "bundled": "util.bundled",
    "choices": "mutransfer.choices",
    "cpu": "training.device",
    "flops": "planning.flops",
    "generate": "runs.generate",
    "health": "training.health",
    "init": "model.init",
    "launch": "runs.launch",
    "layers": "model.layers",
    "lean": "optim.lean",
    "losses": "model.losses",
    "parallel": "distributed.parallel",
    "phases": "config.phases",
    "plain": "config.plain",
    "plan": "planning.plan",
    "population": "training.population",
    "positions": "model.positions",
    "progress": "util.progress",
    "rules": "parametrization.rules",
    "rungs": "mutransfer.bridge",
    "schedules": "config.schedules",
    "state": "checkpoint.state",
    "stopping": "util.stopping",
    "table": "parametrization.table",
    "tracking": "training.metrics",
    "tuning.verdict": "evidence.verdict",
    "watch": "training.watch",
}
FUNCTIONS = {
    "coord_check": "evidence.coordinates",
    "layout": "parametrization.layout",
    "transfer": "mutransfer.transfer",
}
"""Public functions: a module of that name would hide them."""


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what has moved, warns, and gives the module that is there now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "mupgpt":
            return None
        if name in FUNCTIONS:
            raise ModuleNotFoundError(
                f"{fullname} is a function; the module is mupgpt.{FUNCTIONS[name]}", name=fullname
            )
        return importlib.machinery.ModuleSpec(fullname, self) if name in NOW else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        name = spec.name.partition(".")[2]
        warnings.warn(f"{spec.name} is mupgpt.{NOW[name]} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(f"mupgpt.{NOW[name]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has been executed where it is; it stays what it was."""
        spec = module.__spec__
        module.__spec__ = spec.loader_state if spec else None


def follow_old_paths() -> None:
    """Let imports of old paths find their modules; the last of all finders, asked once."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
