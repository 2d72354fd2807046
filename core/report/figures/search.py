"""The figures of a search. Every function takes the record of a run and returns a matplotlib Figure.

A figure that cannot be drawn raises `NothingToShow`; its message tells the reader of the report why.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from core.report.answer.importance import importances_of
from core.report.answer.population import is_member
from core.report.answer.record import NothingToShow, RunRecord, reported
from core.report.figures.style import (
    ACCENT,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SECOND,
    SERIES,
    cut_above,
    legend_above,
    new_figure,
    styled,
)
from core.run_names import LABEL, MEMBER

MOST_SETTINGS = 12
# with more points the curves of ordinary trials are drawn as pixels, so that the page stays small
MOST_POINTS = 10_000


@styled
def optimisation_history(record: RunRecord) -> Figure:
    """Value of every trial in the order they were started, and the best so far."""
    trials = record.trials.sort_values("number")
    valued = trials[trials["value"].notna()]
    if valued.empty:
        raise NothingToShow(f"none of the {len(trials)} trials recorded has a value")
    completed = valued[valued["state"] == "COMPLETE"]
    pruned = valued[valued["state"] == "PRUNED"]
    figure, axes = new_figure(3.4)
    among = is_member(pruned)
    for part, mark, name in ((pruned[~among], "^", "pruned"), (pruned[among], "D", "member, one cell")):
        label = None if part.empty else name
        axes.plot(
            part["number"], part["value"], mark, mfc=PAPER, mec=MUTED, ms=5 if mark == "D" else 6, label=label
        )
    axes.plot(
        completed["number"],
        completed["value"],
        "o",
        color=ACCENT,
        label=None if completed.empty else "completed",
    )
    if not completed.empty:
        values = completed["value"]
        best = values.cummin() if record.objective.better == "low" else values.cummax()
        last = trials["number"].max()
        axes.step(
            [*completed["number"], last],
            [*best, best.iloc[-1]],
            where="post",
            color=ACCENT,
            lw=1.2,
            label="best so far",
        )
    failed = trials[trials["state"] == "FAIL"]
    # a failed trial has no value: it is marked on the axis
    if not failed.empty:
        foot = axes.get_xaxis_transform()
        axes.plot(
            failed["number"],
            np.zeros(len(failed)),
            "x",
            color=SECOND,
            mew=1.8,
            transform=foot,
            label="failed",
            clip_on=False,
        )
    _ring_published(axes, record, valued)
    _floor_line(axes, record)
    _keep_scale(axes, completed["value"], pruned["value"], record.objective.sign)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial number", ylabel=record.value_label)
    legend_above(axes)
    return figure


def _ring_published(axes: Axes, record: RunRecord, valued: pd.DataFrame) -> None:
    published = valued[valued["number"] == record.published]
    axes.plot(
        published["number"],
        published["value"],
        "o",
        mfc="none",
        mec=INK,
        ms=11,
        mew=1.3,
        label="published" if len(published) else None,
    )


def _floor_line(axes: Axes, record: RunRecord) -> None:
    """The score of predicting without images, on the same validation subjects."""
    floor = record.task.floor
    if floor is None or record.objectives[0] != floor.of:
        return
    value = record.cells[floor.metric].mean()
    if np.isfinite(value):
        axes.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), label=floor.method)


def _keep_scale(axes: Axes, completed: pd.Series[float], pruned: pd.Series[float], sign: int) -> None:
    """One diverging pruned trial must not flatten all others: limit the axis, and write how many lie above.

    Where high values are better, the worst one is no farther away than the scale goes.
    """
    if completed.empty or pruned.empty or sign < 0:
        return
    low, _ = axes.get_ylim()
    limit = 2 * completed.max()
    beyond = int((pruned > limit).sum())
    if beyond:
        axes.set_ylim(min(low, completed.min() * 0.9) if low > 0 else completed.min() * 0.8, limit)
        axes.text(
            1,
            0.98,
            f"{beyond} pruned above",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=MUTED,
            fontsize=9,
        )


@styled
def parameter_importance(record: RunRecord) -> Figure:
    """Share of the variance over completed trials that the foremost settings explain (fANOVA, seeded)."""
    importances = dict(list(importances_of(record).items())[:MOST_SETTINGS])
    figure, axes = new_figure(0.8 + 0.32 * len(importances))
    names, values = list(importances), np.array(list(importances.values()))
    bars = axes.barh(names[::-1], values[::-1], color=ACCENT, height=0.65)
    axes.bar_label(bars, [f"{value:.2f}" for value in values[::-1]], padding=3, fontsize=9)
    axes.set(xlabel="importance (share of explained variance)", xlim=(0, max(values.max() * 1.15, 0.1)))
    axes.grid(visible=False, axis="y")
    return figure


@styled
def fold_spread(record: RunRecord, top: int = 5) -> Figure:
    """The result in every (fold, seed) cell of the `top` completed trials and the published one, mean and SD."""
    if record.cells.empty:
        raise NothingToShow("no (fold, seed) cell was recorded")
    completed = record.trials[record.trials["state"] == "COMPLETE"].sort_values(
        ["value", "number"], ascending=[record.objective.better == "low", True]
    )
    numbers = list(completed["number"].head(top))
    if record.published is not None and record.published not in numbers:
        numbers.append(record.published)
    numbers = [number for number in numbers if (record.cells["number"] == number).any()]
    if not numbers:
        raise NothingToShow("no trial was completed")
    figure, axes = new_figure(1.3 + 0.42 * len(numbers))
    folds = sorted(record.cells["fold"].unique())
    for place, trial in enumerate(numbers):
        of_trial = record.cells[record.cells["number"] == trial]
        _draw_cells(axes, of_trial.rename(columns={record.task.shown[0]: "value"}), place, folds)
    axes.set_xlabel(record.judged_by.label)
    _floor_beside(axes, record)
    names = [f"trial {number}" + (" (published)" if number == record.published else "") for number in numbers]
    axes.set_yticks(range(len(numbers)), names)
    axes.set(ylim=(len(numbers) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    legend_above(axes, columns=4)
    return figure


def _floor_beside(axes: Axes, record: RunRecord) -> None:
    """What predicts without images: a line where it is near the cells; if it is far away, a number in the label."""
    floor = record.task.floor
    value = np.nan if floor is None else record.cells[floor.metric].mean()
    if floor is None or not np.isfinite(value):
        return
    low, high = axes.get_xlim()
    if low - (high - low) < value < high + (high - low):
        axes.axvline(value, color=INK, lw=1, ls=(0, (4, 3)), label=floor.method)
        return
    side = "right" if value > high else "left"
    axes.set_xlabel(f"{record.judged_by.label}; {floor.method}: {value:.1f}, far to the {side}")


def _draw_cells(axes: Axes, cells: pd.DataFrame, place: int, folds: list[int]) -> None:
    for index, fold in enumerate(folds):
        values = cells.loc[cells["fold"] == fold, "value"]
        axes.plot(
            values,
            np.full(len(values), place + 0.14),
            MARKERS[index % len(MARKERS)],
            ms=5,
            alpha=0.85,
            color=SERIES[index % len(SERIES)],
            label=f"fold {fold}" if place == 0 else None,
        )
    axes.errorbar(
        cells["value"].mean(),
        place - 0.16,
        xerr=cells["value"].std() if len(cells) > 1 else None,
        fmt="|",
        color=INK,
        ms=11,
        mew=2,
        capsize=3,
        lw=1.2,
        label="mean ± SD" if place == 0 else None,
    )


@styled
def learning_curves(record: RunRecord) -> Figure:
    """The values that the pruner saw: mean value of every trial over epochs, and where trials stopped."""
    if record.study is None:
        raise NothingToShow("the Optuna study, which holds the values reported by the trials, is absent")
    trials = [trial for trial in record.study.get_trials(deepcopy=False) if reported(trial)]
    if not trials:
        raise NothingToShow("no trial reported a value before it ended")
    figure, axes = new_figure(3.4)
    is_large = sum(len(reported(trial)) for trial in trials) > MOST_POINTS
    for trial in trials:
        _draw_curve(axes, trial, record, rasterized=is_large)
    if any(_was_stopped(trial) for trial in trials):
        axes.plot([], [], "x", color=INK, label="pruned here")
    if {trial.number for trial in trials} - {record.best, record.published}:
        axes.plot([], [], color=MUTED, lw=1, alpha=0.6, label="other trials")
    if record.objective.better == "low":
        _clip_curves(axes, trials)
    axes.set(xlabel="epochs done, over all folds and seeds", ylabel=record.value_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=4)
    return figure


class _Look(TypedDict, total=False):
    """How the curve of a trial is drawn; keys as in `Axes.plot`."""

    color: str
    lw: float
    ls: tuple[int, tuple[int, int]]
    zorder: int
    label: str
    alpha: float
    rasterized: bool


def _draw_curve(axes: Axes, trial: FrozenTrial, record: RunRecord, rasterized: bool) -> None:
    steps, values = zip(*sorted(_values_over_epochs(trial, record).items()), strict=True)
    marker = "." if len(steps) == 1 else ""
    look: _Look
    if trial.number == record.best:
        name = f"trial {trial.number} (best{', published' if trial.number == record.published else ''})"
        look = {"color": ACCENT, "lw": 2.4, "zorder": 4, "label": name}
    elif trial.number == record.published:
        look = {"color": INK, "lw": 1.8, "ls": (0, (4, 2)), "zorder": 3, "label": "published"}
    else:
        look = {"color": MUTED, "lw": 1, "alpha": 0.6, "rasterized": rasterized}
    axes.plot(steps, values, marker=marker, **look)
    if _was_stopped(trial):
        axes.plot(steps[-1], values[-1], "x", color=INK, ms=5, zorder=5)


def _was_stopped(trial: FrozenTrial) -> bool:
    """Whether the trial was pruned; a member of a population ends after one cell by design, which does not count."""
    return trial.state == TrialState.PRUNED and trial.user_attrs.get(LABEL) != MEMBER


def _values_over_epochs(trial: FrozenTrial, record: RunRecord) -> dict[int, float]:
    """The values of a trial by epochs done; the last one is its final value, even if it was not reported."""
    values = dict(reported(trial))
    judged = int((record.history["number"] == trial.number).sum())
    epochs = judged or record.trials.loc[record.trials["number"] == trial.number, "epochs"].max()
    if trial.state == TrialState.COMPLETE and trial.values and epochs >= max(values):
        values[int(epochs)] = trial.values[0]
    return values


def _clip_curves(axes: Axes, trials: list[FrozenTrial]) -> None:
    """Values of first epochs can be extreme: show up to twice the 90th percentile of all reported values."""
    values = np.array([value for trial in trials for value in reported(trial).values()])
    values = values[np.isfinite(values)]
    if len(values) and values.max() > (limit := 2 * np.percentile(values, 90)):
        cut_above(axes, values.min(), limit)


@styled
def training_loss(record: RunRecord) -> Figure:
    """Training loss of the winner over progress, one line per (fold, seed) cell."""
    epochs = record.history[record.history["number"] == record.best].dropna(subset=["loss"])
    if epochs.empty:
        raise NothingToShow("no epoch of the winner was recorded")
    figure, axes = new_figure(3.0)
    folds = sorted(epochs["fold"].unique())
    for (fold, _), cell in epochs.groupby(["fold", "seed"]):
        index = folds.index(fold)
        cell = cell.sort_values("progress")
        axes.plot(
            cell["progress"],
            cell["loss"],
            color=SERIES[index % len(SERIES)],
            lw=1.3,
            marker=MARKERS[index % len(MARKERS)],
            ms=4,
            markevery=max(len(cell) // 6, 1),
        )
    for index, fold in enumerate(folds):
        axes.plot(
            [],
            [],
            color=SERIES[index % len(SERIES)],
            marker=MARKERS[index % len(MARKERS)],
            ms=4,
            label=f"fold {fold}",
        )
    axes.set(xlabel="progress of training (1: last epoch)", ylabel="training loss", xlim=(0, 1.02))
    legend_above(axes, columns=5)
    return figure
