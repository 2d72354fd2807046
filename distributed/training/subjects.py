"""What a worker knows about the cohort and about the truth of a task, and where the worker runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from core.errors import UserError
from core.evaluation.splits import Splits, labelled_order
from core.files.tables import write_table
from core.run_settings import RunSettings
from core.starts import Start, data_set_of
from core.tasks import find_task
from core.tasks.task import Beside, Labels, Truth, is_known
from core.volumes.cohort.description import stored_voxel_ml
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
    edges: tuple[float, float, float] = (8.0, 8.0, 8.0)
    """Of a voxel along X, Y and Z in mm."""
    voxel_ml: npt.NDArray[np.float64] | None = None
    """How much of a person is in a voxel, row by row; by the edges if None. See `stored_voxel_ml`."""
    data_set: str = ""
    """Which data set the cohort was made from; see `core.starts.data_set_of`."""
    starts: Mapping[str, Start] = field(default_factory=dict)
    """The weights that a training can start from, by name."""

    @cached_property
    def names(self) -> npt.NDArray[np.str_]:
        """Whose every scan is (rows,). Text is taken out of the table once, for all cells of all trials."""
        return self.manifest["subject"].to_numpy(str)

    @cached_property
    def sites(self) -> npt.NDArray[np.str_]:
        """Where every scan was made (rows,)."""
        return self.manifest["site"].to_numpy(str)

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        splits: Splits,
        volumes: Volumes,
        access: AccessRecord | None = None,
        starts: Mapping[str, Start] | None = None,
    ) -> Subjects:
        """The subjects of `cohort`, whose volumes are read from `volumes`."""
        scales = cohort.scales(np.arange(len(cohort)))
        return cls(
            volumes,
            cohort.manifest,
            splits,
            cohort.description.channels,
            None if (scales == 1).all() else scales,
            access,
            cohort.description.edges,
            stored_voxel_ml(cohort.manifest, cohort.description.edges),
            data_set_of(cohort.description),
            starts or {},
        )

    def beside(self, maps: Mapping[str, torch.Tensor], rows: Rows, *, final: bool) -> Beside:
        """What a task is told of these rows beside their volumes."""
        by_edges = float(np.prod(self.edges)) / 1000
        milliliters = np.full(len(rows), by_edges) if self.voxel_ml is None else self.voxel_ml[rows]
        return Beside(maps, self.edges, torch.from_numpy(milliliters), final)

    def note(self, rows: Rows, cell: Cell) -> None:
        """Note that `cell` uses these rows now; see `access`."""
        if self.access is not None:
            self.access.note(rows, cell)

    def rows_of(self, fold: int) -> tuple[Rows, Rows]:
        """(training rows, evaluation rows) of a fold; only the fold `HOLDOUT` evaluates on the hold-out."""
        if fold == HOLDOUT:
            return self.splits.development, self.splits.holdout
        return self.splits.training(fold), self.splits.folds[fold]


@dataclass(frozen=True)
class Labelled:
    """The subjects with the truth of a task; scans without one have no part in training and evaluation."""

    subjects: Subjects
    labels: Labels
    """Of all scans of the cohort."""
    more: Mapping[str, Labels] = field(default_factory=dict)
    """See `Task.more_labels`."""

    @classmethod
    def of(cls, subjects: Subjects, settings: RunSettings) -> Labelled:
        """The truth that the task of these `settings` needs."""
        task, manifest = find_task(settings.task), subjects.manifest
        return cls(subjects, task.labels(settings, manifest), task.more_labels(settings, manifest))

    def rows_of(self, fold: int) -> tuple[Rows, Rows]:
        """See `Subjects.rows_of`."""
        training, evaluation = self.subjects.rows_of(fold)
        known = is_known(self.labels)
        return training[known[training]], evaluation[known[evaluation]]

    def within_budget(self, settings: RunSettings, rows: Rows, cell: Cell) -> Rows:
        """Those of the training rows of a cell whose subjects keep their label; see `data.labelled`."""
        return within_budget(settings, self.subjects.manifest, rows, cell)

    def truth(self, rows: Rows) -> Truth:
        """What is known of these scans."""
        more = {name: values[rows] for name, values in self.more.items()}
        return Truth(self.labels[rows], self.subjects.sites[rows], self.subjects.names[rows], more=more)

    def write_predictions(self, fold: int, predictions: pd.DataFrame, path: Path) -> None:
        """Write a table with one line per evaluation scan of `fold`: subject, site, truth, and the `predictions`."""
        rows = self.rows_of(fold)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {"subject": self.subjects.names[rows], "site": self.subjects.sites[rows]}
        write_table(with_truth(known, self.labels[rows], predictions), path)


def within_budget(settings: RunSettings, manifest: pd.DataFrame, rows: Rows, cell: Cell) -> Rows:
    """Those of these rows, the labelled ones that a cell trains on, that keep their label; see `data.labelled`."""
    budget = settings.data.labelled
    if budget is None:
        return rows
    by = find_task(settings.task).balanced_by(settings)
    order = labelled_order(manifest, rows, by, cell.seed * 1_000 + cell.fold + 1)
    kept = set(order[: count_labelled(budget, len(order), cell.fold)])
    return rows[[name in kept for name in manifest["subject"].iloc[rows]]]


def count_labelled(budget: float | None, people: int, fold: int) -> int:
    """How many of the people that a fold trains on keep their label.

    Raises:
        UserError: more than there are, or too few to learn from.
    """
    if budget is None:
        return people
    count = budget if isinstance(budget, int) else round(budget * people)
    if count > people:
        raise UserError(
            f"data.labelled={budget} is more than the {people} subjects that fold {fold} trains on"
        )
    if count < 2:
        raise UserError(
            f"data.labelled={budget:g} leaves {count} of {people} subjects; at least 2 are needed"
        )
    return count


def check_budget(settings: RunSettings, manifest: pd.DataFrame, labels: Labels, splits: Splits) -> None:
    """UserError if a fold trains on fewer people than are to keep their label, or if these are fewer than classes."""
    known, people = is_known(labels), manifest["subject"].to_numpy(str)
    classes = {str(label) for label in labels[known]} if labels.dtype == object else set()
    for fold in range(len(splits.folds)):
        rows = splits.training(fold)
        count = count_labelled(settings.data.labelled, len(np.unique(people[rows[known[rows]]])), fold)
        if count < len(classes):
            raise UserError(
                f"data.labelled={settings.data.labelled:g} leaves {count} subjects for {len(classes)} classes; every "
                "class needs one or more"
            )


def with_truth(
    known: Mapping[str, npt.NDArray[np.str_]], labels: Labels, predictions: pd.DataFrame
) -> pd.DataFrame:
    """The `predictions` behind what is `known` of their scans, and the truth about them."""
    return pd.DataFrame(
        {**known, "truth": labels} | {name: predictions[name].to_numpy() for name in predictions}
    )


def rows_of_first_stage(settings: RunSettings, subjects: Subjects, cell: Cell) -> Rows:
    """The rows of a first stage: those that the cell trains on, and people without a truth for its task.

    Nobody who is judged in this cell is among them, and in a search nobody of the hold-out.
    """
    assert settings.pretraining is not None
    manifest, stage = subjects.manifest, find_task(settings.pretraining.task)
    of_trial = Labelled.of(subjects, settings)
    rows = rows_without_judged(of_trial, cell)
    if stage.needs_truth(settings.pretraining):
        rows = rows[is_known(stage.labels(settings.pretraining, manifest))[rows]]
        # Who has lost the label has lost it in both stages.
        labelled = of_trial.rows_of(cell.fold)[0]
        kept = of_trial.within_budget(settings, labelled, cell)
        rows = np.setdiff1d(rows, np.setdiff1d(labelled, kept))
    return rows


def beyond_budget(settings: RunSettings, subjects: Subjects, cell: Cell) -> Rows:
    """The rows that a cell trains on whose label the budget of the trial leaves out."""
    of_trial = Labelled.of(subjects, settings)
    known = of_trial.rows_of(cell.fold)[0]
    return np.setdiff1d(known, of_trial.within_budget(settings, known, cell))


def without_labels(truth: Truth, rows: Rows) -> Truth:
    """The truth in which nothing is known of these rows."""
    if not len(rows):
        return truth

    def hidden(labels: Labels) -> Labels:
        is_kept = ~np.isin(np.arange(len(labels)), rows)
        unknown = np.array(None, dtype=object) if labels.dtype == object else np.array(np.nan)
        return np.where(is_kept, labels, unknown)

    return replace(
        truth, labels=hidden(truth.labels), more={name: hidden(each) for name, each in truth.more.items()}
    )


def rows_without_judged(labelled: Labelled, cell: Cell) -> Rows:
    """All rows that a training without truth may see in a cell, in order: nobody who is judged there is among them.

    Those that the cell trains on, and the people of its fold without a truth. In a search nobody of the hold-out.
    """
    subjects = labelled.subjects
    training, evaluation = subjects.rows_of(cell.fold)
    people = subjects.names
    judged = np.unique(people[is_known(labelled.labels)])
    more = evaluation[~np.isin(people[evaluation], judged)] if cell.fold != HOLDOUT else evaluation[:0]
    return np.sort(np.concatenate([training, more]))


@dataclass(frozen=True)
class Place:
    """Where this worker runs."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    workers: int = 1
