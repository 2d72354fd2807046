"""What a worker knows about the cohort, and where the worker runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from core.evaluation.splits import Splits
from core.files.tables import write_table
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import Volumes
from distributed.batches.plan import Rows
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell


@dataclass(frozen=True)
class Subjects:
    """What a worker knows about the cohort: volumes, labels, splits."""

    volumes: Volumes
    manifest: pd.DataFrame
    splits: Splits
    channels: tuple[str, ...]
    scales: np.ndarray | None = None
    """Factors (rows, C) from stored to real values; None if stored values are the real values."""
    access: AccessRecord | None = None
    """Where the uses of every subject are noted; they are not noted if None."""

    @classmethod
    def of(
        cls, cohort: Cohort, splits: Splits, volumes: Volumes, access: AccessRecord | None = None
    ) -> Subjects:
        """The subjects of `cohort`, whose volumes are read from `volumes`."""
        scales = cohort.scales(np.arange(len(cohort)))
        return cls(
            volumes,
            cohort.manifest[["subject", "age", "site"]],
            splits,
            cohort.description.channels,
            None if (scales == 1).all() else scales,
            access,
        )

    def note(self, rows: Rows, cell: Cell) -> None:
        """Note that `cell` uses these rows now; see `access`."""
        if self.access is not None:
            self.access.note(rows, cell)

    def write_predictions(self, fold: int, predicted: np.ndarray, path: Path) -> None:
        """Write a table with one line per evaluation scan of `fold`: subject, age, site, predicted (in years)."""
        of_scan = self.manifest.iloc[self.rows_of(fold)[1]][["subject", "age", "site"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(of_scan.assign(predicted=predicted), path)

    def rows_of(self, fold: int) -> tuple[Rows, Rows]:
        """(training rows, evaluation rows) of a fold; only the fold `HOLDOUT` evaluates on the hold-out."""
        if fold == HOLDOUT:
            return self.splits.development, self.splits.holdout
        return self.splits.training(fold), self.splits.folds[fold]


@dataclass(frozen=True)
class Place:
    """Where this worker runs."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    workers: int = 1
