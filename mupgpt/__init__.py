"""mupgpt: tune on tiny proxies, transfer to 13B, and check that it holds.

Names are imported when first used, so that ``import mupgpt`` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mupgpt.adequacy import ProxyCheck as ProxyCheck, check_proxy as check_proxy
    from mupgpt.config import (
        Base as Base,
        DataConfig as DataConfig,
        GPTConfig as GPTConfig,
        HParams as HParams,
        Schedule as Schedule,
        TrackingConfig as TrackingConfig,
        TrainConfig as TrainConfig,
    )
    from mupgpt.coord_check import coord_check as coord_check
    from mupgpt.data import load_corpus as load_corpus
    from mupgpt.flops import flops_per_token as flops_per_token
    from mupgpt.generate import load_run as load_run, sample as sample
    from mupgpt.init import init_weights as init_weights
    from mupgpt.interop.adopt import Adopted as Adopted, adopt as adopt
    from mupgpt.interop.describe import describe as describe
    from mupgpt.layout import ParamSpec as ParamSpec, count_params as count_params, layout as layout
    from mupgpt.model import GPT as GPT
    from mupgpt.module_check import coord_check_module as coord_check_module
    from mupgpt.optim import make_optimizer as make_optimizer, param_groups as param_groups
    from mupgpt.plain import ConfigError as ConfigError
    from mupgpt.population import Population as Population
    from mupgpt.presets import (
        PRESETS as PRESETS,
        model_card as model_card,
        train_config as train_config,
    )
    from mupgpt.rules import RULES as RULES, Rule as Rule
    from mupgpt.rungs import RungPlan as RungPlan, plan_rungs as plan_rungs
    from mupgpt.table import ParamTable as ParamTable, parametrize as parametrize
    from mupgpt.trainer import Trainer as Trainer
    from mupgpt.training import evaluate as evaluate, train_step as train_step
    from mupgpt.transfer import TransferPlan as TransferPlan, Tuned as Tuned, transfer as transfer
    from mupgpt.tuning.best import best_hparams as best_hparams
    from mupgpt.tuning.imports import import_sweep as import_sweep
    from mupgpt.tuning.run import run_sweep as run_sweep
    from mupgpt.tuning.rungs import judge_rungs as judge_rungs, run_rungs as run_rungs
    from mupgpt.tuning.space import SearchSpace as SearchSpace
    from mupgpt.tuning.spec import SweepSpec as SweepSpec, load_spec as load_spec
    from mupgpt.tuning.verdict import judge as judge, judge_sweep as judge_sweep

_HOME = {
    "adequacy": "ProxyCheck check_proxy",
    "config": "Base DataConfig GPTConfig HParams Schedule TrackingConfig TrainConfig",
    "coord_check": "coord_check",
    "data": "load_corpus",
    "flops": "flops_per_token",
    "generate": "load_run sample",
    "init": "init_weights",
    "interop.adopt": "Adopted adopt",
    "interop.describe": "describe",
    "layout": "ParamSpec count_params layout",
    "model": "GPT",
    "module_check": "coord_check_module",
    "optim": "make_optimizer param_groups",
    "plain": "ConfigError",
    "population": "Population",
    "presets": "PRESETS model_card train_config",
    "rules": "RULES Rule",
    "rungs": "RungPlan plan_rungs",
    "table": "ParamTable parametrize",
    "trainer": "Trainer",
    "training": "evaluate train_step",
    "transfer": "TransferPlan Tuned transfer",
    "tuning.best": "best_hparams",
    "tuning.imports": "import_sweep",
    "tuning.rungs": "judge_rungs run_rungs",
    "tuning.run": "run_sweep",
    "tuning.space": "SearchSpace",
    "tuning.spec": "SweepSpec load_spec",
    "tuning.verdict": "judge judge_sweep",
}
_MODULE_OF = {name: home for home, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mupgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mupgpt.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``mupgpt.layout``, ``transfer`` and ``coord_check`` the functions they are said to be.

    Importing a submodule binds it on its package, which would hide a function of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
