"""The picture of a coordinate check: every probe against size, flat where the rule holds."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mupgpt.evidence.coordinate_report import CoordCheck
from mupgpt.evidence.slopes import Slope
from mupgpt.report.pictures import COLORS, STYLE, write_picture

__all__ = ["coord_picture"]

PANELS = {
    "init": "activations at init",
    "change": "their change",
    "gradient": "gradients at init",
    "update": "weights' change",
}


def coord_picture(check: CoordCheck, path: Path) -> list[Path]:
    """Write each probe's RMS over the rule's power of the size, as SVG and PNG; returns both paths.

    A row is a setting, a panel a measure. A probe that keeps to its exponent is a level line; one
    that does not is dashed.
    """
    settings = list(dict.fromkeys(slope.setting for slope in check.slopes))
    with matplotlib.rc_context(STYLE):
        size = (3.6 * len(PANELS), 3.6 * len(settings))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(settings), len(PANELS), sharex=True, squeeze=False)
        for row, setting in zip(grid, settings, strict=True):
            for axes, (measure, title) in zip(row, PANELS.items(), strict=True):
                slopes = [s for s in check.slopes if (s.setting, s.measure) == (setting, measure)]
                _panel(axes, check.sizes, slopes)
                axes.set_title(f"{title}, {setting}", fontsize=10)
            row[0].set_ylabel(f"log2 of RMS / {check.axis}^expected, from the base")
        for axes in grid[-1]:
            axes.set_xlabel(check.axis)
        verdict = "passed" if check.passed else "failed: " + ", ".join(check.suspects)
        figure.suptitle(f"Coordinate check of {check.rule} over {check.axis}: {verdict}")
        return write_picture(figure, path)


def _panel(axes: Axes, sizes: tuple[float, ...], slopes: list[Slope]) -> None:
    log2_size = np.log2(sizes)
    for i, slope in enumerate(slopes):
        rest = np.array(slope.log2_rms) - slope.expected * log2_size
        color = COLORS(0.9 * i / max(1, len(slopes) - 1))
        style = ".-" if slope.ok else ".--"
        axes.plot(sizes, rest - rest[0], style, color=color, label=slope.probe)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1.0), max(high, 1.0))
    axes.legend(frameon=False, fontsize=7, ncols=2)
