"""Commands to run before the expensive run: is the proxy adequate, and does its rate hold above?"""

import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from mupgpt.cli.shared import one_thread, print_json, read_config, stem, write_text
from mupgpt.cli.sweeps import source_of
from mupgpt.config.plain import load_toml
from mupgpt.config.schema import TrainConfig
from mupgpt.errors import unknown
from mupgpt.presets import PRESETS
from mupgpt.resolve import train_config
from mupgpt.util.bundled import bundled

__all__ = ["COMMANDS"]


def check_proxy(
    spec: Positional[str],
    to: str,
    cell: str | None = None,
    critical_batch: float = 0.0,
    json: bool = False,
) -> int:
    """Say whether a proxy is adequate for its target, line by line; exit 1 when it is not. Instant.

    Args:
        spec: A sweep's name or TOML file, or the proxy's run: a preset's name or a config file.
        to: The target: a preset's name or a config file.
        cell: Which study of a sweep with several (default: the first).
        critical_batch: The proxy's critical batch size in tokens, where measured.
        json: Print machine-readable data.
    """
    from mupgpt.mutransfer.proxy_check import check_proxy as check
    from mupgpt.mutransfer.transfer import transfer
    from mupgpt.parametrization.axes import AXES

    proxy, seeds = _proxy(spec, cell)
    target = transfer(proxy, read_config(to), accept=AXES).config
    found = check(proxy, target, seeds=seeds, critical_batch=critical_batch)
    if json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0 if found.adequate else 1


def _proxy(name: str, cell: str | None) -> tuple[TrainConfig, int | None]:
    """The run that a sweep varies and its seeds, or a run whose sweep is not known."""
    is_sweep = name in bundled("sweeps") or (Path(name).is_file() and "space" in load_toml(name))
    if not is_sweep:
        return train_config(read_config(name)), None
    from mupgpt.tuning.spec import load_spec

    spec = load_spec(name)
    cells = {c.name: c for c in spec.cells}
    if cell is not None and cell not in cells:
        raise unknown("study", cell, cells)
    taken = cell or next(iter(cells))
    if cell is None and len(cells) > 1:
        print(f"taking {taken}; another one: --cell NAME", file=sys.stderr)
    return cells[taken].config(), len(spec.study.seeds)


def rungs(
    study: Positional[str],
    to: str,
    run: bool = False,
    max_share: float = 0.01,
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    cell: str | None = None,
    storage: str | None = None,
    json: bool = False,
) -> int:
    """Plan runs between proxy and target at half, once and twice the learning rate; or run them.

    With --run the end is GO (exit 0) or NO-GO (exit 1); the same command continues.

    Args:
        study: The sweep's name or folder, or a preset whose published values to take.
        to: The target: a preset's name or a config file.
        run: Train what is not finished, and judge.
        max_share: Share of the target's training FLOPs that all runs together may take.
        seeds: At least two; each trains every rung at every learning rate.
        out: Folder for the configs, and for the results (default for these:
            runs/rungs/STUDY-to-TARGET).
        cell: Which study of a sweep with several (default: the first).
        storage: Optuna storage URL.
        json: Print machine-readable data.
    """
    from mupgpt.mutransfer.bridge import plan_bridge

    source = source_of(study, cell, storage)
    plan = plan_bridge(source, read_config(to), seeds=seeds, max_share=max_share)
    if not (run and json):
        _say(plan, json)
    if out is not None:
        configs = plan.to_toml()
        for name, text in configs.items():
            write_text(out / name, text)
        print(f"wrote {len(configs)} configs to {out}", file=sys.stderr)
    if not run:
        print("train and judge them: the same command with --run", file=sys.stderr)
        return 0
    from mupgpt.evidence.bridge_verdict import run_bridge

    one_thread()
    folder = out or Path("runs") / "rungs" / f"{_label(study)}-to-{_label(to)}"
    verdict = run_bridge(plan, folder)
    _say(verdict, json)
    return 0 if verdict.go else 1


def _label(name: str) -> str:
    return name if name in PRESETS else Path(stem(name)).stem


def _say(found: Any, json: bool) -> None:
    if json:
        print_json(found.to_dict())
    else:
        print(found, flush=True)


COMMANDS = (check_proxy, rungs)
