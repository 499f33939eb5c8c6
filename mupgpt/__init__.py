"""mupgpt: tune on tiny proxies, transfer to 13B, and check that it holds.

Names are imported when first used, so that ``import mupgpt`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mupgpt.util.moved import follow_old_paths

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:  # the same names once more, for type checkers; a test compares both
    from mupgpt.config.phases import PhaseConfig as PhaseConfig
    from mupgpt.config.plain import load_toml as load_toml
    from mupgpt.config.schema import (
        Base as Base,
        DataConfig as DataConfig,
        GPTConfig as GPTConfig,
        HParams as HParams,
        ParallelConfig as ParallelConfig,
        Prediction as Prediction,
        Schedule as Schedule,
        TrackingConfig as TrackingConfig,
        TrainConfig as TrainConfig,
    )
    from mupgpt.data.corpus import load_corpus as load_corpus
    from mupgpt.errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        Crashed as Crashed,
        Diverged as Diverged,
        Interrupted as Interrupted,
    )
    from mupgpt.evidence.bridge_verdict import (
        judge_bridge as judge_bridge,
        run_bridge as run_bridge,
    )
    from mupgpt.evidence.coordinates import coord_check as coord_check
    from mupgpt.evidence.coordinates_of_module import coord_check_module as coord_check_module
    from mupgpt.evidence.fidelity import Fidelity as Fidelity
    from mupgpt.evidence.fidelity_runs import (
        plan_fidelity as plan_fidelity,
        run_fidelity as run_fidelity,
    )
    from mupgpt.evidence.verdict import judge as judge, judge_sweep as judge_sweep
    from mupgpt.interop.adopt import Adopted as Adopted, adopt as adopt
    from mupgpt.interop.describe import describe as describe
    from mupgpt.model.gpt import GPT as GPT
    from mupgpt.model.init import init_weights as init_weights
    from mupgpt.mutransfer.bridge import BridgePlan as BridgePlan, plan_bridge as plan_bridge
    from mupgpt.mutransfer.proxy_check import ProxyCheck as ProxyCheck, check_proxy as check_proxy
    from mupgpt.mutransfer.transfer import TransferPlan as TransferPlan, transfer as transfer
    from mupgpt.mutransfer.tuned import Tuned as Tuned
    from mupgpt.optim.groups import param_groups as param_groups
    from mupgpt.optim.make import make_optimizer as make_optimizer
    from mupgpt.parametrization.layout import (
        ParamSpec as ParamSpec,
        count_params as count_params,
        layout as layout,
    )
    from mupgpt.parametrization.rules import RULES as RULES, Rule as Rule
    from mupgpt.parametrization.table import ParamTable as ParamTable, parametrize as parametrize
    from mupgpt.planning.flops import flops_per_token as flops_per_token
    from mupgpt.planning.model_card import model_card as model_card
    from mupgpt.presets import PRESETS as PRESETS
    from mupgpt.resolve import train_config as train_config
    from mupgpt.runs.generate import load_run as load_run, sample as sample
    from mupgpt.trainer import Trainer as Trainer
    from mupgpt.training.population import Population as Population
    from mupgpt.training.step import evaluate as evaluate, train_step as train_step
    from mupgpt.tuner.plan import TunePlan as TunePlan, plan_tune as plan_tune
    from mupgpt.tuner.search import Tuning as Tuning, tune as tune
    from mupgpt.tuning.best import best_hparams as best_hparams
    from mupgpt.tuning.import_runs import import_sweep as import_sweep
    from mupgpt.tuning.run import run_sweep as run_sweep
    from mupgpt.tuning.space import SearchSpace as SearchSpace
    from mupgpt.tuning.spec import SweepSpec as SweepSpec, load_spec as load_spec

_HOME = {
    "config.phases": "PhaseConfig",
    "config.plain": "load_toml",
    "config.schema": "Base DataConfig GPTConfig HParams ParallelConfig Prediction "
    "Schedule TrackingConfig TrainConfig",
    "data.corpus": "load_corpus",
    "errors": "CheckpointError ConfigError Crashed Diverged Interrupted",
    "evidence.bridge_verdict": "judge_bridge run_bridge",
    "evidence.coordinates": "coord_check",
    "evidence.coordinates_of_module": "coord_check_module",
    "evidence.fidelity": "Fidelity",
    "evidence.fidelity_runs": "plan_fidelity run_fidelity",
    "evidence.verdict": "judge judge_sweep",
    "interop.adopt": "Adopted adopt",
    "interop.describe": "describe",
    "model.gpt": "GPT",
    "model.init": "init_weights",
    "mutransfer.bridge": "BridgePlan plan_bridge",
    "mutransfer.proxy_check": "ProxyCheck check_proxy",
    "mutransfer.transfer": "TransferPlan transfer",
    "mutransfer.tuned": "Tuned",
    "optim.groups": "param_groups",
    "optim.make": "make_optimizer",
    "parametrization.layout": "ParamSpec count_params layout",
    "parametrization.rules": "RULES Rule",
    "parametrization.table": "ParamTable parametrize",
    "planning.flops": "flops_per_token",
    "planning.model_card": "model_card",
    "presets": "PRESETS",
    "resolve": "train_config",
    "runs.generate": "load_run sample",
    "trainer": "Trainer",
    "training.population": "Population",
    "training.step": "evaluate train_step",
    "tuner.plan": "TunePlan plan_tune",
    "tuner.search": "Tuning tune",
    "tuning.best": "best_hparams",
    "tuning.import_runs": "import_sweep",
    "tuning.run": "run_sweep",
    "tuning.space": "SearchSpace",
    "tuning.spec": "SweepSpec load_spec",
}
_MODULE_OF = {name: home for home, names in _HOME.items() for name in names.split()}
_WAS = {"RungPlan": "BridgePlan", "plan_rungs": "plan_bridge", "judge_rungs": "judge_bridge",
        "run_rungs": "run_bridge"}  # names of 0.1.0, for a version  # fmt: skip

__all__ = sorted(_MODULE_OF)

follow_old_paths()


def __getattr__(name: str) -> Any:
    name = _WAS.get(name, name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mupgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mupgpt.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
