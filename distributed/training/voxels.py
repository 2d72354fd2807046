"""The classical baseline of a cell: principal components of the voxels themselves, read as a task reads embeddings.

No network is trained. The components are those of the training subjects, at voxels of at least 8 mm, and what the task
fits on embeddings is fitted on them, with its penalty chosen inside the training subjects.
With few subjects it is what a network must beat first.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import IncrementalPCA

from core.run_settings import RunSettings
from core.tasks.task import Judging, Observed, Outcome
from distributed.batches.plan import Rows, chunks
from distributed.run.assignment import Cell
from distributed.training.cell_data import CellData
from distributed.training.fitted import FittedCell
from distributed.training.subjects import Place, Subjects

COARSEST = 8.0
"""mm: finer voxels are averaged to this, so that the components are of shapes and not of noise."""
MOST_COMPONENTS = 100
TOGETHER = 256
"""Scans that are read at a time."""


class VoxelCell(FittedCell):
    """The principal components of the training scans."""

    def __init__(self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place) -> None:
        super().__init__(subjects, cell)
        self.settings = settings
        self.data = CellData(settings, subjects, cell, Place(torch.device("cpu"), place.rank, 1))
        self.evaluation_rows = self.data.evaluation_rows
        people = len(np.unique(self.data.labelled.truth(self.data.labelled_rows).subjects))
        count = max(1, min(MOST_COMPONENTS, people - 1))
        self.components = IncrementalPCA(count)
        # What a task fits takes every feature for equally large. Of components that is wrong: the last ones, which are
        # noise, would weigh as much as the first. After any turn all features are alike, and distances are what they
        # were, so a linear model with a penalty is the same as on the voxels.
        self.turn = np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]

    def fit(self) -> None:
        """Fit the components, in parts of the training scans."""
        rows, least = self.data.labelled_rows, int(self.components.n_components)
        # Every part must have as many scans as there are components.
        parts = np.array_split(rows, max(1, len(rows) // max(least, TOGETHER)))
        for part in parts:
            self.components.partial_fit(self._voxels(part))

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

    def _voxels(self, rows: Rows) -> np.ndarray:
        """Normalised voxels (n, D) of at least `COARSEST` mm."""
        volumes = self.data.prepare(rows, torch.from_numpy(self.data.subjects.volumes.read(rows)))
        size = [max(1, int(COARSEST // edge)) for edge in self.data.subjects.edges]
        if max(size) > 1:
            volumes = F.avg_pool3d(volumes, size, ceil_mode=True, count_include_pad=False)
        voxels: np.ndarray = volumes.flatten(1).numpy()
        return voxels
