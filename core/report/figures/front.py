"""The figure of several objectives: the completed trials, and the front of those that no other trial beats."""

from __future__ import annotations

from matplotlib.figure import Figure

from core.report.answer.front import completed_with_objectives, pareto_front
from core.report.answer.record import NothingToShow, RunRecord
from core.report.figures.style import ACCENT, INK, MUTED, legend_above, new_grid, styled


@styled
def pareto_figure(record: RunRecord) -> Figure:
    """Every completed trial by the first objective and each of the others; the front is joined."""
    if len(record.objectives) < 2:
        raise NothingToShow("the search had one objective")
    trials, front = completed_with_objectives(record), pareto_front(record)
    if trials.empty:
        raise NothingToShow("no trial was completed with all objectives")
    first, *others = record.objectives
    figure, all_axes = new_grid(3.2, rows=1, columns=len(others))
    for axes, other in zip(all_axes, others, strict=True):
        rest = trials[~trials["number"].isin(front["number"])]
        axes.plot(rest[first], rest[other], "o", mfc="none", mec=MUTED, label="beaten" if len(rest) else None)
        # with three or more objectives the front is not a line in two of them
        style = "o-" if len(others) == 1 else "o"
        axes.plot(front[first], front[other], style, color=ACCENT, label="not beaten")
        winner = front[front["number"] == record.best]
        axes.plot(winner[first], winner[other], "o", mfc="none", mec=INK, ms=11, mew=1.3, label="winner")
        axes.set(xlabel=record.metric(first).label, ylabel=record.metric(other).label)
    legend_above(all_axes[0])
    return figure
