"""Commands that run sweeps, read them, and transfer what they found."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from mupgpt.cli import laws
from mupgpt.cli.shared import one_thread, print_json, read_config, stem, write_text
from mupgpt.config.plain import to_dict
from mupgpt.errors import require, unknown
from mupgpt.presets import PRESETS
from mupgpt.resolve import train_config

__all__ = ["COMMANDS", "SWEEP", "source_of", "study_of"]


def sweep_run(
    spec: Positional[str], workers: int | None = None, storage: str | None = None
) -> None:
    """Run or continue a sweep, to exactly its budget.

    Args:
        spec: A shipped sweep's name or a TOML file.
        workers: Processes (default: one a GPU, or one of one thread a core).
        storage: Optuna storage URL (default: SQLite in runs/sweeps/NAME).
    """
    from mupgpt.tuning.run import run_sweep
    from mupgpt.tuning.spec import load_spec

    loaded = load_spec(spec)
    run_sweep(loaded, workers=workers, storage=storage)
    sweep_status(loaded.name, storage)


def sweep_status(name: Positional[str], storage: str | None = None) -> None:
    """Show how far each study of a sweep is, and its best trial so far.

    Args:
        name: The sweep's name or folder.
        storage: Optuna storage URL.
    """
    from mupgpt.tuning.study import Sweep, finished, trials_of
    from mupgpt.tuning.urls import shown

    sweep = Sweep.open(stem(name), storage)
    print(f"storage {shown(sweep.url)}")
    for cell in sweep.spec.cells:
        trials = trials_of(sweep.storage, cell.name)
        states = [t.state.name.lower() for t in trials]
        counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        best = finished(sweep.study(cell))[:1]
        found = "".join(f"; best {t.value:.4f} at {_params(t.params)}" for t in best)
        print(f"{cell.name}: {counts or 'nothing yet'}{found}")


def _params(params: dict[str, Any]) -> str:
    return ", ".join(f"{k.removeprefix('hparams.')} {v:.4g}" for k, v in params.items())


def sweep_best(
    name: Positional[str],
    storage: str | None = None,
    top: int = 3,
    seeds: int = 3,
    json: bool = False,
) -> None:
    """Train a sweep's top trials again on fresh seeds and print the winner of each study.

    Args:
        name: The sweep's name or folder.
        storage: Optuna storage URL.
        top: How many trials compete.
        seeds: Fresh seeds for each (0: nothing is trained, the sweep's own losses stand).
        json: Print machine-readable data.
    """
    from mupgpt.tuning.best import best_hparams
    from mupgpt.tuning.study import Sweep

    one_thread()
    studies = Sweep.open(stem(name), storage).studies()
    best = {key: best_hparams(study, top, seeds) for key, study in studies.items()}
    if json:
        print_json({key: to_dict(tuned) for key, tuned in best.items()})
        return
    for tuned in best.values():
        print(tuned)


def tune(
    to: Positional[str],
    budget: float = 0.1,
    workers: int | None = None,
    storage: str | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    accept: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Tune a target within a share of its FLOPs: search proxies, keep what holds wider, transfer.

    A search runs on a narrow model of the target's own recipe, and its best are trained again at a
    larger width. The same command goes on after an interrupt.

    Args:
        to: The target: a preset's name or a config file.
        budget: Share of the target's training FLOPs that all runs together may take.
        workers: One-thread processes (default: one a core).
        storage: Optuna storage URL (default: SQLite in runs/sweeps).
        out: The target's config (TOML).
        accept: An axis that no rule covers (may be given several times).
        dry_run: Say what would be trained, and what it costs.
        json: Print machine-readable data.
    """
    from mupgpt.tuner.plan import plan_tune
    from mupgpt.tuner.search import tune

    one_thread()
    name = f"tune-{Path(to).stem if to not in PRESETS else to}"
    plan = plan_tune(read_config(to), budget, name=name)
    print(plan, file=sys.stderr, flush=True)
    if dry_run:
        return
    found = tune(plan, workers=workers, storage=storage)
    moved = found.transfer_to(accept)
    if out is not None:
        write_text(out, moved.to_toml())
    if json:
        print_json({**found.to_dict(), "transfer": moved.to_dict()})
        return
    print(found, moved, sep="\n\n")
    if out is not None:
        print(f"\nwrote {out}; execute it with: mupgpt train {out}")


def transfer(
    study: Positional[str],
    to: str,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    accept: UseAppendAction[tuple[str, ...]] = (),
    choose: UseAppendAction[tuple[str, ...]] = (),
    cell: str | None = None,
    storage: str | None = None,
    seeds: int = 3,
    ladder: str | None = None,
    json: bool = False,
) -> None:
    """Write the config of another size from a sweep's best hyperparameters.

    Args:
        study: The sweep's name or folder, or a preset whose published values to take.
        to: The target: a preset's name or a config file.
        out: The target's config (TOML).
        accept: An axis that no rule covers (may be given several times).
        choose: What to do beside the rule: batch-sqrt, batch-half-life, decay-to-zero, decay-time.
        cell: Which study of a sweep with several (default: the first).
        storage: Optuna storage URL.
        seeds: Fresh seeds that confirm the winner (0: the sweep's own losses stand).
        ladder: A ladder of small runs (a name or a TOML file) that predicts the target's loss.
        json: Print the record.
    """
    from mupgpt.mutransfer.transfer import transfer as plan_of

    source = source_of(study, cell, storage, seeds)
    plan = plan_of(source, to if to in PRESETS else read_config(to), accept, choose)
    if ladder is not None:
        plan = laws.predicted(plan, ladder)
    if out is not None:
        write_text(out, plan.to_toml())
    if json:
        print_json(plan.to_dict())
        return
    from mupgpt.report.tables import table_text

    print(plan, table_text(plan.config, plan.table), sep="\n\n")
    if out is not None:
        print(f"\nwrote {out}; execute it with: mupgpt train {out}")


def source_of(study: str, cell: str | None, storage: str | None, seeds: int = 3) -> Any:
    """What a sweep found (or one of its studies), or a preset's published values."""
    if study in PRESETS:
        return train_config({"model": study})
    from mupgpt.tuning.best import best_hparams

    one_thread()
    return best_hparams(study_of(study, cell, storage), seeds=seeds)


def study_of(name: str, cell: str | None, storage: str | None) -> Any:
    """One study of a sweep: that of ``cell``, or the first, which is said where there are more."""
    from mupgpt.tuning.study import Sweep

    studies = Sweep.open(stem(name), storage).studies()
    if cell is not None and cell not in studies:
        raise unknown("study", cell, studies)
    taken = cell or next(iter(studies))
    if cell is None and len(studies) > 1:
        print(f"taking {taken}; another one: --cell NAME", file=sys.stderr)
    return studies[taken]


def sweep_import(
    file: Positional[Path],
    spec: str,
    columns: tuple[str, ...] = (),
    storage: str | None = None,
) -> None:
    """Turn somebody's finished runs, exported as a table, into a sweep; nothing is trained.

    Args:
        file: CSV, TSV, JSON or JSON lines, one run a row (a wandb export, nested or flat).
        spec: What was trained and searched: a sweep's TOML file, or a shipped one's name.
        columns: Columns with names of their own, as hparams.lr=my_lr,loss=final.
        storage: Optuna storage URL (default: SQLite in runs/sweeps/NAME).
    """
    from mupgpt.tuning.import_runs import import_sweep

    pairs = [pair for part in columns for pair in re.split(r",(?=[\w.]+=)", part)]
    for pair in pairs:
        require("=" in pair, "columns", pair, "be KEY=COLUMN, as in hparams.lr=my_lr")
    mapped = dict(pair.split("=", 1) for pair in pairs)
    print(import_sweep(file, spec, mapped, storage))


def sweep_importance(name: Positional[str], storage: str | None = None, json: bool = False) -> None:
    """Print how much each hyperparameter decides about a trial being among the best.

    Args:
        name: The sweep's name or folder.
        storage: Optuna storage URL.
        json: Print machine-readable data.
    """
    from mupgpt.tuning.best import importances
    from mupgpt.tuning.study import Sweep

    studies = Sweep.open(stem(name), storage).studies()
    found = {key: importances(study) for key, study in studies.items()}
    if json:
        print_json(found)
        return
    for key, shares in found.items():
        print(key, *(f"  {param:<24} {share:5.0%}" for param, share in shares.items()), sep="\n")


def sweep_dashboard(name: Positional[str], storage: str | None = None, port: int = 8080) -> None:
    """Show a sweep in optuna-dashboard on 127.0.0.1, read-only (extra: dashboard).

    Args:
        name: The sweep's name or folder.
        storage: Optuna storage URL.
        port: Where to listen (0: a free one).
    """
    from mupgpt.report.dashboard import serve
    from mupgpt.tuning.study import Sweep

    serve(Sweep.open(stem(name), storage).storage, port)


SWEEP = {
    "run": sweep_run,
    "import": sweep_import,
    "status": sweep_status,
    "best": sweep_best,
    "importance": sweep_importance,
    "dashboard": sweep_dashboard,
}
COMMANDS = (tune, transfer)
