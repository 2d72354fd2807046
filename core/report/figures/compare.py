"""The figure of a comparison of runs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from core.report.figures.style import ACCENT, MUTED, PAPER, new_figure, styled


@styled
def methods_side_by_side(table: pd.DataFrame, label: str) -> Figure:
    """The value of every method with its 95 % interval over held-out people.

    Args:
        table: columns method, task, value, low and high.
        label: of the metric.
    """
    figure, axes = new_figure(1.0 + 0.4 * len(table))
    for place, row in enumerate(table.to_dict(orient="records")):
        # What is no run is there to be beaten.
        colour = ACCENT if row["task"] in set(table["task"]) - {"–"} else MUTED
        axes.plot([row["low"], row["high"]], [place, place], color=colour, lw=2.2)
        axes.plot(row["value"], place, "o", mfc=colour, mec=PAPER, ms=8)
    axes.set_yticks(range(len(table)), list(table["method"]))
    axes.set(ylim=(len(table) - 0.5, -0.5), xlabel=label)
    axes.grid(visible=False, axis="y")
    return figure
