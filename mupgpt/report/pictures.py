"""Pictures: matplotlib without a display, the same bytes for the same data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mupgpt.evidence.drift import Drift
from mupgpt.evidence.verdict import Verdict
from mupgpt.tuning.curves import Curve

__all__ = ["COLORS", "STYLE", "verdict_picture", "write_picture"]

NAMES = {"hparams.lr": "learning rate"}
COLORS = matplotlib.colormaps["viridis"]
STYLE = {
    "svg.hashsalt": "mupgpt",
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def verdict_picture(verdict: Verdict, path: Path) -> list[Path]:
    """Write the verdict's curves as SVG and PNG; returns both paths.

    One row of panels a hyperparameter, one panel a rule, one curve a size. The dot on a curve is
    the mean optimum over the seeds; the band spans the seeds.
    """
    with matplotlib.rc_context(STYLE):
        rules, hparams = list(verdict.rules), list(verdict.drifts)
        figure = Figure(figsize=(4.6 * len(rules), 0.6 + 3.6 * len(hparams)), layout="constrained")
        panels = figure.subplots(len(hparams), len(rules), sharey="row", squeeze=False)
        for row, hparam in zip(panels, hparams, strict=True):
            for axes, rule in zip(row, rules, strict=True):
                _panel(axes, verdict.drifts[hparam][rule], verdict.curves[hparam][rule])
            row[0].set_ylabel("held-out loss, nats per token")
        panels[0][0].legend(frameon=False, title=verdict.axis)
        seeds = len(verdict.rules[verdict.rule].shifts)
        one = NAMES.get(hparams[0], hparams[0].removeprefix("hparams."))
        what = f"The best {one}" if len(hparams) == 1 else "The best hyperparameters"
        figure.suptitle(f"{what} over {verdict.axis} ({verdict.corpus['name']}, {seeds} seeds)")
        return write_picture(figure, path)


def _panel(axes: Axes, drift: Drift, curves: Mapping[float, Curve]) -> None:
    low, high = drift.ci95
    for i, size in enumerate(drift.sizes):
        curve = curves[size]
        color = COLORS(0.85 * i / max(1, len(drift.sizes) - 1))
        value, loss = 2.0**curve.log2, curve.loss.mean(axis=1)
        axes.plot(value, loss, color=color, marker=".", label=f"{size:g}")
        axes.fill_between(
            value, curve.loss.min(axis=1), curve.loss.max(axis=1), color=color, alpha=0.15, lw=0
        )
        best = float(np.mean(drift.optimum[size]))
        at = np.interp(best, curve.log2, loss)
        axes.plot(2.0**best, min(at, loss.min()), "o", color=color, ms=9, mec="black", mew=0.8)
    axes.set_xscale("log", base=2)
    name = NAMES.get(drift.hparam, drift.hparam.removeprefix("hparams."))
    axes.set_xlabel(f"{name} at the base")
    interval = f"{drift.shift:+.2f} [{low:+.2f}, {high:+.2f}]"
    axes.set_title(f"{drift.rule}: {interval} octaves per doubling", fontsize=10)


def write_picture(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as SVG and PNG, the same bytes for the same data; returns both paths."""
    paths = [path.with_suffix(".svg"), path.with_suffix(".png")]
    undated: dict[str, Any] = {"Date": None}
    figure.savefig(paths[0], metadata=undated)
    figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths
