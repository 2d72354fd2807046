"""A cell of a task without a network: what is known of scans is in the table of the cohort, and no voxel is read."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from core.run_settings import RunSettings
from core.tasks import find_task
from core.tasks.task import Judging, Observed, Outcome
from distributed.batches.plan import Rows
from distributed.run.assignment import Cell, EpochRow
from distributed.training.loop import TrainingState
from distributed.training.subjects import Labelled, Subjects


class TableCell:
    """What `CellTraining` is for a network: its only epoch does nothing, because `judge` fits."""

    rounds = 1

    def __init__(self, settings: RunSettings, subjects: Subjects, cell: Cell) -> None:
        self.settings, self.subjects, self.cell = settings, subjects, cell
        self.task, self.labelled = find_task(settings.task), Labelled.of(subjects, settings)
        features = self.task.features(settings, subjects.manifest)
        assert features is not None
        self.features = features
        known, self.evaluation_rows = self.labelled.rows_of(cell.fold)
        self.training_rows = self.labelled.within_budget(settings, known, cell)
        self.epoch = 0

    @property
    def evaluation_subjects(self) -> int:
        """How many people the cell is judged on."""
        return int(self.subjects.manifest["subject"].iloc[self.evaluation_rows].nunique())

    def run_epoch(self) -> EpochRow:
        """Count the epoch."""
        self.epoch = 1
        return EpochRow(
            fold=self.cell.fold, seed=self.cell.seed, epoch=1, progress=1.0, loss=math.nan, learning_rate=math.nan,
            first_step_at=time.time(), seconds=0.0,
        )  # fmt: skip

    def judge(self, *, sites: bool = True, penalty: float | None = None, in_search: bool = False) -> Outcome:
        """Let the task fit on the training people, and measure the others; see `CellTraining.judge`."""
        training, evaluation = self._observed(self.training_rows), self._observed(self.evaluation_rows)
        folds = self.subjects.splits.fold_of(self.training_rows) if in_search else None
        return self.task.judge(self.settings, training, evaluation, Judging(sites, penalty, folds))

    def _observed(self, rows: Rows) -> Observed:
        self.subjects.note(rows, self.cell)
        truth = self.labelled.truth(rows)
        return Observed(
            truth.labels, truth.sites, truth.subjects, np.asarray(self.features[rows]), more=truth.more
        )

    def state_dict(self) -> TrainingState:
        """Nothing that is worth keeping: the fit takes milliseconds."""
        return TrainingState(epoch=0, model={}, optimiser={})

    def load_state_dict(self, state: TrainingState) -> None:
        """Begin again."""

    def write_model(self, outcome: Outcome, folder: Path) -> None:
        """Keep nothing: it predicts nothing for files."""

    def close(self) -> None:
        """Nothing is read ahead."""
