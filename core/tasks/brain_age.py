"""Brain age from volumes: a contrastive encoder judged by a ridge probe, or direct L1 regression (system A).

    model = build_model(settings, in_channels)
    loss, log = training_loss(model, objective, views, ages, progress)
    outcome = judge(training, evaluation)

Shape suffixes: B subjects, V views, C channels, X, Y, Z, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn

from core.config import RunSettings
from core.errors import UserError
from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_weights
from core.evaluation.probes import (
    ALPHAS,
    FEWEST_SUBJECTS,
    AgeProbe,
    chosen_penalty,
    fit_age_probe,
    predictions_by_penalty,
)
from core.evaluation.regression import median_baseline, regression_metrics
from core.evaluation.site import site_balanced_accuracy
from core.evaluation.splits import Rows, Splits
from core.losses.settings import REGRESSION_LOSSES
from core.models import build_encoder, build_projection_head
from core.models.heads import RegressionHead

CONTRASTIVE_ONLY = ("objective", "model.head", "model.readout")
"""What a `RegressionModel` does not have: its loss has no settings, and it is read without a projection."""


class ContrastiveModel(nn.Module):
    """Encoder and projection head; `readout` says which of the two the probe sees."""

    def __init__(self, encoder: nn.Module, head: nn.Module, readout: str) -> None:
        super().__init__()
        self.encoder, self.head, self.readout = encoder, head, readout

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """Projections (B, D) on the unit sphere."""
        projection_bd: torch.Tensor = self.head(self.encoder(volumes_bcxyz))
        return projection_bd

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """What the probe reads, (B, E)."""
        embedding_be: torch.Tensor = self.encoder(volumes_bcxyz)
        if self.readout == "encoder":
            return embedding_be
        projection_bd: torch.Tensor = self.head(embedding_be)
        return projection_bd


class RegressionModel(nn.Module):
    """Encoder and one linear unit that predicts age as (age − mean)/SD of the training subjects."""

    age_mean: torch.Tensor
    age_sd: torch.Tensor

    def __init__(self, encoder: nn.Module, head: nn.Module, training_ages: Floats) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.register_buffer("age_mean", torch.tensor(float(np.mean(training_ages))))
        self.register_buffer("age_sd", torch.tensor(max(float(np.std(training_ages)), 1e-6)))

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """Predicted age (B, 1) in years."""
        standardised_b: torch.Tensor = self.head(self.encoder(volumes_bcxyz))
        return (standardised_b * self.age_sd + self.age_mean).unsqueeze(-1)

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The encoder's embedding (B, E)."""
        embedding_be: torch.Tensor = self.encoder(volumes_bcxyz)
        return embedding_be


AgeModel = ContrastiveModel | RegressionModel


@dataclass(frozen=True)
class Embedded:
    """Scans as the probe sees them: embeddings (n, E), ages (n,) in years, sites (n,), subjects (n,), predictions."""

    embeddings: Floats
    ages: Floats
    sites: Names
    subjects: Names
    """Whose each scan is: in everything that is fitted or measured, a person counts once."""
    predicted: Floats | None = None
    """Ages that the model itself gives; None where a probe is needed."""


@dataclass(frozen=True)
class Outcome:
    """The result of a trained model on subjects that it was not trained on."""

    metrics: dict[str, float]
    predicted: Floats
    probe: AgeProbe | None
    by_penalty: Floats | None = None
    """The ages (P, m) predicted with every penalty of the probe (`ALPHAS`), if they were asked for."""
    without: Mapping[int, Floats] = field(default_factory=dict)
    """By fold, the error (P,) of every penalty if the people of this fold are not among those of the probe."""


def build_model(settings: RunSettings, in_channels: int, training_ages: Floats) -> AgeModel:
    """The model of `settings`, on the CPU, with PyTorch's current random state."""
    encoder = build_encoder(settings.model, in_channels)
    if is_regression(settings):
        return RegressionModel(encoder, RegressionHead(encoder.embedding_dim), training_ages)
    head = build_projection_head(settings.model, encoder.embedding_dim)
    return ContrastiveModel(encoder, head, settings.model.readout)


def build_objective(settings: RunSettings) -> nn.Module:
    """The loss of `settings`, whose schedules know the length of the run."""
    return settings.objective.build(settings.training.epochs)


def check(settings: RunSettings) -> None:
    """Try the objective on a few made-up embeddings over the whole run; UserError for a value it cannot take."""
    objective = build_objective(settings)
    ages = torch.tensor([20.0, 40.0, 60.0, 80.0])
    embeddings = torch.eye(4)[:, None, : 1 if is_regression(settings) else 4].repeat(1, 2, 1)
    for epoch in {1, settings.training.epochs}:
        objective(embeddings, ages, epoch / settings.training.epochs)


def check_cohort(manifest: pd.DataFrame, splits: Splits) -> None:
    """Refuse subjects from whom nothing about age can be learnt.

    Args:
        manifest: of the cohort; columns subject and age in years.
        splits: of its rows.

    Raises:
        UserError: all ages are equal, or a fold leaves too few subjects to train on.
    """
    ages = manifest.groupby("subject")["age"].mean()
    if ages.nunique() == 1:
        raise UserError(
            f"all {len(ages)} subjects are {ages.iloc[0]:g} years old: nothing about age can be learnt from them"
        )
    for fold in range(len(splits.folds)):
        trained = manifest["subject"].iloc[splits.training(fold)].nunique()
        if trained < FEWEST_SUBJECTS:
            raise UserError(
                f"{len(splits.folds)} folds leave {trained} of {len(ages)} subjects to train on, and at least "
                f"{FEWEST_SUBJECTS} are needed; use more --folds, a smaller --holdout, or more subjects"
            )


