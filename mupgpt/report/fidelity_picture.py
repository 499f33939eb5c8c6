"""The picture of a fidelity verdict: each configuration's loss, and its rank, over the width."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from mupgpt.evidence.fidelity import Fidelity
from mupgpt.report.pictures import COLORS, STYLE, write_picture

__all__ = ["fidelity_picture"]


def fidelity_picture(found: Fidelity, path: Path) -> list[Path]:
    """Write it as SVG and PNG; returns both paths.

    A line is one configuration, coloured from the sweep's best to its worst; the winner is thick.
    Left its mean loss, right its rank among the sample: lines that cross are ranks that changed.
    """
    ranks = np.array([stats.rankdata(row) for row in found.means])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lines(left, found, found.means)
        left.set_ylabel("held-out loss, nats per token")
        _lines(right, found, ranks)
        right.set_ylabel("rank (1 is best)")
        right.invert_yaxis()
        last = found.agreements[-1]
        figure.suptitle(
            f"{found.study}: {found.verdict}; ranks kept at width {found.widths[-1]}: "
            f"{last.ranks:.2f} [{last.low:.2f}, {last.high:.2f}]"
        )
        return write_picture(figure, path)


def _lines(axes: Axes, found: Fidelity, values: np.ndarray) -> None:
    order = stats.rankdata(found.swept) - 1
    for c in reversed(range(values.shape[1])):
        color = COLORS(0.9 * order[c] / max(1, len(order) - 1))
        axes.plot(found.widths, values[:, c], color=color, lw=3.0 if c == 0 else 1.0, marker=".")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.widths, [str(w) for w in found.widths])
    axes.set_xlabel("width")
