"""The figure of a curve: what labels bring, from every start."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from core.report.answer.record import NothingToShow
from core.report.figures.style import MARKERS, MUTED, PAPER, SERIES, legend_above, new_figure, styled


@styled
def label_curve(table: pd.DataFrame, trained: list[str], label: str) -> Figure:
    """The metric against the number of labelled people, with its 95 % interval over held-out people.

    Args:
        table: columns method, labelled, value, low and high.
        trained: the methods that are searched at every budget; others are drawn in grey.
        label: of the metric.
    """
    if table.empty:
        raise NothingToShow("no budget has a result yet")
    figure, axes = new_figure(3.8)
    methods = list(table["method"].unique())
    for place, method in enumerate([*trained, *(name for name in methods if name not in trained)]):
        points = table[(table["method"] == method) & table["value"].notna()].sort_values("labelled")
        if points.empty:
            continue
        colour = SERIES[place % len(SERIES)] if method in trained else MUTED
        # Side by side, so that intervals do not hide each other.
        x = points["labelled"].to_numpy(float) * 2.0 ** (0.05 * (place - (len(methods) - 1) / 2))
        axes.plot(
            x, points["value"], MARKERS[place % len(MARKERS)], ls="-" if method in trained else (0, (4, 3)),
            color=colour, mec=PAPER, mew=0.6, ms=7, label=method,
        )  # fmt: skip
        if method in trained:
            axes.vlines(x, points["low"], points["high"], color=colour, lw=1.4, alpha=0.7)
    budgets = np.unique(table["labelled"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    axes.set(xlabel="labelled people to train on", ylabel=label)
    legend_above(axes, 2)
    return figure
