"""What all pre-training tasks have in common: no truth to train on, and probes that say what the features are good for.

A probe reads frozen features of the cell's labelled people: a ridge regression reads the age, a logistic regression the
classes of any other column. Each is judged as the task of that name judges a contrastive encoder, so a probe *is* such
a task whose encoder is not trained. Without a probe the loss on people who are not trained on is all there is; it
compares epochs, but never losses of different temperatures or weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.by_subject import subject_means
from core.evaluation.splits import Splits
from core.objectives import Metric
from core.run_settings import Frozen, RunSettings
from core.task_description import TaskDescription
from core.tasks.brain_age import BrainAge
from core.tasks.classification import Classification
from core.tasks.task import Facts, Judging, Labels, Observed, Outcome, Prediction, Task, Truth, of_sites

AGE, SITE, PROBES, PROBE = "age", "site", "evaluation.probes", "probe"
VALIDATION_LOSS, LOSS = "validation_loss", "loss"
SITE_ACCURACY = "site_balanced_accuracy"
MEASURED = {AGE: ("mae", "r2"), "": ("macro_auc", "balanced_accuracy", "log_loss")}
"""What is kept of the metrics of a probe: of age, and of classes."""
NO_PROBE = "no probe"
"""The label of all scans, if nothing is read from the features."""


class ProbesSettings(Frozen):
    """How the features of a pre-training are judged."""

    probes: tuple[str, ...] = Field(
        (),
        description="columns of the cohort that are read from the frozen features: age by ridge regression, the "
        "classes of any other by logistic regression; people are judged whose value of the first one is known. None: "
        "the loss on people who are not trained on",
    )


class PretrainingSettings(RunSettings):
    """What every pre-training has."""

    evaluation: ProbesSettings = ProbesSettings()


@dataclass(frozen=True)
class Probe:
    """A task whose encoder is frozen, with settings under which a probe reads the embedding."""

    column: str
    task: Task[Any]
    settings: RunSettings

    @classmethod
    def of(cls, column: str) -> Probe:
        """The probe that reads a column of the cohort."""
        task: Task[Any] = BrainAge() if column == AGE else Classification()
        given: dict[str, object] = {"objective": {"name": "simclr"}}
        if column != AGE:
            given["data"] = {"target": column}
        return cls(column, task, task.settings.model_validate(given))

    @property
    def metrics(self) -> dict[str, Metric]:
        """What it measures, under names and titles that begin with the column."""
        known = self.task.about.metrics
        kept = MEASURED.get(self.column, MEASURED[""])
        return {
            f"{self.column}_{name}": known[name].model_copy(
                update={"title": f"{known[name].title} of {self.column}"}
            )
            for name in kept
        }

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of its task under these names."""
        return {f"{self.column}_{name}": value for name, value in metrics.items()}


S = TypeVar("S", bound=PretrainingSettings)


