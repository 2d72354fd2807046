"""The figures of the subjects of a run: held-out subjects and their predicted ages, and ages of the cohort.

As in `search`, every function takes the record of a run, and raises `NothingToShow` with the reason.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from core.report.answer.record import NothingToShow, RunRecord
from core.report.answer.subjects import held_out, site_names
from core.report.answer.verdict import IN_WORDS, comparisons
from core.report.figures.style import (
    ACCENT,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SECOND,
    SERIES,
    new_figure,
    new_grid,
    styled,
)
from core.run_names import MEDIAN


@styled
def gains(record: RunRecord) -> Figure:
    """How much smaller the winner's errors are than each other method's, with 95 % intervals (years)."""
    made = [each for each in comparisons(record.predictions) if each.outcome != "too few subjects"]
    if not made:
        raise NothingToShow("there are no paired predictions of enough held-out subjects")
    figure, axes = new_figure(1.0 + 0.4 * len(made))
    for place, each in enumerate(made):
        is_clear = each.outcome in ("better", "worse")
        axes.plot([each.low, each.high], [place, place], color=ACCENT if is_clear else MUTED, lw=2.2)
        axes.plot(
            each.gain, place, "o", mfc=ACCENT if is_clear else PAPER, mec=ACCENT if is_clear else MUTED, ms=8
        )
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(
        range(len(made)),
        [
            f"against {IN_WORDS[each.other].removeprefix('the ').removeprefix('predicting the ')}"
            for each in made
        ],
    )
    axes.set(ylim=(len(made) - 0.5, -0.5), xlabel="gain of the winner (years; above 0: better)")
    axes.grid(visible=False, axis="y")
    return figure


@styled
def predicted_age(record: RunRecord) -> Figure:
    """Predicted against true age of the held-out subjects (winner): mean and range over refits."""
    subjects = held_out(record)
    sites = _by_site(subjects)
    columns = 3 if max(len(site) for site, _ in sites) < 12 else 2
    figure, axes = new_figure(4.3 + 0.2 * np.ceil((len(sites) + 2) / columns), width=4.8)
    ends = [subjects[["age", "least"]].min().min() - 3, subjects[["age", "most"]].max().max() + 3]
    axes.plot(ends, ends, color=INK, lw=1, label="true age")
    median = record.predictions.loc[record.predictions["method"] == MEDIAN, "predicted"].median()
    if np.isfinite(median):
        axes.axhline(median, color=MUTED, lw=1, ls=(0, (4, 3)), label="training median")
    for index, (site, group) in enumerate(sites):
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        axes.vlines(group["age"], group["least"], group["most"], color=colour, lw=1, alpha=0.6)
        axes.plot(
            group["age"], group["predicted"], marker, color=colour, mec=PAPER, mew=0.6, ms=7, label=site
        )
    axes.set(xlabel="true age (years)", ylabel="predicted age (years)", xlim=ends, ylim=ends, aspect="equal")
    figure.legend(loc="outside upper left", ncols=columns)
    return figure


def _by_site(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(site), group) for site, group in table.groupby("site", sort=True)]


@styled
def gap_by_site(record: RunRecord) -> Figure:
    """Brain-age gap (predicted minus true age, years) of the held-out subjects, by site."""
    groups = _by_site(held_out(record))
    figure, axes = new_figure(1.0 + 0.5 * len(groups))
    axes.axvline(0, color=INK, lw=1)
    line = {"color": MUTED, "lw": 1.1}
    axes.boxplot(
        [group["gap"] for _, group in groups],
        positions=range(len(groups)),
        widths=0.56,
        orientation="horizontal",  # names of sites can be long
        showfliers=False,  # every subject is drawn as a dot
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": INK, "lw": 1.8},
    )
    rng = np.random.default_rng(0)
    for index, (_, group) in enumerate(groups):
        axes.plot(
            group["gap"],
            index + rng.uniform(-0.15, 0.15, len(group)),
            MARKERS[index % len(MARKERS)],
            color=SERIES[index % len(SERIES)],
            mec=PAPER,
            mew=0.6,
            ms=6,
        )
    axes.set_yticks(range(len(groups)), [f"{site}, n = {len(group)}" for site, group in groups])
    axes.set(xlabel="predicted − true age (years)", ylim=(len(groups) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return figure


@styled
def cohort_ages(record: RunRecord) -> Figure:
    """Ages of the subjects of the cohort, one histogram per site; held-out subjects are hatched."""
    if record.cohort.empty:
        raise NothingToShow("the cohort's manifest is not where the run says, so its ages are unknown")
    cohort = record.cohort.assign(site=site_names(record.cohort["site"]))
    held = set(record.splits.loc[record.splits["role"] == "holdout", "subject"])
    is_held = cohort["subject"].isin(held)
    groups = _by_site(cohort)
    bins = np.arange(5 * np.floor(cohort["age"].min() / 5), cohort["age"].max() + 5, 5)
    figure, grid = new_grid(0.9 + 0.85 * len(groups), rows=len(groups), columns=1, shared=True)
    for axes, (site, group) in zip(grid, groups, strict=True):
        parts = [group.loc[~is_held[group.index], "age"], group.loc[is_held[group.index], "age"]]
        axes.hist(
            parts,
            bins=bins.tolist(),
            stacked=True,
            color=[ACCENT, PAPER],
            edgecolor=[ACCENT, SECOND],
        )
        _, bars_of_held = axes.containers
        for bar in bars_of_held:
            bar.set(hatch="////", visible=bar.get_height() > 0)
        axes.set_title(f"{site}, n = {len(group)}", fontsize=9, pad=2)
        axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.grid(visible=False, axis="x")
    grid[-1].set_xlabel("age (years)")
    figure.supylabel("subjects per 5 years", fontsize=10)
    handles = [
        Patch(facecolor=ACCENT, label="training and validation"),
        Patch(facecolor=PAPER, edgecolor=SECOND, hatch="////", label="held out"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure
