"""The baselines of a segmentation: what is known of every voxel before a scan is seen.

The atlas says of every voxel of the grid its most frequent class among the training subjects, so it is as good as
brains lie alike in the grid; the majority class is one class for every voxel of a brain.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from core.evaluation.splits import Rows
from core.run_settings import RunSettings
from core.tasks.task import Beside, Judging, Observed, Outcome
from distributed.batches.plan import chunks
from distributed.run.assignment import Cell
from distributed.training.cell_data import CellData
from distributed.training.fitted import FittedCell
from distributed.training.subjects import Place, Subjects

TOGETHER = 16
"""Scans that are read at a time."""


class AtlasCell(FittedCell):
    """An atlas of the training subjects, or their most frequent class."""

    def __init__(
        self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place, *, one_class: bool
    ) -> None:
        super().__init__(subjects, cell)
        self.settings, self.one_class = settings, one_class
        self.data = CellData(settings, subjects, cell, Place(torch.device("cpu"), place.rank, 1))
        self.evaluation_rows = self.data.evaluation_rows

    def fit(self) -> None:
        """Count classes, voxel by voxel."""
        self.atlas_xyz = self.data.task.atlas(
            self.settings, (beside for _, beside in self._read(self.data.labelled_rows)), self.one_class
        )

    def judge(self, *, sites: bool = True, penalty: float | None = None, in_search: bool = False) -> Outcome:
        """Let the task compare it with every evaluation scan."""
        rows, seen = self.data.evaluation_rows, list[dict[str, np.ndarray]]()
        for volumes, beside in self._read(rows):
            inside_bxyz = (volumes != 0).any(dim=1)
            predicted = torch.as_tensor(self.atlas_xyz).expand(len(volumes), *self.atlas_xyz.shape)
            if self.one_class:
                predicted = predicted * inside_bxyz
            found = self.data.task.observe_maps(self.settings, predicted, beside)
            # Not the maps themselves, which would fill the memory.
            seen.append({name: values.numpy() for name, values in found.items() if values.ndim < 4})
        outputs = {name: np.concatenate([each[name] for each in seen]) for name in seen[0]}
        truth = self.data.labelled.truth(rows)
        observed = Observed(truth.labels, truth.sites, truth.subjects, outputs.pop("embedding"), outputs)
        nobody = self.data.labelled.truth(rows[:0])
        training = Observed(nobody.labels, nobody.sites, nobody.subjects, observed.embeddings[:0])
        return self.data.task.judge(self.settings, training, observed, Judging(sites))

    def _read(self, rows: Rows) -> Iterator[tuple[torch.Tensor, Beside]]:
        """Volumes (B, C, X, Y, Z) as they are stored, and their maps."""
        volumes = self.subjects.volumes
        for part in chunks(rows, TOGETHER):
            self.subjects.note(part, self.cell)
            maps = {
                name: torch.from_numpy(np.asarray(volumes.read_map(name, part))) for name in self.data.maps
            }
            beside = self.subjects.beside(maps, part, final=True)
            yield torch.from_numpy(np.asarray(volumes.read(part))), beside
