"""Brain age from volumes: a contrastive encoder judged by a ridge probe, or direct L1 regression (system A).

Shape suffixes: B subjects, V views, C channels, X, Y, Z, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_means, subject_weights
from core.evaluation.calibration import LEVEL, Calibration, calibrate, gap_metrics, gap_table
from core.evaluation.probes import (
    ALPHAS,
    FEWEST_SUBJECTS,
    AgeProbe,
    fit_age_probe,
    predictions_by_penalty,
)
from core.evaluation.regression import median_age, median_baseline, regression_metrics
from core.evaluation.site import openbhb_score
from core.evaluation.splits import Splits
from core.losses.members import Exponential
from core.losses.settings import REGRESSION_LOSSES, ObjectiveSettings
from core.models import build_encoder, build_projection_head
from core.models.contrastive import ContrastiveModel
from core.models.heads import RegressionHead
from core.models.settings import ModelSettings, ResNetSettings
from core.run_settings import Frozen, RunSettings
from core.task_description import BRAIN_AGE
from core.tasks.penalties import (
    BY_PENALTY,
    WITHOUT,
    best_place,
    by_penalty_of,
    chosen_for_each,
    errors_without_folds,
)
from core.tasks.task import (
    Facts,
    JudgedCell,
    Judging,
    Labels,
    Observed,
    Outcome,
    Prediction,
    Step,
    Task,
    Truth,
    of_sites,
)
from core.volumes.views import ViewSettings

OLDEST = 130
"""No person was older, in years."""
NO_CALIBRATION = (
    "this run has kept no out-of-fold predictions, so there is neither a correction for the age bias nor a prediction "
    "interval"
)


class AgeProbeSettings(Frozen):
    """How the embedding of a contrastive encoder is judged."""

    reference: Literal["dynlocrep"] | None = Field(
        None,
        description="dynlocrep: the published probe, ridge on embeddings as they are with penalties 0.01 to 100 by R2 "
        "over five folds in the order of the rows, and the logistic probe of sites of the OpenBHB challenge",
    )


class BrainAgeSettings(RunSettings):
    """The settings of brain age; the defaults are the published ones."""

    task: str = "brain_age"
    views: ViewSettings = ViewSettings()
    model: ModelSettings = ResNetSettings()
    objective: ObjectiveSettings = Exponential()
    evaluation: AgeProbeSettings = AgeProbeSettings()


class RegressionModel(nn.Module):
    """Encoder and one linear unit that predicts age as (age − mean)/SD of the training subjects."""

    age_mean: torch.Tensor
    age_sd: torch.Tensor

    def __init__(self, encoder: nn.Module, head: nn.Module, mean: float, sd: float) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.register_buffer("age_mean", torch.tensor(mean))
        self.register_buffer("age_sd", torch.tensor(max(sd, 1e-6)))

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """Predicted age (B, 1) in years."""
        standardised_b: torch.Tensor = self.head(self.encoder(volumes_bcxyz))
        return (standardised_b * self.age_sd + self.age_mean).unsqueeze(-1)

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The encoder's embedding (B, E)."""
        embedding_be: torch.Tensor = self.encoder(volumes_bcxyz)
        return embedding_be


AgeModel = ContrastiveModel | RegressionModel


