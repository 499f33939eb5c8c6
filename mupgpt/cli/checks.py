"""Commands that say whether µP holds: over widths of a sweep, and in the model itself."""

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mupgpt.cli.runs import ShapeFlags
from mupgpt.cli.shared import one_thread, print_json, read_config, stem
from mupgpt.cli.sweeps import study_of
from mupgpt.errors import require

__all__ = ["COMMANDS"]

SMALL = ShapeFlags(n_layer=2, d_model=64, d_head=32, vocab_size=64, seq_len=8)
"""The smallest model of a coordinate check."""


def verdict(
    study: Positional[str],
    storage: str | None = None,
    tolerance: float | None = None,
    axis: Literal["width", "depth", "density", "context", "batch", "steps", "horizon"]
    | None = None,
    json: bool = False,
    picture: Path | None = None,
) -> None:
    """Say whether the best hyperparameters stay put over width (or another size), with intervals.

    Args:
        study: The sweep's name or folder (`lr`, or one like it), or a folder with a verdict.json.
        storage: Optuna storage URL.
        tolerance: Octaves of the hyperparameter per doubling of the size that count as staying
            put (default 0.2).
        axis: The size that grows (default: the one that the sweep varies).
        json: Print machine-readable data.
        picture: Write the curves there, as SVG and PNG.
    """
    from mupgpt.evidence.verdict import TOLERANCE, judge_sweep, load_verdict
    from mupgpt.tuning.study import Sweep

    written = Path(study) / "verdict.json"
    if written.is_file():
        result = load_verdict(written, tolerance)
    else:
        result = judge_sweep(
            Sweep.open(stem(study), storage), TOLERANCE if tolerance is None else tolerance, axis
        )
    if picture is not None:
        from mupgpt.report.pictures import verdict_picture

        verdict_picture(result, picture)
    if json:
        print_json(result.to_dict())
    else:
        print(result)


def fidelity(
    study: Positional[str],
    to: str,
    widths: tuple[int, ...] = (),
    configs: int = 24,
    share: float = 0.1,
    seeds: int = 2,
    cell: str | None = None,
    storage: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
    picture: Path | None = None,
) -> int:
    """Say whether a sweep's proxy ranks configurations as larger models do; exit 1 unless FAITHFUL.

    Some of its trials, from the best to the worst, are trained again at larger widths.

    Args:
        study: The sweep's name or folder.
        to: The target: a preset's name or a config file.
        widths: Widths above the proxy's (default: doubled as far as the share goes).
        configs: Trials that are trained again, the winner among them.
        share: Share of the target's training FLOPs that all runs together may take.
        seeds: Fresh seeds for each.
        cell: Which study of a sweep with several (default: the first).
        storage: Optuna storage URL.
        out: Folder for the runs' results (default: runs/fidelity/STUDY); the same command goes on.
        dry_run: Say what would be trained, and what it costs.
        json: Print machine-readable data.
        picture: Write losses and ranks over the width there, as SVG and PNG.
    """
    from mupgpt.evidence.fidelity_runs import plan_fidelity, run_fidelity

    one_thread()
    one = study_of(study, cell, storage)
    plan = plan_fidelity(one, read_config(to), widths, configs, share, seeds)
    print(plan, file=sys.stderr, flush=True)
    if dry_run:
        return 0
    found = run_fidelity(plan, out or Path("runs") / "fidelity" / plan.cell.name.replace("/", "_"))
    if picture is not None:
        from mupgpt.report.fidelity_picture import fidelity_picture

        fidelity_picture(found, picture)
    if json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0 if found.verdict == "FAITHFUL" else 1


def coord_check(
    rule: str = "mup",
    widths: tuple[int, ...] = (),
    depths: tuple[int, ...] = (),
    densities: tuple[float, ...] = (),
    axis: Literal["width", "depth", "density"] = "width",
    seeds: tuple[int, ...] = (),
    steps: int = 10,
    model: ShapeFlags = SMALL,
    backend: str | None = None,
    json: bool = False,
    picture: Path | None = None,
) -> int:
    """Measure how activations, gradients and updates scale with size, against the rule's exponents.

    Args:
        rule: The parametrization under check.
        widths: At least three multiples of 32 (default: 64 128 256 512).
        depths: At least three numbers of layers, with axis depth (default: 2 4 8 16).
        densities: At least three shares of kept weights, with axis density (default: 1/8 … 1).
        axis: What grows.
        seeds: At least three; each gives one slope (default: 0 … 7).
        steps: Optimizer steps over which change is measured, at least 10.
        model: What to change in the smallest model, e.g. --model.activation swiglu.
        backend: Compile the training step by this backend of torch.compile.
        json: Print machine-readable data.
        picture: Write the curves there, as SVG and PNG.
    """
    from mupgpt.evidence.coordinates import SEEDS, coord_check as check
    from mupgpt.parametrization.axes import find_axis

    one_thread()
    sizes = {"width": widths, "depth": depths, "density": densities}
    for name, given in sizes.items():
        require(
            name == axis or not given, find_axis(name).sizes, given, f"be left out with axis {axis}"
        )
    result = check(
        rule,
        axis=axis,
        sizes=sizes[axis],
        seeds=seeds or SEEDS,
        steps=steps,
        shape={k: v for k, v in vars(model).items() if v != getattr(SMALL, k)},
        backend=backend,
    )
    if picture is not None:
        from mupgpt.report.coord_picture import coord_picture

        coord_picture(result, picture)
    if json:
        print_json(result.to_dict())
    else:
        print(result)
    return 0 if result.passed else 1


COMMANDS = (verdict, fidelity, coord_check)
