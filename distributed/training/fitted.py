"""What cells without a network share: their only epoch fits something, and nothing of it is worth a checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from core.evaluation.splits import Rows
from core.tasks.task import Outcome
from distributed.run.assignment import Cell, EpochRow
from distributed.training.loop import TrainingState
from distributed.training.subjects import Subjects


class FittedCell:
    """What `CellTraining` is for a network."""

    rounds = 1
    evaluation_rows: Rows
    """The rows that the cell is judged on."""

    def __init__(self, subjects: Subjects, cell: Cell) -> None:
        self.subjects, self.cell, self.epoch = subjects, cell, 0

    @property
    def evaluation_subjects(self) -> int:
        """How many people the cell is judged on."""
        return len(np.unique(self.subjects.names[self.evaluation_rows]))

    def fit(self) -> None:
        """Fit on the training subjects what `judge` needs."""

    def run_epoch(self) -> EpochRow:
        """Fit, and call it an epoch."""
        started = time.time()
        self.fit()
        self.epoch = 1
        return EpochRow(
            fold=self.cell.fold, seed=self.cell.seed, epoch=1, progress=1.0, loss=math.nan, learning_rate=math.nan,
            first_step_at=started, seconds=time.time() - started,
        )  # fmt: skip

    def state_dict(self) -> TrainingState:
        """Nothing that is worth keeping: the fit takes seconds."""
        return TrainingState(epoch=0, model={}, optimiser={})

    def load_state_dict(self, state: TrainingState) -> None:
        """Begin again."""

    def write_model(self, outcome: Outcome, folder: Path) -> None:
        """Keep nothing: no command predicts with it."""

    def close(self) -> None:
        """Nothing is read ahead."""