class BrainAge(Task[BrainAgeSettings]):
    """See the top of this file."""

    about = BRAIN_AGE
    keeps = (BY_PENALTY, WITHOUT)
    settings = BrainAgeSettings

    def check(self, settings: BrainAgeSettings) -> None:
        """Try the objective on a few made-up embeddings over the whole run; UserError for a value it cannot take."""
        if is_regression(settings) and settings.evaluation.reference is not None:
            raise UserError(
                f"evaluation.reference cannot act with objective.name={settings.objective.name}, which has no probe"
            )
        objective = self.objective(settings, {})
        ages = torch.tensor([20.0, 40.0, 60.0, 80.0])
        embeddings = torch.eye(4)[:, None, : 1 if is_regression(settings) else 4].repeat(1, 2, 1)
        for epoch in {1, settings.training.rounds}:
            objective(embeddings, ages, epoch / settings.training.rounds)

    def balanced_by(self, settings: BrainAgeSettings) -> str:
        """Folds are alike in age."""
        return "age"

    def labels(self, settings: BrainAgeSettings, manifest: pd.DataFrame) -> Labels:
        """Ages (N,) in years."""
        ages: npt.NDArray[np.float64] = manifest["age"].to_numpy(float)
        return ages

    def needs_truth(self, settings: BrainAgeSettings) -> bool:
        """SimCLR contrasts scans without it."""
        return settings.objective.name != "simclr"

    def check_cohort(self, settings: BrainAgeSettings, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse subjects from whom nothing about age can be learnt.

        Raises:
            UserError: all ages are equal, or a fold leaves too few subjects to train on.
        """
        known = manifest["age"].notna()
        ages = manifest[known].groupby("subject")["age"].mean()
        if ages.nunique() == 1:
            raise UserError(
                f"all {len(ages)} subjects are {ages.iloc[0]:g} years old: nothing about age can be learnt from them"
            )
        for fold in range(len(splits.folds)):
            rows = splits.training(fold)
            trained = manifest["subject"].iloc[rows][known.iloc[rows]].nunique()
            if trained < FEWEST_SUBJECTS:
                raise UserError(
                    f"{len(splits.folds)} folds leave {trained} of {len(ages)} subjects to train on, and at least "
                    f"{FEWEST_SUBJECTS} are needed; use more --folds, a smaller --holdout, or more subjects"
                )

    def learn(self, settings: BrainAgeSettings, training: Truth) -> Facts:
        """The mean and the SD of the subjects' ages."""
        ages = subject_means(cast(Floats, training.labels), training.subjects)
        return {"age_mean": float(np.mean(ages)), "age_sd": float(np.std(ages))}

    def build(self, settings: BrainAgeSettings, in_channels: int, facts: Facts) -> AgeModel:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        encoder = build_encoder(settings.model, in_channels)
        if is_regression(settings):
            # Of a model that is read from a file, they are among its weights.
            mean, sd = (cast(float, facts.get(name, 0.0)) for name in ("age_mean", "age_sd"))
            if getattr(settings.objective, "target_scaling", None) == "none":
                mean, sd = 0.0, 1.0
            return RegressionModel(encoder, RegressionHead(encoder.embedding_dim), mean, sd)
        head = build_projection_head(settings.model, encoder.embedding_dim)
        return ContrastiveModel(encoder, head, settings.model.readout)

    def objective(self, settings: BrainAgeSettings, facts: Facts) -> nn.Module:
        """The loss of `settings`, whose schedules know the length of the run."""
        return settings.objective.build(settings.training.rounds)

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        views_bvcxyz: torch.Tensor,
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch; `targets_b` are ages in years."""
        subjects, views = views_bvcxyz.shape[:2]
        output_bvd = model(views_bvcxyz.flatten(0, 1)).view(subjects, views, -1)
        loss: torch.Tensor = objective(output_bvd, targets_b, progress)
        noted = cast(dict[str, torch.Tensor], objective.diagnostics)
        return Step(loss, {"neighbours": noted.get("neighbours", torch.tensor(torch.nan))})

    def course(self, settings: BrainAgeSettings, objective: nn.Module, progress: float) -> dict[str, float]:
        """The temperature and the width of the kernel; NaN where the objective has none, such as the kernel `equal`."""
        parts = cast(Any, getattr(objective, "parts", None))
        has_width = parts and hasattr(settings.objective, "width")
        return {
            "temperature": parts.temperature(progress) if parts else np.nan,
            "width": parts.width(progress) if has_width else np.nan,
        }

    def observe(
        self, settings: BrainAgeSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The embedding (B, E) that the probe reads; of a regression also the predicted ages (B,) in years."""
        seen: dict[str, torch.Tensor] = {"embedding": cast(AgeModel, model).embed(volumes_bcxyz)}
        if is_regression(settings):
            seen["predicted"] = model(volumes_bcxyz).squeeze(-1)
        return seen

    def judge(
        self, settings: BrainAgeSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """Fit the probe on the training subjects only, and measure it on the evaluation subjects.

        If the folds of the training scans are known, every penalty of the probe is tried, for `judge_together`.
        """
        probe, kept = None, dict[str, object]()
        predicted, published = evaluation.outputs.get("predicted"), settings.evaluation.reference is not None
        if predicted is None:
            ages = cast(Floats, training.labels)
            probe = fit_age_probe(
                training.embeddings, ages, training.subjects, penalty=judging.penalty, reference=published
            )
            predicted = probe.predict(evaluation.embeddings)
            if judging.folds is not None and not published:
                kept[BY_PENALTY] = predictions_by_penalty(
                    training.embeddings, ages, evaluation.embeddings, training.subjects
                )
                kept[WITHOUT] = errors_without_folds(
                    training, evaluation, judging.folds, _errors, FEWEST_SUBJECTS
                )
        metrics = _measured(predicted, evaluation)
        metrics["median_mae"] = median_baseline(
            cast(Floats, training.labels),
            cast(Floats, evaluation.labels),
            training.subjects,
            evaluation.subjects,
        )["mae"]
        metrics["site_balanced_accuracy"] = of_sites(training, evaluation, judging, reference=published)
        metrics["openbhb_score"] = _openbhb(metrics)
        fitted = None if probe is None else probe.to_json()
        return Outcome(metrics, _as_table(predicted, evaluation.labels), fitted, kept)

    def judge_together(self, cells: Sequence[JudgedCell]) -> list[tuple[dict[str, float], pd.DataFrame]]:
        """The metrics of every cell, and its predictions, with a penalty that the cells of other folds choose.

        See `core.tasks.penalties`. An empty list if they cannot choose for each other.
        """
        made = []
        for cell, place in zip(cells, chosen_for_each(cells), strict=False):
            predicted = by_penalty_of(cell)[place]
            measured = _measured(predicted, cell.truth) | {"penalty": ALPHAS[place]}
            if "site_balanced_accuracy" in cell.metrics:
                measured["openbhb_score"] = _openbhb({**cell.metrics, **measured})
            made.append((measured, _as_table(predicted, cell.truth.labels)))
        return made

    def penalty_of(self, cells: Sequence[JudgedCell]) -> float | None:
        """The penalty that is best in all cells: in each, people are judged whom neither encoder nor probe knows."""
        return ALPHAS[best_place([errors_of(cell) for cell in cells])] if cells else None

    def floor(self, settings: BrainAgeSettings, training: Truth, evaluation: Truth) -> Outcome:
        """The median over the training subjects of their mean age."""
        median = median_age(cast(Floats, training.labels), training.subjects)
        predicted = np.full(len(evaluation.labels), median)
        return Outcome(_measured(predicted, evaluation), _as_table(predicted, evaluation.labels))

    def predictions(
        self, settings: BrainAgeSettings, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """Ages in years: those of the probe, or of the regression itself."""
        given = outputs.get("predicted") if fitted is None else None
        predicted = AgeProbe.from_json(fitted).predict(outputs["embedding"]) if fitted is not None else given
        return pd.DataFrame({"predicted": np.asarray(predicted, dtype=np.float64)})

    def check_fitted(self, fitted: str | None) -> None:
        """See `Task`."""
        if fitted is not None:
            AgeProbe.from_json(fitted)

    def calibrate(self, predictions: pd.DataFrame, source: str) -> str:
        """The age bias and the prediction interval."""
        predicted, ages = (predictions[name].to_numpy(float) for name in ("predicted", "truth"))
        return calibrate(predicted, ages, predictions["subject"].to_numpy(str), source).to_json()

    def check_calibration(self, calibration: str) -> None:
        """See `Task`."""
        Calibration.from_json(calibration)

    def read_truth(self, texts: Sequence[str], facts: Facts) -> Labels:
        """Ages in years.

        Raises:
            UserError: no number, or not the age of a person.
        """
        ages = []
        for text in texts:
            try:
                age = float(text)
            except ValueError:
                age = np.nan
            if not 0 <= age <= OLDEST:
                raise UserError(f"--age must be in years, from 0 to {OLDEST}, got {text}")
            ages.append(age)
        return np.array(ages)

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """With intervals, corrected predictions and gaps, as far as they are known; see `gap_table`."""
        known = None if calibration is None else Calibration.from_json(calibration)
        table = gap_table(known, predictions["predicted"].to_numpy(), cast(Floats | None, truth))
        headings = {
            "predicted": "predicted age",
            "low": f"{100 * LEVEL:.0f} % interval",
            "corrected_prediction": "corrected prediction",
            "gap": "gap",
            "corrected_gap": "corrected gap",
        }
        # A column is empty for all scans, or for none.
        given = [name for name in headings if table[name].notna().all()]
        texts = {name: [f"{value:.1f}" for value in table[name]] for name in given}
        if "low" in given:
            texts["low"] = [
                f"{low:.1f} to {high:.1f}" for low, high in zip(table["low"], table["high"], strict=True)
            ]
        shown = pd.DataFrame({headings[name]: texts[name] for name in given}, index=table.index)
        lacks = (NO_CALIBRATION,) if known is None else known.lacks
        return Prediction(table, shown, _how_to_read(given), lacks)

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """The error, what there is to say of gaps and intervals, and what the OpenBHB challenge scores.

        The challenge takes the site from the internal test, and the error from people of other sites.
        """
        predicted = presented["predicted"].to_numpy(float)
        of_ages = regression_metrics(predicted, cast(Floats, truth.labels), truth.subjects)
        accuracy = internal.get("site_balanced_accuracy", math.nan)
        score = None if math.isnan(accuracy) else openbhb_score(accuracy, of_ages["mae"])
        challenge: dict[str, float | str] = {}
        if score is not None:
            challenge = {
                "internal test: MAE": internal["mae"],
                "internal test: site balanced accuracy": accuracy,
                "OpenBHB score (site balanced accuracy ** 0.3 * MAE)": score,
            }
        return {**of_ages, **challenge, **gap_metrics(presented, truth.subjects)}


def is_regression(settings: BrainAgeSettings) -> bool:
    """Whether the model predicts age itself, without a probe."""
    return settings.objective.name in REGRESSION_LOSSES


def _measured(predicted: Floats, truth: Truth) -> dict[str, float]:
    return regression_metrics(predicted, cast(Floats, truth.labels), truth.subjects)


def _as_table(predicted: Floats, labels: Labels) -> pd.DataFrame:
    return pd.DataFrame({"predicted": predicted, "error": np.abs(predicted - cast(Floats, labels))})


def _openbhb(metrics: Mapping[str, float]) -> float:
    """The challenge takes the MAE on sites that training never saw; here all folds share their sites."""
    accuracy = metrics["site_balanced_accuracy"]
    score = openbhb_score(None if accuracy != accuracy else accuracy, metrics["mae"])
    return np.nan if score is None else score


def errors_by_penalty(by_penalty: Floats, ages: Floats, subjects: Names) -> Floats:
    """The mean absolute error over people (P,) in years of predictions (P, m) for m scans."""
    errors: Floats = np.average(np.abs(by_penalty - ages), axis=1, weights=subject_weights(subjects))
    return errors


def errors_of(cell: JudgedCell) -> Floats:
    """The mean absolute error over the people (P,) of a cell in years with every penalty."""
    return errors_by_penalty(by_penalty_of(cell), cast(Floats, cell.truth.labels), cell.truth.subjects)


def _errors(training: Observed, evaluation: Observed) -> Floats:
    """The errors (P,) in years over people of the evaluation with every penalty of a probe of the training scans."""
    every = predictions_by_penalty(
        training.embeddings, cast(Floats, training.labels), evaluation.embeddings, training.subjects
    )
    return errors_by_penalty(every, cast(Floats, evaluation.labels), evaluation.subjects)


def _how_to_read(shown: Sequence[str]) -> str:
    """Which number of the table of `predict` is for what."""
    said = ["All numbers are in years; accuracy is always that of the predicted age."]
    if "low" in shown:
        said.append("The interval contains the true age of about 9 in 10 people like those of the cohort.")
    if "corrected_prediction" in shown:
        said.append(
            "The corrected prediction (Cole) is without the pull to the middle age, with a larger error."
        )
    if "gap" in shown:
        said.append("The gap is predicted minus true age.")
    if "corrected_gap" in shown:
        said.append(
            "The corrected gap (Beheshti, de Lange) is without the part that is usual at this age: use it to compare "
            "groups, and never for accuracy, because it uses the true age."
        )
    return " ".join(said)
