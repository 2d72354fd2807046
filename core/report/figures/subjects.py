"""The figures of the subjects of a run: held-out subjects and their predictions, and the people of the cohort.

As in `search`, every function takes the record of a run, and raises `NothingToShow` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from core.objectives import with_unit
from core.report.answer.record import NothingToShow, RunRecord
from core.report.answer.subjects import are_numbers, held_out, site_names
from core.report.answer.verdict import comparisons
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

BIN = 5
"""The width of a bin of numbers, in their unit: suits ages."""


@styled
def gains(record: RunRecord) -> Figure:
    """How much smaller the winner's errors are than each other method's, with 95 % intervals."""
    made = [
        each for each in comparisons(record.predictions, record.task) if each.outcome != "too few subjects"
    ]
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
    in_words = record.task.in_words
    axes.set_yticks(
        range(len(made)),
        [
            f"against {in_words[each.other].removeprefix('the ').removeprefix('predicting the ')}"
            for each in made
        ],
    )
    axes.set(ylim=(len(made) - 0.5, -0.5), xlabel=_gain_label(record))
    axes.grid(visible=False, axis="y")
    return figure


def _gain_label(record: RunRecord) -> str:
    error = record.task.error
    return f"gain of the winner ({error.unit or error.title}; above 0: better)"


@styled
def predicted_against_true(record: RunRecord) -> Figure:
    """Predicted against true numbers of the held-out subjects (winner): mean and range over refits."""
    subjects = held_out(record)
    sites = _by_site(subjects)
    columns = 3 if max(len(site) for site, _ in sites) < 12 else 2
    figure, axes = new_figure(4.3 + 0.2 * np.ceil((len(sites) + 2) / columns), width=4.8)
    truth, floor = record.task.truth, record.task.floor
    least, most = subjects[["truth", "least"]].min().min(), subjects[["truth", "most"]].max().max()
    room = 0.04 * (most - least) or 1.0
    ends = [least - room, most + room]
    axes.plot(ends, ends, color=INK, lw=1, label=f"true {truth}")
    if floor is not None:
        value = record.predictions.loc[record.predictions["method"] == floor.method, "predicted"].median()
        if np.isfinite(value):
            axes.axhline(value, color=MUTED, lw=1, ls=(0, (4, 3)), label=floor.method)
    for index, (site, group) in enumerate(sites):
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        axes.vlines(group["truth"], group["least"], group["most"], color=colour, lw=1, alpha=0.6)
        axes.plot(
            group["truth"], group["predicted"], marker, color=colour, mec=PAPER, mew=0.6, ms=7, label=site
        )
    true, predicted = (with_unit(f"{word} {truth}", record.task.truth_unit) for word in ("true", "predicted"))
    axes.set(xlabel=true, ylabel=predicted, xlim=ends, ylim=ends, aspect="equal")
    figure.legend(loc="outside upper left", ncols=columns)
    return figure


def _by_site(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(site), group) for site, group in table.groupby("site", sort=True)]


@styled
def gap_by_site(record: RunRecord) -> Figure:
    """Gap (predicted minus true) of the held-out subjects, by site."""
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
    label = with_unit(f"predicted − true {record.task.truth}", record.task.truth_unit)
    axes.set(xlabel=label, ylim=(len(groups) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return figure


@styled
def cohort_people(record: RunRecord) -> Figure:
    """What is known of the people of the cohort, one histogram per site; held-out subjects are hatched."""
    if record.cohort.empty:
        raise NothingToShow("the cohort's manifest is not where the run says, so its people are unknown")
    truths, task = record.cohort["truth"], record.task
    known = record.cohort[truths.notna() & (truths.astype(str) != "")]
    if known.empty:
        raise NothingToShow(f"the {task.truth} of no scan is known")
    cohort = known.assign(site=site_names(known["site"]))
    held = set(record.splits.loc[record.splits["role"] == "holdout", "subject"])
    groups = _by_site(cohort)
    figure, grid = new_grid(0.9 + 0.85 * len(groups), rows=len(groups), columns=1, shared=True)
    classes = None if are_numbers(truths) else sorted(cohort["truth"].astype(str).unique())
    for axes, (site, group) in zip(grid, groups, strict=True):
        is_held = group["subject"].isin(held)
        parts = [group.loc[~is_held, "truth"], group.loc[is_held, "truth"]]
        _histogram(axes, parts, classes, cohort["truth"])
        axes.set_title(f"{site}, n = {len(group)}", fontsize=9, pad=2)
        axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.grid(visible=False, axis="x")
    grid[-1].set_xlabel(with_unit(task.truth, task.truth_unit))
    figure.supylabel(
        f"scans per {BIN} {task.truth_unit}".rstrip() if classes is None else "scans", fontsize=10
    )
    handles = [
        Patch(facecolor=ACCENT, label="training and validation"),
        Patch(facecolor=PAPER, edgecolor=SECOND, hatch="////", label="held out"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


def _histogram(
    axes: Axes, parts: Sequence[pd.Series], classes: Sequence[str] | None, every: pd.Series
) -> None:
    """Two parts of a site on top of each other: numbers in bins, or names of classes."""
    if classes is None:
        bins = np.arange(BIN * np.floor(every.min() / BIN), every.max() + BIN, BIN).tolist()
        places = [list(part) for part in parts]
    else:
        bins = (np.arange(len(classes) + 1) - 0.5).tolist()
        places = [[classes.index(str(name)) for name in part] for part in parts]
        axes.set_xticks(range(len(classes)), classes)
    axes.hist(places, bins=bins, stacked=True, color=[ACCENT, PAPER], edgecolor=[ACCENT, SECOND])
    _, bars_of_held = axes.containers
    for bar in bars_of_held:
        bar.set(hatch="////", visible=bar.get_height() > 0)