class Pretraining(Task[S]):
    """A pre-training; a task of this kind adds a model, an objective, views and `losses`."""

    @abstractmethod
    def losses(self, settings: S, model: nn.Module, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The loss (B,) of every scan on its own, with the same random choices at every call."""

    @abstractmethod
    def embed(self, settings: S, model: nn.Module, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The frozen features (B, E) that probes read."""

    def describe(self, settings: S) -> TaskDescription:
        """The words of the first probe, with the metrics of all."""
        probes = probes_of(settings)
        if not probes:
            return self.about
        first, loss = probes[0].task.about, self.about.metrics[VALIDATION_LOSS]
        column, others = (
            probes[0].column,
            {SITE_ACCURACY: first.metrics[SITE_ACCURACY], VALIDATION_LOSS: loss},
        )
        metrics = {name: metric for probe in probes for name, metric in probe.metrics.items()}
        floor = first.floor
        if floor is not None:
            floor = floor.model_copy(
                update={"metric": f"{column}_{floor.metric}", "of": f"{column}_{floor.of}"}
            )
        return first.model_copy(
            update={
                "name": self.about.name,
                "metrics": metrics | others,
                "objectives": (*metrics, *others),
                "shown": tuple(metrics),
                "floor": floor,
                "rival": None,
                "course": self.about.course,
                "caveats": (
                    "A probe reads features that were not trained for it; a training that starts from them may rank "
                    "pre-trainings in another order.",
                ),
            }
        )

    def check(self, settings: S) -> None:
        """Refuse a probe that is named twice, and the site as something to be found."""
        names = settings.evaluation.probes
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{PROBES} names {twice} twice")
        if SITE in names:
            raise UserError(
                f"{PROBES}: features should not tell the site; take it out, and search for --objectives {SITE_ACCURACY}"
            )

    def balanced_by(self, settings: S) -> str:
        """Folds are alike in what the first probe reads."""
        probes = probes_of(settings)
        return probes[0].task.balanced_by(probes[0].settings) if probes else SITE

    def labels(self, settings: S, manifest: pd.DataFrame) -> Labels:
        """What the first probe reads; without one all scans are alike."""
        probes = probes_of(settings)
        if not probes:
            return np.full(len(manifest), NO_PROBE, dtype=object)
        return probes[0].task.labels(probes[0].settings, manifest)

    def more_labels(self, settings: S, manifest: pd.DataFrame) -> dict[str, Labels]:
        """What the other probes read."""
        return {
            probe.column: probe.task.labels(probe.settings, manifest) for probe in probes_of(settings)[1:]
        }

    def needs_truth(self, settings: S) -> bool:
        """It trains on every scan."""
        return False

    def check_cohort(self, settings: S, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse a cohort from which a probe cannot learn."""
        for probe in probes_of(settings):
            probe.task.check_cohort(probe.settings, manifest, splits)

    def learn(self, settings: S, training: Truth) -> Facts:
        """What the first probe must know, and which it is."""
        probes = probes_of(settings)
        if not probes:
            return {PROBE: None}
        return {**probes[0].task.learn(probes[0].settings, training), PROBE: probes[0].column}

    def targets(self, truth: Truth, facts: Facts) -> npt.NDArray[np.generic]:
        """Nothing is trained on them."""
        return np.zeros(len(truth.labels), dtype=np.float32)

    def observe(self, settings: S, model: nn.Module, volumes_bcxyz: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features (B, E), and the loss (B,)."""
        return {
            "embedding": self.embed(settings, model, volumes_bcxyz),
            LOSS: self.losses(settings, model, volumes_bcxyz),
        }

    def judge(self, settings: S, training: Observed, evaluation: Observed, judging: Judging) -> Outcome:
        """Fit every probe on the training people who have its value, and measure it on the others."""
        losses = evaluation.outputs.get(LOSS)
        metrics = {} if losses is None else {VALIDATION_LOSS: _over_people(losses, evaluation)}
        first: Outcome | None = None
        for place, probe in enumerate(probes_of(settings)):
            column = None if place == 0 else probe.column
            fitted_on, measured_on = _labelled(training, column), _labelled(evaluation, column)
            found = probe.task.judge(probe.settings, fitted_on, measured_on, Judging(sites=False))
            metrics |= probe.named(found.metrics)
            first = first or found
        if first is None:
            shown = np.asarray(losses, dtype=np.float64)
            return Outcome(metrics, pd.DataFrame({"predicted": shown, "error": shown}))
        metrics[SITE_ACCURACY] = of_sites(training, evaluation, judging)
        return replace(first, metrics=metrics, kept={})

    def floor(self, settings: S, training: Truth, evaluation: Truth) -> Outcome | None:
        """That of the first probe."""
        probes = probes_of(settings)
        if not probes:
            return None
        found = probes[0].task.floor(probes[0].settings, training, evaluation)
        return None if found is None else replace(found, metrics=probes[0].named(found.metrics))

    def predictions(
        self, settings: S, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """What the first probe predicts."""
        probe = _probe_in(facts)
        return probe.task.predictions(probe.settings, outputs, fitted, facts)

    def check_fitted(self, fitted: str | None) -> None:
        """See `Task`: one of both kinds of probes."""
        try:
            BrainAge().check_fitted(fitted)
        except (ValueError, LookupError, TypeError):
            Classification().check_fitted(fitted)

    def calibrate(self, predictions: pd.DataFrame, source: str) -> str | None:
        """Of ages, as `brain_age` does."""
        if not pd.api.types.is_numeric_dtype(predictions["truth"]):
            return None
        return BrainAge().calibrate(predictions, source)

    def check_calibration(self, calibration: str) -> None:
        """See `Task`."""
        BrainAge().check_calibration(calibration)

    def read_truth(self, texts: Sequence[str], facts: Facts) -> Labels:
        """What the first probe reads."""
        return _probe_in(facts).task.read_truth(texts, facts)

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """What the first probe predicts, for people."""
        return _probe_in(facts).task.present(predictions, truth, calibration, facts)

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """How well the first probe predicts."""
        is_age = np.asarray(truth.labels).dtype != object
        task: Task[Any] = BrainAge() if is_age else Classification()
        of_first = {name.removeprefix(f"{AGE}_"): value for name, value in internal.items()}
        return task.measure(presented, truth, of_first if is_age else {})


def describe_loss(name: str, words: str) -> TaskDescription:
    """The description of a pre-training without probes.

    Args:
        name: of the task.
        words: what its loss is, such as `reconstruction loss`.
    """
    loss = Metric(title=words)
    return TaskDescription(
        name=name,
        metrics={VALIDATION_LOSS: loss},
        objectives=(VALIDATION_LOSS,),
        shown=(VALIDATION_LOSS,),
        error=Metric(title=f"{words}es"),
        truth="loss",
        caveats=(
            "No probe says what these features are good for: the loss compares epochs of one setting, and says nothing "
            f"across settings that change the loss itself. Name columns in {PROBES}.",
        ),
    )


def probes_of(settings: PretrainingSettings) -> list[Probe]:
    """The probes of a pre-training, the first one first."""
    return [Probe.of(column) for column in settings.evaluation.probes]


def _probe_in(facts: Facts) -> Probe:
    """The first probe of a model; UserError if it has none."""
    column = facts.get(PROBE)
    if not isinstance(column, str):
        raise UserError(
            "this pre-training has no probe, so it predicts nothing; begin a training with it (--start RUN), or name "
            f"what to read from its features in {PROBES}"
        )
    return Probe.of(column)


def _labelled(seen: Observed, column: str | None) -> Observed:
    """The scans with a value in `column` of `more`, with these values as labels; None: all, as they are."""
    if column is None:
        return replace(seen, more={})
    labels = seen.more[column]
    known = pd.notna(labels)
    return Observed(
        labels[known], seen.sites[known], seen.subjects[known], seen.embeddings[known],
        {name: values[known] for name, values in seen.outputs.items()},
    )  # fmt: skip


def _over_people(values: Floats, truth: Truth) -> float:
    """The mean over people of the means of their scans; NaN without scans."""
    return float(np.mean(subject_means(values, truth.subjects))) if len(values) else math.nan