def is_regression(settings: RunSettings) -> bool:
    """Whether the model predicts age itself, without a probe."""
    return settings.objective.name in REGRESSION_LOSSES


def training_loss(
    model: nn.Module, objective: nn.Module, views_bvcxyz: torch.Tensor, ages_b: torch.Tensor, progress: float
) -> torch.Tensor:
    """Loss of one batch; `model` may be wrapped for distributed training.

    Args:
        model: as from `build_model`.
        objective: as from `build_objective`; its `diagnostics` describe the call afterwards.
        views_bvcxyz: views, (B, V, C, X, Y, Z).
        ages_b: ages in years, (B,).
        progress: e/E in epoch e of E.
    """
    subjects, views = views_bvcxyz.shape[:2]
    output_bvd = model(views_bvcxyz.flatten(0, 1)).view(subjects, views, -1)
    loss: torch.Tensor = objective(output_bvd, ages_b, progress)
    return loss


def judge(
    training: Embedded,
    evaluation: Embedded,
    *,
    sites: bool = True,
    penalty: float | None = None,
    folds: Rows | None = None,
) -> Outcome:
    """Fit the probe on the training subjects only, and measure it on the evaluation subjects.

    Args:
        training: scans that the model was trained on.
        evaluation: scans that it was not trained on.
        sites: whether to measure how well the site can be told from the embedding, which costs more than the rest.
        penalty: of the probe; chosen on the training subjects if None.
        folds: the fold (n,) of every training scan. If it is given, every penalty is tried, for `cross_fit`.
    """
    probe, every, without = None, None, {}
    predicted = evaluation.predicted
    if predicted is None:
        probe = fit_age_probe(training.embeddings, training.ages, training.subjects, penalty=penalty)
        predicted = probe.predict(evaluation.embeddings)
        if folds is not None:
            every = predictions_by_penalty(
                training.embeddings, training.ages, evaluation.embeddings, training.subjects
            )
            without = _errors_without_folds(training, evaluation, folds)
    metrics = regression_metrics(predicted, evaluation.ages, evaluation.subjects)
    median = median_baseline(training.ages, evaluation.ages, training.subjects, evaluation.subjects)
    metrics["median_mae"] = median["mae"]
    accuracy = None
    if sites:
        accuracy = site_balanced_accuracy(
            training.embeddings,
            training.sites,
            evaluation.embeddings,
            evaluation.sites,
            training.subjects,
            evaluation.subjects,
        )
    metrics["site_balanced_accuracy"] = math.nan if accuracy is None else accuracy
    return Outcome(metrics, predicted, probe, every, without)


def _errors_without_folds(training: Embedded, evaluation: Embedded, folds: Rows) -> dict[int, Floats]:
    """By fold, the error (P,) of every penalty if the probe is fitted without the people of this fold.

    Empty if without any two folds too few people remain for a probe. So this is the same in all cells of a trial.
    """
    people = [len(np.unique(training.subjects[folds == fold])) for fold in np.unique(folds)]
    people.append(len(np.unique(evaluation.subjects)))
    if sum(sorted(people)[:-2]) < FEWEST_SUBJECTS:
        return {}
    errors = {}
    for fold in np.unique(folds):
        rest = folds != fold
        every = predictions_by_penalty(
            training.embeddings[rest], training.ages[rest], evaluation.embeddings, training.subjects[rest]
        )
        errors[int(fold)] = errors_by_penalty(every, evaluation.ages, evaluation.subjects)
    return errors


def errors_by_penalty(by_penalty: Floats, ages: Floats, subjects: Names) -> Floats:
    """The mean absolute error over people (P,) in years of predictions (P, m) for m scans."""
    errors: Floats = np.average(np.abs(by_penalty - ages), axis=1, weights=subject_weights(subjects))
    return errors


@dataclass(frozen=True)
class JudgedCell:
    """A finished cell: what its probe predicts for its m validation scans with every penalty."""

    fold: int
    by_penalty: Floats
    """(P, m) in years."""
    ages: Floats
    subjects: Names
    without: Mapping[int, Floats]
    """See `Outcome`."""

    @property
    def errors(self) -> Floats:
        """The mean absolute error over people (P,) in years with every penalty."""
        return errors_by_penalty(self.by_penalty, self.ages, self.subjects)


def cross_fit(cells: Sequence[JudgedCell]) -> list[tuple[dict[str, float], Floats]]:
    """The metrics of every cell, and its predictions (m,), with a penalty that the cells of other folds choose.

    In those cells people are judged whom neither encoder nor probe knows, so the penalty is not chosen on embeddings
    that follow age too closely. The people of the cell itself have no part in it as far as probes can tell: for
    them the probes of the other cells are fitted, and judged, without them (nested cross-validation). What remains:
    the encoders of the other cells were trained with them.

    An empty list if a cell finds no other one that can choose for it: with two folds or fewer, or with very few people.
    """
    chosen = [
        [
            other.without[cell.fold]
            for other in cells
            if other.fold != cell.fold and cell.fold in other.without
        ]
        for cell in cells
    ]
    if not all(chosen):
        return []
    made = []
    for cell, curves in zip(cells, chosen, strict=True):
        penalty = chosen_penalty(curves)
        predicted = cell.by_penalty[ALPHAS.index(penalty)]
        measured = regression_metrics(predicted, cell.ages, cell.subjects)
        made.append((measured | {"penalty": penalty}, predicted))
    return made
