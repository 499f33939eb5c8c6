"""The picture of a fitted law: measured and fitted points, their difference, and the prediction."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mupgpt.report.pictures import COLORS, STYLE, write_picture
from mupgpt.scaling.named import Series
from mupgpt.scaling.report import LawReport

__all__ = ["law_picture"]


def law_picture(report: LawReport, path: Path) -> list[Path]:
    """Write what was measured (dots) over what the law says (lines), and by how much it misses.

    Returns the paths of an SVG and a PNG. A prediction is drawn with its interval where the law
    predicts what the picture shows.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _curves(upper, lower, report.series)
        _prediction(upper, report)
        if upper.get_legend_handles_labels()[0]:
            upper.legend(frameon=False)
        upper.set_title(f"{report.law}: {report.formula}", fontsize=9)
        return write_picture(figure, path)


def _curves(upper: Axes, lower: Axes, series: Series) -> None:
    groups = np.unique(series.group)
    for i, group in enumerate(groups):
        own = np.flatnonzero(series.group == group)
        own = own[np.argsort(series.x[own], kind="stable")]
        color = COLORS(0.85 * i / max(1, len(groups) - 1))
        x, measured, fitted = series.x[own], series.measured[own], series.fitted[own]
        label = f"{group:.3g} parameters" if group else None
        upper.plot(
            x, fitted, color=color, lw=1.2, label=label if series.x_name == "tokens" else None
        )
        upper.plot(x, measured, ".", color=color)
        lower.plot(x, 100 * (measured / fitted - 1), ".", color=color)
    lower.axhline(0, color="0.6", lw=0.8)
    lower.set_xscale("linear" if series.x_name == "step" else "log")
    upper.set_yscale("linear" if series.y_name.startswith("loss") else "log")
    lower.set_xlabel(series.x_name)
    lower.set_ylabel("measured − law, %")
    upper.set_ylabel(series.y_name)


def _prediction(axes: Axes, report: LawReport) -> None:
    """The predicted loss with its interval, at the place on the axis that the inputs name."""
    places = {"tokens": "tokens", "step": "steps"}
    at = report.at.get(places.get(report.series.x_name, "flops"))
    if at is None or "loss" not in report.predicted or "loss" not in report.series.y_name:
        return
    value, interval = report.predicted["loss"]
    low, high = interval or (value, value)
    axes.errorbar(
        [at], [value], yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        fmt="o", mfc="white", color="black", capsize=3, label="prediction",
    )  # fmt: skip
