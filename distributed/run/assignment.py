"""A trial as processes pass it on: what it must do, where its folder is, and what it answers after every epoch.

All of it consists of JSON values. So it survives restarts, any machine can read it, and a process that only passes it
on imports nothing for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.run_names import CHECKPOINT, PROGRESS
from distributed.run.working_copy import forget

if TYPE_CHECKING:
    # At run time this would import networks and losses into processes that only pass an assignment on.
    from core.config import Settings

PRUNABLE_EPOCHS = "prunable_epochs"
"""The key of an answer that schedulers look for: a trial whose answers do not have it is never stopped early."""
METRIC = "value"
"""The key of the value by which schedulers compare answers: the first objective."""
HOLDOUT = -1
"""The fold of a refit, which is trained on all development subjects and judged on the hold-out."""

BASELINE_PREFIX = "l1-"


@dataclass(frozen=True)
class Cell:
    """One (fold, seed) of a trial; a refit has the fold `HOLDOUT`."""

    fold: int
    seed: int
    trial: str = ""
    """The name of the trial, for the records of access."""


class Assignment(TypedDict):
    """A trial as a slot gives it to its workers; `assign` makes it."""

    name: str
    folder: str
    settings: Settings
    cells: list[dict[str, int]]
    """The fields of every `Cell`, in the order in which the cells are trained."""
    keep_model: bool
    prunable: bool
    metric: str
    """The objective that the trial's value is the mean of; see `core.objectives`."""
    begin: str | None
    """The checkpoint from which this trial continues: of another trial, or an earlier one of its own."""
    keep_every: int | None
    """After every so many epochs the checkpoint is also kept, so that other trials can continue from it; see
    `kept_checkpoint`."""
    penalty: float | None
    """Of a refit, as its configuration's cells found it (`core.tasks.task.Task.penalty_of`); found anew if None."""
    on_voxels: NotRequired[bool]
    """Whether this is the classical baseline, without a network; see `distributed.training.voxels`."""
    spent_before: float
    """Seconds that this trial spent on weights that it gave up, minus those that other trials spent on the weights with
    which it continued."""


class EpochRow(TypedDict, total=False):
    """One epoch of a trial: a row of history.csv."""

    fold: int
    seed: int
    epoch: int
    """From 1, within its cell."""
    progress: float
    loss: float
    value: float
    """What the trial answered after this epoch; see `Answer`."""
    learning_rate: float
    first_step_at: float
    """Seconds since 1970."""
    stage: str
    """`pretraining` in a first stage; absent in the training that is judged."""
    seconds: float
    spent_seconds: float
    """`seconds`, and the time for judging."""
    # What a task notes beside these has its own names: numbers, too.


CellRow = dict[str, float]
"""A finished cell: `fold`, `seed`, `n` (the number of evaluation subjects) and its metrics."""


class Answer(EpochRow, total=False):
    """What a trial answers after an epoch: the row of this epoch, and the state of the trial.

    `distributed.run.standing.standing` or `failed` makes it.
    """

    name: str
    value: float
    """In the first cell the metric after this epoch; later the mean over the finished cells."""
    sd: float
    n: int
    """The number of finished cells."""
    cells: list[CellRow]
    epochs: int
    """The epochs done in all cells, those of first stages included."""
    judged_epochs: int
    """Those of them that are judged: without first stages."""
    prunable_epochs: int
    """The same number, present only if the trial may be stopped early and a value is known; see `PRUNABLE_EPOCHS`."""
    finished: bool
    """Whether all cells are done."""
    done: bool
    """Whether the trial ends here, finished or failed."""
    penalty: float
    """The penalty for a refit, once all cells are done; see `core.tasks.task.Task.penalty_of`."""
    after_cells: list[list[float]]
    """Once all cells are done: the objective in the finished cells, as it was after each of them. Cells may choose
    something for each other, so only values after equally many cells can be compared."""
    failed: str
    """Why the trial cannot go on."""
    note: str
    """What the user must know about the files of the trial."""
    storage: bool
    """Whether the storage of the run or of the cohort failed; the next trial would fail in the same way."""
    started_at: float
    previous_end_at: float | None
    """When the worker's last trial ended; seconds since 1970."""


