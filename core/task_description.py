"""A task in words: what its numbers are called, what they are compared with, and which figures show them.

A run keeps the description of its task in run.json, so a report runs no code of a task. A run without one was made
before version 0.3, and is one of brain age.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from core.objectives import COST, COST_METRIC, Metric
from core.run_names import L1, MEDIAN, PUBLISHED, REFITTED, WINNER


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Floor(_Part):
    """What predicts without images, and what every model must beat."""

    method: str
    """Its name in tables: `training median`."""
    words: str
    """In a sentence: `predicting the training median`."""
    metric: str
    """The metric of a cell that has its value on the same subjects: `median_mae`."""
    of: str
    """The metric whose value this is: `mae`."""


class Rival(_Part):
    """An older method that is refitted beside the winner, and that a sweep may tune before its own search."""

    folder: str
    """Of its refits in a run."""
    method: str
    """Its name in tables: `L1 baseline`."""
    words: str
    changes: dict[str, JsonValue] = {}
    """What makes it of any configuration."""
    without: tuple[str, ...] = ()
    """The settings, and blocks of settings, that it does not have."""


class TaskDescription(_Part):
    """What people read about a task."""

    name: str
    metrics: dict[str, Metric]
    """What it measures of a cell, by name."""
    objectives: tuple[str, ...]
    """The metrics that a search can optimise; the first one is the default."""
    shown: tuple[str, ...]
    """The metrics in the tables of results; the first one is that of the answer."""
    error: Metric
    """The error of one person, by which methods are compared in pairs; its title is a plural: `absolute errors`."""
    interval: Literal["error", "complement", "auc", "none"] = "error"
    """The interval of the first of `shown` over people: that of the mean error, of 1 minus it, of an area under the ROC
    curve, or none."""
    truth: str
    """What is predicted, in the singular: `age`."""
    truth_unit: str = ""
    column: str = ""
    """The column of the cohort that has it; known for a run."""
    floor: Floor | None = None
    rival: Rival | None = None
    voxels: Rival | None = None
    """The classical baseline on the voxels themselves, if what the task fits on embeddings can be fitted on them."""
    simplest: Rival | None = None
    """What knows even less than `voxels`, such as one class for every voxel."""
    starts: tuple[Rival, ...] = ()
    """Of a run that compares starts: the best trial of each. Known for a run."""
    nothing_found: str = ""
    """What follows if no method beats the floor: `age has not been found in these images`."""
    caveats: tuple[str, ...] = ()
    """What its numbers do not show."""
    figures: tuple[str, ...] = ()
    """Of people and their predictions, by name; see `core.report.page`."""
    course: tuple[str, ...] = ()
    """What a training step of it notes for the history beside the loss."""

    @property
    def searchable(self) -> dict[str, Metric]:
        """The metrics that a search can optimise, by name."""
        return {name: self.metrics[name] for name in self.objectives}

    @property
    def judged_by(self) -> Metric:
        """The metric of the answer."""
        return self.metrics[self.shown[0]]

    @property
    def refitted(self) -> dict[str, str]:
        """The folders of the refits of a run, and the method in each of them."""
        others = (self.rival, self.voxels, self.simplest, *self.starts)
        return REFITTED | {each.folder: each.method for each in others if each is not None}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in tables, in their order."""
        floor = () if self.floor is None else (self.floor.method,)
        return (*self.refitted.values(), *floor)

    @property
    def in_words(self) -> dict[str, str]:
        """The methods in a sentence."""
        words = {WINNER: "the search winner", PUBLISHED: "the published configuration"}
        others = (self.rival, self.voxels, self.simplest, *self.starts, self.floor)
        return words | {each.method: each.words for each in others if each is not None}

    def objective(self, name: str) -> Metric:
        """The metric of this name, or the cost; one without words if an older version knew it."""
        return COST_METRIC if name == COST else self.metrics.get(name) or Metric(title=name)


SHOWN_BEFORE_0_3 = ("mae", "r2", "site_balanced_accuracy")
BRAIN_AGE = TaskDescription(
    name="brain_age",
    metrics={
        "mae": Metric(title="MAE", unit="years"),
        "r2": Metric(title="R²", better="high"),
        "mse": Metric(title="MSE", unit="years²"),
        "msle": Metric(title="MSLE"),
        "median_ae": Metric(title="median absolute error", unit="years"),
        "explained_variance": Metric(title="explained variance", better="high"),
        "site_balanced_accuracy": Metric(
            title="site balanced accuracy", needs_sites=True, as_objective="site balanced accuracy"
        ),
        "openbhb_score": Metric(
            title="site balanced accuracy ** 0.3 · MAE",
            unit="years",
            needs_sites=True,
            as_objective="site balanced accuracy ** 0.3 · validation MAE",
        ),
    },
    objectives=("mae", "site_balanced_accuracy", "openbhb_score"),
    shown=(*SHOWN_BEFORE_0_3, "mse", "msle", "median_ae", "explained_variance"),
    error=Metric(title="absolute errors", unit="years"),
    truth="age",
    truth_unit="years",
    column="age",
    floor=Floor(method=MEDIAN, words="predicting the training median", metric="median_mae", of="mae"),
    rival=Rival(
        folder="l1",
        method=L1,
        words="the L1 baseline",
        changes={"objective.name": "l1"},
        without=("objective", "model.head", "model.readout"),
    ),
    voxels=Rival(folder="voxels", method="voxels", words="ridge regression on voxels"),
    nothing_found="age has not been found in these images",
    caveats=(
        "Predicted ages are drawn to the middle: if the prediction is imperfect, young people look older and old "
        "people younger. Without a correction for this, a brain-age gap is not a finding about a person; "
        "`predict` and `evaluate` give corrected gaps, too.",
    ),
    figures=("predicted", "gap"),
    course=("temperature", "width", "neighbours"),
)
BEFORE_0_3 = BRAIN_AGE.model_copy(update={"shown": SHOWN_BEFORE_0_3})
"""That of every run that has none: its tables have fewer columns."""
