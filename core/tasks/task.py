"""What a task answers, and nothing else: the engine asks these questions, and knows no task.

A task is a file with a class derived from `Task`. It never imports Ray. To be found by its name it has a line in
`core.tasks`; a task of a user's own is named as FILE.py:NAME, or is an entry point of an installed package.

Shape suffixes: N and M scans, B scans of a batch, V views, C channels, X, Y, Z, E embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import JsonValue
from torch import nn

from core.errors import UserError
from core.evaluation import Floats, Names
from core.evaluation.label_sets import LabelSets
from core.evaluation.site import site_balanced_accuracy
from core.evaluation.splits import Rows, Splits
from core.run_settings import RunSettings
from core.task_description import TaskDescription
from core.volumes.views import ViewSettings, make_views

S = TypeVar("S", bound=RunSettings)
Labels = npt.NDArray[np.float64 | np.object_]
"""The truth about each scan: ages, or names of classes; NaN or None where it is unknown."""
NO_ATLAS = (
    "the task {} needs maps, and has no atlas of them: its description cannot have `voxels` or `simplest`"
)
Facts = dict[str, JsonValue]
"""What a model must know of the labels of its training subjects, as JSON values."""
Seen = Any
"""What `Task.step` gets of a batch: views (B, V, C, X, Y, Z), or what else a task makes of it, tensors by name."""


@dataclass(frozen=True)
class Truth:
    """Scans and what is known of them: labels (N,), sites (N,), and subjects (N,), whose they are."""

    labels: Labels
    sites: Names
    subjects: Names
    more: Mapping[str, Labels] = field(default_factory=dict, kw_only=True)
    """What else is known of them, (N,) each; see `Task.more_labels`."""


@dataclass(frozen=True)
class Observed(Truth):
    """Scans as a trained model sees them, without augmentation."""

    embeddings: Floats
    """(N, E)"""
    outputs: Mapping[str, Floats] = field(default_factory=dict)
    """What else `Task.observe` gave, (N, …) each."""


@dataclass(frozen=True)
class Judging:
    """How an evaluation is judged."""

    sites: bool = True
    """Whether to measure how well the site can be told from the embedding, which costs more than the rest."""
    penalty: float | None = None
    """What the cells of this configuration found for a refit; see `Task.penalty_of`."""
    folds: Rows | None = None
    """The fold (N,) of every training scan, if the outcome is to hold what `Task.judge_together` needs."""


@dataclass(frozen=True)
class Outcome:
    """The result of a trained model on subjects that it was not trained on."""

    metrics: dict[str, float]
    """By name: those of the description of the task, and others."""
    predictions: pd.DataFrame
    """One row per scan, in their order: `predicted`, `error` (see `TaskDescription.error`), and more columns."""
    fitted: str | None = None
    """What was fitted on the embeddings of the training subjects, as JSON."""
    kept: Mapping[str, object] = field(default_factory=dict)
    """What `Task.judge_together` needs, by the names in `Task.keeps`: arrays, or dictionaries of arrays."""
    pictures: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    """Of a few scans, for the figures of a report: arrays (P, …) by name, and `place` (P,), their rows in the table."""


@dataclass(frozen=True)
class JudgedCell:
    """A finished cell: its fold, the truth about its validation scans, what its outcome kept, its metrics so far."""

    fold: int
    truth: Truth
    kept: Mapping[str, object]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """What is known of a batch of scans beside their volumes."""

    maps: Mapping[str, torch.Tensor]
    """(B, X, Y, Z) int16 each, by name; see `Task.needed_maps`."""
    edges: tuple[float, float, float]
    """Of a voxel in mm."""
    voxel_ml: torch.Tensor
    """(B,): how much of a person is in a voxel; a registered brain is stretched."""
    final: bool
    """Whether the model is trained to its end, so that what takes long is measured, too."""


@dataclass(frozen=True)
class Step:
    """The loss of one batch, and what else is noted for the history: numbers, each the mean over an epoch."""

    loss: torch.Tensor
    noted: Mapping[str, torch.Tensor] = field(default_factory=dict)


class ClassProbabilities(NamedTuple):
    """How probable every class is in every voxel."""

    values: Floats
    """(N, 1 + K, X, Y, Z), the background first."""
    classes: LabelSets
    """The K classes."""


@dataclass(frozen=True)
class Prediction:
    """What `predict` prints and writes."""

    table: pd.DataFrame
    """One row per scan."""
    shown: pd.DataFrame
    """The same scans for the terminal: texts under headings."""
    how_to_read: str
    lacks: tuple[str, ...] = ()
    """What cannot be given, and why."""


class Task(ABC, Generic[S]):
    """A task; its methods are pure functions of what they are given."""

    about: ClassVar[TaskDescription]
    keeps: ClassVar[tuple[str, ...]] = ()
    """The names in `Outcome.kept`."""
    reads_training: ClassVar[bool] = True
    """Whether `judge` fits something on what the model sees in the training scans."""
    settings: type[S]
    """Its settings: those that every task has, and its own blocks."""

    def describe(self, settings: S) -> TaskDescription:
        """`about`, where settings decide what is measured."""
        return self.about

    # Before anything starts.

    def check(self, settings: S) -> None:
        """Refuse settings that validation alone cannot refuse.

        Raises:
            UserError: naming the setting, and what would be right.
        """

    @abstractmethod
    def balanced_by(self, settings: S) -> str:
        """The column of the cohort in which all folds are to be alike: of numbers, or of names."""

    @abstractmethod
    def labels(self, settings: S, manifest: pd.DataFrame) -> Labels:
        """The truth (N,) about every scan of a cohort; scans without one are neither trained on nor judged.

        Raises:
            UserError: the cohort cannot have it.
        """

    def needed_maps(self, settings: S) -> tuple[str, ...]:
        """The maps that every scan which is trained on must have, for `views_with_maps`."""
        return ()

    def maps_to_judge(self, settings: S) -> tuple[str, ...]:
        """The maps that `observe_with_maps` is given; every scan with a label must have them."""
        return self.needed_maps(settings)

    def more_labels(self, settings: S, manifest: pd.DataFrame) -> dict[str, Labels]:
        """What else `judge` must know of every scan of a cohort, (N,) each by name: `Truth.more`."""
        return {}

    def features(self, settings: S, manifest: pd.DataFrame) -> Floats | None:
        """What `judge` gets as embeddings (N, K) of a task without a network; None if a model has to see the scans."""
        return None

    def needs_truth(self, settings: S) -> bool:
        """Whether a training needs the truth about its scans; if not, it takes all scans, and is judged on some."""
        return True

    def check_cohort(self, settings: S, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse a cohort from which nothing can be learnt.

        Raises:
            UserError: why, and what would help.
        """

    def check_grid(self, settings: S, grid: tuple[int, int, int]) -> list[str]:
        """Refuse a cohort whose volumes (X, Y, Z) the model cannot take; what people should know, as notes.

        Raises:
            UserError: why, and what would help.
        """
        return []

    # Training.

    def learn(self, settings: S, training: Truth) -> Facts:
        """What a model must know of the labels of its training subjects, such as their mean."""
        return {}

    def targets(self, truth: Truth, facts: Facts) -> npt.NDArray[np.generic]:
        """The truth about N scans as numbers (N,), which `step` gets as a tensor."""
        return truth.labels.astype(np.float32)

    @abstractmethod
    def build(self, settings: S, in_channels: int, facts: Facts) -> nn.Module:
        """The model, on the CPU, with PyTorch's current random state; `facts` are {} for runs before version 0.3."""

    @abstractmethod
    def objective(self, settings: S, facts: Facts) -> nn.Module:
        """What `step` computes the loss with; its schedules know the length of the run."""

    def views(self, settings: S, volumes_bcxyz: torch.Tensor, rows: Rows, epoch: int, seed: int) -> Seen:
        """What `step` gets of a batch: a function of seed, subject, epoch and view alone."""
        views: ViewSettings = getattr(settings, "views", None) or ViewSettings(count=1)
        return make_views(volumes_bcxyz, rows, epoch, seed, views)

    def views_with_maps(
        self,
        settings: S,
        volumes_bcxyz: torch.Tensor,
        maps: Mapping[str, torch.Tensor],
        rows: Rows,
        epoch: int,
        seed: int,
    ) -> Seen:
        """As `views`, with the maps (B, X, Y, Z) int16 that the task needs."""
        return self.views(settings, volumes_bcxyz, rows, epoch, seed)

    @abstractmethod
    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        seen: Seen,
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch.

        Args:
            model: as from `build`; it may be wrapped for distributed training.
            objective: as from `objective`.
            seen: as from `views`.
            targets_b: as from `targets`.
            progress: e/E in epoch e of E.
        """

    def course(self, settings: S, objective: nn.Module, progress: float) -> dict[str, float]:
        """What is noted once in every epoch for the history, by name, such as a temperature."""
        return {}

    # Judging.

    @abstractmethod
    def observe(self, settings: S, model: nn.Module, volumes_bcxyz: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a batch of scans gives, (B, …) each by name; `embedding` (B, E) is one of them."""

    def observe_with_maps(
        self, settings: S, model: nn.Module, volumes_bcxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """As `observe`, for scans that are judged, of which the maps are known."""
        return self.observe(settings, model, volumes_bcxyz)

    def atlas(self, settings: S, maps: Iterable[Beside], one_class: bool) -> npt.NDArray[np.int16]:
        """What a map of classes is before a scan is seen: (X, Y, Z), of the training scans' maps.

        With `one_class` their most frequent class everywhere. Needed where the description has `voxels`, and the task
        needs maps.
        """
        raise UserError(NO_ATLAS.format(self.about.name))

    def observe_maps(
        self, settings: S, predicted_bxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """As `observe_with_maps`, of maps that something else has predicted, such as an atlas."""
        raise UserError(NO_ATLAS.format(self.about.name))

    @abstractmethod
    def judge(self, settings: S, training: Observed, evaluation: Observed, judging: Judging) -> Outcome:
        """Fit on the training subjects what has to be fitted, and measure it on the evaluation subjects."""

    def judge_together(self, cells: Sequence[JudgedCell]) -> list[tuple[dict[str, float], pd.DataFrame]]:
        """The metrics and predictions of finished cells anew, where they choose something for each other; else []."""
        return []

    def penalty_of(self, cells: Sequence[JudgedCell]) -> float | None:
        """What the finished cells of a configuration found for its refit; None if there is nothing to find."""
        return None

    def floor(self, settings: S, training: Truth, evaluation: Truth) -> Outcome | None:
        """What is predicted without images; None if the description has no floor."""
        return None

    # Prediction.

    @abstractmethod
    def predictions(
        self, settings: S, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """What is predicted for N scans: the column `predicted`, and more.

        Args:
            settings: of the model.
            outputs: as from `observe`, for all scans.
            fitted: see `Outcome`.
            facts: see `learn`.
        """

    def maps(
        self, settings: S, outputs: Mapping[str, Floats], facts: Facts
    ) -> dict[str, npt.NDArray[np.int16]]:
        """Maps of classes (N, X, Y, Z) by name, on the grid of the cohort, which `predict` writes for every scan."""
        return {}

    def probability_maps(
        self, settings: S, outputs: Mapping[str, Floats], facts: Facts
    ) -> dict[str, ClassProbabilities]:
        """By name the probabilities of classes on the grid of the cohort, which `predict` makes maps of.

        They are brought to the grid of a scan before the likeliest class is taken, so that its borders are smooth.
        """
        return {}

    def segmented_classes(self, settings: S) -> LabelSets | None:
        """The classes behind the background in `probability_maps`; None if the task gives none."""
        return None

    def judge_map(
        self,
        settings: S,
        classes_xyz: npt.NDArray[np.int16],
        reference_xyz: npt.NDArray[np.int16],
        edges: tuple[float, float, float],
        voxel_ml: float,
    ) -> dict[str, float]:
        """Columns of a table about one map of classes (X, Y, Z), beside the true one, on voxels of these edges in mm.

        `measure` finds them in what it gets. {} if the task gives no `probability_maps`.
        """
        return {}

    def mean_of(self, tables: Sequence[pd.DataFrame], facts: Facts) -> pd.DataFrame:
        """The mean of what several models say of the same scans, each as from `predictions`.

        Raises:
            UserError: a column has no mean.
        """
        words = [str(name) for name in tables[0].select_dtypes(exclude="number")]
        if words:
            raise UserError(
                f"the task {self.about.name} predicts {', '.join(words)}, which has no mean over models; use one model"
            )
        mean: pd.DataFrame = pd.concat(tables).groupby(level=0, sort=False).mean()
        return mean

    def check_fitted(self, fitted: str | None) -> None:
        """ValueError, or LookupError, if `fitted` is not what `judge` makes."""

    def calibrate(self, predictions: pd.DataFrame, source: str) -> str | None:
        """What out-of-fold predictions say of further ones, as JSON; None if nothing is kept.

        Args:
            predictions: subject, truth, and the columns of `Outcome.predictions`.
            source: whose they are, for people who read the file.
        """
        return None

    def check_calibration(self, calibration: str) -> None:
        """ValueError, LookupError or TypeError if `calibration` is not what `calibrate` makes."""

    def read_truth(self, texts: Sequence[str], facts: Facts) -> Labels:
        """The truth about scans as a user typed it.

        Raises:
            UserError: it is none.
        """
        raise UserError(f"--truth cannot act on the task {self.about.name}")

    @abstractmethod
    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """The predictions for N scans for people.

        Args:
            predictions: as from `predictions`.
            truth: (N,), if it is known.
            calibration: see `calibrate`.
            facts: see `learn`.
        """

    @abstractmethod
    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """What `evaluate` says of predictions, by names in plain words; a person counts once.

        Args:
            presented: `Prediction.table`.
            truth: about these scans, all of it known.
            internal: the metrics of the same model on the held-out people of its own run, if these are others.
        """


def truth_of(
    manifest: pd.DataFrame, labels: Labels, rows: Rows, more: Mapping[str, Labels] | None = None
) -> Truth:
    """What is known of these rows of a cohort, of which all scans have `labels`, and `more`."""
    sites, people = manifest["site"].to_numpy(str), manifest["subject"].to_numpy(str)
    of_rows = {name: values[rows] for name, values in (more or {}).items()}
    return Truth(labels[rows], sites[rows], people[rows], more=of_rows)


def check_parts(labels: Labels, splits: Splits, truth: str) -> None:
    """Refuse a fold, or a hold-out, without a scan whose truth is known: nothing could be judged there.

    Raises:
        UserError: naming the part.
    """
    known = is_known(labels)
    parts = {f"fold {fold}": rows for fold, rows in enumerate(splits.folds)}
    if splits.holdout.size:
        parts["the hold-out"] = splits.holdout
    for part, rows in parts.items():
        if not known[rows].any():
            raise UserError(
                f"{part} has {len(rows)} scans, and the {truth} of none of them is known: nothing can be judged there; "
                "use other splits (another --search-seed, or fewer --folds), or give these people a value"
            )


def is_known(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which labels (N,) are known."""
    known: npt.NDArray[np.bool_] = np.asarray(pd.notna(labels))
    return known


def of_sites(training: Observed, evaluation: Observed, judging: Judging, *, reference: bool = False) -> float:
    """The balanced accuracy of telling the site from the embedding; NaN if it has no meaning, or is not asked for.

    `reference`: with the published probe, see `site_balanced_accuracy`.
    """
    if not judging.sites:
        return math.nan
    accuracy = site_balanced_accuracy(
        training.embeddings,
        training.sites,
        evaluation.embeddings,
        evaluation.sites,
        training.subjects,
        evaluation.subjects,
        reference=reference,
    )
    return math.nan if accuracy is None else accuracy