class Progress(TypedDict):
    """The content of progress.json."""

    of: str | None
    """What the trial is; see `identity`. None before version 0.3."""
    history: list[EpochRow]
    cells: list[CellRow]
    answer: Answer | None
    """The last answer of a trial that has ended; None for all other trials."""


def assign(
    folder: Path,
    settings: Settings,
    cells: list[dict[str, int]],
    *,
    metric: str,
    keep_model: bool = False,
    prunable: bool = True,
    keep_every: int | None = None,
    penalty: float | None = None,
) -> Assignment:
    """An assignment; the trial has the name of its folder."""
    return Assignment(
        name=folder.name, folder=str(folder), settings=settings, cells=cells, keep_model=keep_model,
        prunable=prunable, metric=metric, begin=None, keep_every=keep_every, penalty=penalty, spent_before=0.0,
    )  # fmt: skip


def is_refit(assignment: Assignment) -> bool:
    """Whether the trial is trained on all development subjects and judged on the hold-out."""
    return assignment["cells"][0]["fold"] == HOLDOUT


def clock(assignment: Assignment, history: Sequence[EpochRow]) -> Answer:
    """The epochs done; those that are judged also as `PRUNABLE_EPOCHS` if the trial may be stopped early now."""
    judged = sum("stage" not in row for row in history)
    is_judged = not history or "stage" not in history[-1]
    answer = Answer(epochs=len(history), judged_epochs=judged)
    if assignment["prunable"] and not is_refit(assignment) and is_judged:
        answer["prunable_epochs"] = judged
    return answer


def failed(reason: str) -> Answer:
    """The answer of a trial that cannot go on."""
    return Answer(value=math.nan, failed=reason, finished=False, done=True)


def identity(assignment: Assignment) -> str:
    """What a trial is: a hash of its settings, its cells and its objective. Its files are of use to no other trial.

    A member of a population has other settings after every exchange; `begin` tells its checkpoints apart.
    """
    return fingerprint({name: assignment[name] for name in ("settings", "cells", "metric")})


def read_progress(folder: Path) -> Progress:
    """The history, the finished cells and the last answer of a trial; empty before its first epoch.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / PROGRESS
    try:
        content = json.loads(path.read_bytes())
        kinds = {"history": list, "cells": list, "answer": dict | None}
        if (
            isinstance(content, dict)
            and all(name in content and isinstance(content[name], kind) for name, kind in kinds.items())
            and are_rows(content["history"])
            and are_rows(content["cells"])
        ):
            return Progress(
                of=content.get("of"),
                history=content["history"],
                cells=content["cells"],
                answer=content["answer"],
            )
    except (FileNotFoundError, NotADirectoryError):
        return Progress(of=None, history=[], cells=[], answer=None)
    except (ValueError, RecursionError):
        pass
    raise UserError(
        f"{path} is damaged; `brainsweep resume` of this run sets it aside and keeps what the study knows"
    )


def are_rows(value: object) -> bool:
    """Whether a value that was read from a file is a list of dictionaries."""
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def forget_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a trial that does not continue."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    forget(folder / CHECKPOINT)


def kept_checkpoint(folder: Path, epochs: int) -> Path:
    """Where a trial keeps its checkpoint after so many epochs, so that other trials can continue from it."""
    return folder / f"{Path(CHECKPOINT).stem}-{epochs}.pt"


def out_of_fold_predictions(folder: Path, fold: int, seed: int) -> Path:
    """Where a trial keeps what its cell predicts for the validation subjects."""
    return folder / f"predictions-{fold}-{seed}.csv"


def kept_model(folder: Path, fold: int, seed: int) -> Path:
    """Where the model of a cell is kept: model-SEED of a refit, model-FOLD-SEED of a fold."""
    return folder / (f"model-{seed}" if fold == HOLDOUT else f"model-{fold}-{seed}")


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"{number:04d}"


def baseline_name(number: int) -> str:
    """The name of a trial of the L1 baseline, which no trial of the search has."""
    return f"{BASELINE_PREFIX}{trial_name(number)}"


def trial_number(name: str) -> int | None:
    """The number of a trial, of the search or of the L1 baseline; None for refits and repetitions."""
    digits = name.removeprefix(BASELINE_PREFIX)
    return int(digits) if digits.isdigit() else None
