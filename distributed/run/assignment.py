"""A trial as it travels: what it is asked to do, where it lies, and what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.run.working_copy import forget

CHECKPOINT = "checkpoint.pt"
PROGRESS = "progress.json"
PRUNABLE_EPOCHS = "prunable_epochs"
HOLDOUT = -1
"""The fold of a refit: trained on all development subjects, judged on the hold-out."""


@dataclass(frozen=True)
class Cell:
    """One (fold, seed) of a trial; fold `HOLDOUT` is the refit."""

    fold: int
    seed: int


@dataclass(frozen=True)
class Assignment:
    """A trial as a slot hands it to its workers; made of JSON values, so it survives restarts and machines."""

    name: str
    folder: str
    settings: dict[str, Any]
    cells: list[dict[str, int]]
    keep_model: bool = False
    prunable: bool = True
    metric: str = "mae"
    """The objective that the trial's value is the mean of; see `core.objectives`."""
    begin: str | None = None
    """The checkpoint of another trial (or an earlier one of its own) whose weights this one goes on from."""
    keep_every: int | None = None
    """Every so many epochs the checkpoint is also kept, for others to begin from; see `kept_checkpoint`."""
    spent_before: float = 0.0
    """Seconds that this trial spent on what it gave up, less those that others spent on what it began from."""

    @property
    def is_refit(self) -> bool:
        """Whether this trains on all development subjects and looks at the hold-out."""
        return self.cells[0]["fold"] == HOLDOUT


def assign(
    folder: Path,
    settings: dict[str, Any],
    cells: list[dict[str, int]],
    *,
    keep_model: bool = False,
    prunable: bool = True,
    metric: str = "mae",
    keep_every: int | None = None,
) -> dict[str, Any]:
    """An assignment as JSON values; the trial is called like its folder."""
    return dataclasses.asdict(
        Assignment(
            folder.name, str(folder), settings, cells, keep_model, prunable, metric, keep_every=keep_every
        )
    )


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
