"""A trial as it travels: what it is asked to do, where it lies, and what it answers after every epoch.

All of it is made of JSON values, so it survives restarts and machines, and a process that only passes it on needs
nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from distributed.run.working_copy import forget

if TYPE_CHECKING:
    # At run time it would bring networks and losses into processes that only pass an assignment on.
    from core.config import Settings

CHECKPOINT = "checkpoint.pt"
PROGRESS = "progress.json"
PRUNABLE_EPOCHS = "prunable_epochs"
"""The key of an answer that schedulers look for: an answer without it is never stopped early."""
HOLDOUT = -1
"""The fold of a refit: trained on all development subjects, judged on the hold-out."""


@dataclass(frozen=True)
class Cell:
    """One (fold, seed) of a trial; fold `HOLDOUT` is the refit."""

    fold: int
    seed: int


class Assignment(TypedDict):
    """A trial as a slot hands it to its workers; made by `assign`."""

    name: str
    folder: str
    settings: Settings
    cells: list[dict[str, int]]
    """`Cell` by `Cell`, in the order in which they are visited."""
    keep_model: bool
    prunable: bool
    metric: str
    """The objective that the trial's value is the mean of; see `core.objectives`."""
    begin: str | None
    """The checkpoint of another trial (or an earlier one of its own) whose weights this one goes on from."""
    keep_every: int | None
    """Every so many epochs the checkpoint is also kept, for others to begin from; see `kept_checkpoint`."""
    spent_before: float
    """Seconds that this trial spent on what it gave up, less those that others spent on what it began from."""


class EpochRow(TypedDict, total=False):
    """One epoch of a trial: a row of history.csv."""

    fold: int
    seed: int
    epoch: int
    """From 1, within its cell."""
    progress: float
    loss: float
    mae: float
    learning_rate: float
    temperature: float
    width: float
    neighbours: float
    first_step_at: float
    """Seconds since 1970."""
    seconds: float
    spent_seconds: float
    """As `seconds`, with the judging."""


CellRow = dict[str, float]
"""A finished cell: `fold`, `seed`, `n` (evaluation subjects) and its metrics."""


class Answer(EpochRow, total=False):
    """What a trial says after an epoch: that epoch, and how the trial stands.

    Made by `distributed.run.standing.standing`, or by `failed`.
    """

    name: str
    value: float
    """In the first cell, the metric after this epoch; later the mean over finished cells."""
    sd: float
    n: int
    """Finished cells."""
    cells: list[CellRow]
    epochs: int
    """Done over all cells."""
    prunable_epochs: int
    """The same, where the trial may be stopped early; see `PRUNABLE_EPOCHS`."""
    finished: bool
    """Whether all cells are done."""
    done: bool
    """Whether the trial ends here, finished or failed."""
    failed: str
    """Why the trial cannot go on."""
    storage: bool
    """Whether the storage of the run or the cohort is to blame, on which the next trial would fail alike."""
    started_at: float
    previous_end_at: float | None
    """When the worker's last trial ended; seconds since 1970."""


class Progress(TypedDict):
    """The content of progress.json."""

    history: list[EpochRow]
    cells: list[CellRow]
    answer: Answer | None
    """The last one, of a trial that has ended."""


def assign(
    folder: Path,
    settings: Settings,
    cells: list[dict[str, int]],
    *,
    keep_model: bool = False,
    prunable: bool = True,
    metric: str = "mae",
    keep_every: int | None = None,
) -> Assignment:
    """An assignment; the trial is called like its folder."""
    return Assignment(
        name=folder.name, folder=str(folder), settings=settings, cells=cells, keep_model=keep_model,
        prunable=prunable, metric=metric, begin=None, keep_every=keep_every, spent_before=0.0,
    )  # fmt: skip


def is_refit(assignment: Assignment) -> bool:
    """Whether the trial is trained on all development subjects and judged on the hold-out."""
    return assignment["cells"][0]["fold"] == HOLDOUT


def clock(assignment: Assignment, epochs: int) -> Answer:
    """The epochs done; said again as `PRUNABLE_EPOCHS` where the trial may be stopped early."""
    may_stop = assignment["prunable"] and not is_refit(assignment)
    return Answer(epochs=epochs, prunable_epochs=epochs) if may_stop else Answer(epochs=epochs)


def failed(reason: str) -> Answer:
    """The answer of a trial that cannot go on."""
    return Answer(value=math.nan, failed=reason, finished=False, done=True)


def read_progress(folder: Path) -> Progress:
    """A trial's history, finished cells and last answer; empty before its first epoch."""
    try:
        content: Progress = json.loads((folder / PROGRESS).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return Progress(history=[], cells=[], answer=None)
    return content


def forget_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a trial that will not go on."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    forget(folder / CHECKPOINT)


def kept_checkpoint(folder: Path, epochs: int) -> Path:
    """Where a trial keeps its checkpoint after so many epochs, for others to begin from."""
    return folder / f"checkpoint-{epochs}.pt"


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"{number:04d}"
