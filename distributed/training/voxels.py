"""The classical baseline of a cell: principal components of the voxels themselves, read as a task reads embeddings.

No network is trained. The components are those of the training subjects, at voxels of at least 8 mm, and what the task
fits on embeddings is fitted on them, with its penalty chosen inside the training subjects.
With few subjects it is what a network must beat first.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import IncrementalPCA

from core.run_settings import RunSettings
from core.tasks.task import Judging, Observed, Outcome
from distributed.batches.plan import Rows, chunks
from distributed.run.assignment import Cell, EpochRow
from distributed.training.loop import CellData, TrainingState
from distributed.training.subjects import Place, Subjects

COARSEST = 8.0
"""mm: finer voxels are averaged to this, so that the components are of shapes and not of noise."""
MOST_COMPONENTS = 100
TOGETHER = 256
"""Scans that are read at a time."""


class VoxelCell:
    """What `CellTraining` is for a network: its only epoch fits the components."""

    rounds = 1

    def __init__(self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place) -> None:
        self.settings, self.cell = settings, cell
        self.data = CellData(settings, subjects, cell, Place(torch.device("cpu"), place.rank, 1))
        people = len(np.unique(self.data.labelled.truth(self.data.labelled_rows).subjects))
        count = max(1, min(MOST_COMPONENTS, people - 1))
        self.components = IncrementalPCA(count)
        # What a task fits takes every feature for equally large. Of components that is wrong: the last ones, which are
        # noise, would weigh as much as the first. After any turn all features are alike, and distances are what they
        # were, so a linear model with a penalty is the same as on the voxels.
        self.turn = np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]
        self.epoch = 0

    @property
    def evaluation_subjects(self) -> int:
        """How many people the cell is judged on."""
        return self.data.evaluation_subjects

    def run_epoch(self) -> EpochRow:
        """Fit the components, in parts of the training scans."""
        started = time.time()
        rows, least = self.data.labelled_rows, int(self.components.n_components)
        # Every part must have as many scans as there are components.
        parts = np.array_split(rows, max(1, len(rows) // max(least, TOGETHER)))
        for part in parts:
            self.components.partial_fit(self._voxels(part))
        self.epoch = 1
        return EpochRow(
            fold=self.cell.fold, seed=self.cell.seed, epoch=1, progress=1.0, loss=math.nan, learning_rate=math.nan,
            first_step_at=started, seconds=time.time() - started,
        )  # fmt: skip

    def judge(self, *, sites: bool = True, penalty: float | None = None, in_search: bool = False) -> Outcome:
        """Let the task judge the components as embeddings; see `CellTraining.judge`."""
        training, evaluation = (
            self.observed(rows) for rows in (self.data.labelled_rows, self.data.evaluation_rows)
        )
        return self.data.task.judge(self.settings, training, evaluation, Judging(sites))

    def observed(self, rows: Rows) -> Observed:
        """The components of scans, as a task sees embeddings."""
        truth = self.data.labelled.truth(rows)
        scores = [
            self.components.transform(self._voxels(part)) @ self.turn for part in chunks(rows, TOGETHER)
        ]
        return Observed(truth.labels, truth.sites, truth.subjects, np.concatenate(scores), more=truth.more)

    def state_dict(self) -> TrainingState:
        """Nothing that is worth keeping: the fit takes seconds."""
        return TrainingState(epoch=0, model={}, optimiser={})

    def load_state_dict(self, state: TrainingState) -> None:
        """Begin again."""

    def write_model(self, outcome: Outcome, folder: Path) -> None:
        """Keep nothing: no command predicts with a baseline."""

    def close(self) -> None:
        """Nothing is read ahead."""

    def _voxels(self, rows: Rows) -> np.ndarray:
        """Normalised voxels (n, D) of at least `COARSEST` mm."""
        volumes = self.data.prepare(rows, torch.from_numpy(self.data.subjects.volumes.read(rows)))
        size = [max(1, int(COARSEST // edge)) for edge in self.data.subjects.edges]
        if max(size) > 1:
            volumes = F.avg_pool3d(volumes, size, ceil_mode=True, count_include_pad=False)
        voxels: np.ndarray = volumes.flatten(1).numpy()
        return voxels
