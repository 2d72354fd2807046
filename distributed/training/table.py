"""A cell of a task without a network: what is known of scans is in the table of the cohort, and no voxel is read."""

from __future__ import annotations

import numpy as np

from core.evaluation import Floats
from core.run_settings import RunSettings
from core.tasks import find_task
from core.tasks.task import Judging, Observed, Outcome
from distributed.batches.plan import Rows
from distributed.run.assignment import Cell
from distributed.training.fitted import FittedCell
from distributed.training.subjects import Labelled, Subjects


class TableCell(FittedCell):
    """Features of the table: `judge` fits on them."""

    def __init__(
        self, settings: RunSettings, subjects: Subjects, cell: Cell, labelled: Labelled, features: Floats
    ) -> None:
        super().__init__(subjects, cell)
        self.settings, self.task = settings, find_task(settings.task)
        self.labelled, self.features = labelled, features
        known, self.evaluation_rows = labelled.rows_of(cell.fold)
        self.training_rows = labelled.within_budget(settings, known, cell)

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
