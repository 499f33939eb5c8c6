"""Commands that say whether µP holds: over widths of a sweep, and in the model itself."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mupgpt.cli.runs import ShapeFlags
from mupgpt.cli.shared import one_thread, print_json, stem
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


COMMANDS = (verdict, coord_check)
