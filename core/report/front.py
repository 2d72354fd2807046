"""Several objectives at once: the trials that no other trial beats in all of them, as a table and a figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from core.objectives import OBJECTIVES
from core.report.describe import describe
from core.report.record import RunRecord
from core.report.style import ACCENT, INK, MUTED, NothingToDraw, legend_above, new_figure, styled
from core.report.tables import mean_and_sd


def completed_with_objectives(record: RunRecord) -> pd.DataFrame:
    """The completed trials inside the space, with one column per objective of the search, all finite."""
    trials = record.trials[record.trials["state"] == "COMPLETE"]
    if "outside" in trials:
        trials = trials[~trials["outside"].fillna(False).astype(bool)]
    first, *others = record.objectives
    named = trials.assign(**{first: trials["value"]})
    absent = [name for name in others if name not in named]
    return named.assign(**dict.fromkeys(absent, np.nan)).dropna(subset=record.objectives)


def pareto_front(record: RunRecord) -> pd.DataFrame:
    """The completed trials that no other beats: none is at least as good in every objective and better in one.

    In the order of the first objective. Empty where the search had one objective.
    """
    trials = completed_with_objectives(record)
    if len(record.objectives) < 2 or trials.empty:
        return trials.head(0)
    values_nk = trials[record.objectives].to_numpy(float)
    no_worse_nn = (values_nk[:, None] <= values_nk[None]).all(axis=2)
    better_nn = (values_nk[:, None] < values_nk[None]).any(axis=2)
    is_beaten_n = (no_worse_nn & better_nn).any(axis=0)
    return trials[pd.Series(~is_beaten_n, trials.index)].sort_values(by=[*record.objectives, "number"])


def front_table(record: RunRecord) -> pd.DataFrame:
    """The front for people: trial, one column per objective by its label, what (the configuration in few words)."""
    settings = record.searched()
    rows: list[dict[str, Any]] = [
        {
            "trial": int(row["number"]),
            **{OBJECTIVES[name].label: mean_and_sd(row[name], float("nan")) for name in record.objectives},
            "what": describe({name: row[name] for name in settings}, most=7),
        }
        for _, row in pareto_front(record).iterrows()
    ]
    return pd.DataFrame(rows)


@styled
def pareto_figure(record: RunRecord) -> Figure:
    """Every completed trial by the first objective and each of the others; the front is joined."""
    if len(record.objectives) < 2:
        raise NothingToDraw("the search had one objective")
    trials, front = completed_with_objectives(record), pareto_front(record)
    if trials.empty:
        raise NothingToDraw("no trial was completed with all objectives")
    first, *others = record.objectives
    figure, all_axes = new_figure(3.2, nrows=1, ncols=len(others), squeeze=False)
    for axes, other in zip(all_axes[0], others, strict=True):
        rest = trials[~trials["number"].isin(front["number"])]
        axes.plot(rest[first], rest[other], "o", mfc="none", mec=MUTED, label="beaten" if len(rest) else None)
        style = "o-" if len(others) == 1 else "o"  # of three or more, the front is no line in two of them
        axes.plot(front[first], front[other], style, color=ACCENT, label="not beaten")
        winner = front[front["number"] == record.best]
        axes.plot(winner[first], winner[other], "o", mfc="none", mec=INK, ms=11, mew=1.3, label="winner")
        axes.set(xlabel=OBJECTIVES[first].label, ylabel=OBJECTIVES[other].label)
    legend_above(all_axes[0][0])
    return figure


def front_in_words(record: RunRecord) -> str:
    """The figure for those who cannot see it."""
    front = pareto_front(record)
    named = "; ".join(
        f"trial {int(row['number'])}: "
        + ", ".join(f"{OBJECTIVES[name].label} {row[name]:.3g}" for name in record.objectives)
        for _, row in front.iterrows()
    )
    return (
        f"{len(front)} of {len(completed_with_objectives(record))} completed trials are not beaten. {named}."
    )
