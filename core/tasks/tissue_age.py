"""Age from volumes of tissues by regression, without a network (system B): a few coefficients, its published lesson.

The volumes are columns of the cohort in mL: those of phantoms, or of any tool, from the participants' table.

Shape suffixes: N scans, K tissues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.by_subject import subject_weights
from core.evaluation.regression import median_baseline, regression_metrics
from core.evaluation.tissues import age_regressor, relative_volumes
from core.lookup import did_you_mean
from core.run_settings import DataSettings, Frozen, RunSettings
from core.task_description import BRAIN_AGE
from core.tasks.brain_age import BrainAge
from core.tasks.task import Facts, Judging, Labels, Observed, Outcome, Prediction, Step, Task, Truth, of_sites

NO_NETWORK = (
    "tissue_age has no network, and a scan alone has no volumes: it is judged on the held-out people of its run, and "
    "predicts nothing for files"
)


class VolumesData(DataSettings):
    """What is taken from the cohort: columns, and no voxels."""

    volumes: tuple[str, ...] = Field(
        ("csf_ml", "gm_ml", "wm_ml"),
        min_length=1,
        description="columns of the cohort with volumes of tissues in mL",
    )
    relative: bool = Field(True, description="shares of their sum, as published, instead of mL")


class _Polynomial(Frozen):
    degree: int = Field(3, ge=1, le=4, description="of the polynomial of the volumes; 3 is published")


class LinearSettings(_Polynomial):
    """Least squares on a polynomial; of degree 3 it is the published choice."""

    name: Literal["linear"] = "linear"


class BayesianRidgeSettings(_Polynomial):
    """Ridge whose penalty is estimated with the coefficients."""

    name: Literal["bayesian_ridge"] = "bayesian_ridge"


class RidgeSettings(_Polynomial):
    """Ridge whose penalty is chosen on the training subjects."""

    name: Literal["ridge"] = "ridge"


class SupportVectorSettings(Frozen):
    """Support vector regression with a Gaussian kernel, on standardised volumes."""

    name: Literal["svr"] = "svr"
    penalty: float = Field(10.0, gt=0, description="C of scikit-learn, in years")
    tube: float = Field(1.0, ge=0, description="epsilon: errors in years that cost nothing")


class BoostingSettings(Frozen):
    """Gradient boosting of trees."""

    name: Literal["gradient_boosting"] = "gradient_boosting"
    trees: int = Field(100, ge=1, le=10_000, description="how many")
    depth: int = Field(3, ge=1, le=16, description="questions from the root to a leaf")
    rate: float = Field(0.1, gt=0, le=1, description="share of a tree that is added")


Regressor = Annotated[
    LinearSettings | BayesianRidgeSettings | RidgeSettings | SupportVectorSettings | BoostingSettings,
    Field(discriminator="name"),
]


class TissueAgeSettings(RunSettings):
    """The settings of age by tissue volumes; the defaults are the published ones."""

    task: str = "tissue_age"
    data: VolumesData = VolumesData()
    regressor: Regressor = LinearSettings()


class TissueAge(Task[TissueAgeSettings]):
    """See the top of this file."""

    about = BRAIN_AGE.model_copy(
        update={
            "name": "tissue_age",
            "rival": None,
            "voxels": None,
            "course": (),
            "objectives": ("mae",),
            "figures": ("predicted", "volumes", "gap"),
            "nothing_found": "age has not been found in volumes",
        }
    )
    settings = TissueAgeSettings

    def check(self, settings: TissueAgeSettings) -> None:
        """Refuse what needs a network."""
        if settings.training.rounds != 1:
            raise UserError(
                f"tissue_age is fitted once: training.epochs must be 1, got {settings.training.rounds}"
            )
        if settings.begin.weights is not None or settings.pretraining is not None:
            raise UserError("tissue_age has no network that could start from weights, or from a first stage")

    def balanced_by(self, settings: TissueAgeSettings) -> str:
        """Folds are alike in age."""
        return "age"

    def labels(self, settings: TissueAgeSettings, manifest: pd.DataFrame) -> Labels:
        """Ages (N,) in years, NaN also where a volume is not known, or all are 0."""
        volumes = volumes_of(settings, manifest)
        ages = manifest["age"].to_numpy(float)
        return np.where(_is_whole(volumes), ages, np.nan)

    def features(self, settings: TissueAgeSettings, manifest: pd.DataFrame) -> Floats:
        """The volumes (N, K) of all scans, or their shares."""
        volumes_nk = volumes_of(settings, manifest)
        if not settings.data.relative:
            return volumes_nk
        shares_nk = np.full(volumes_nk.shape, np.nan)
        known_n = _is_whole(volumes_nk)
        if known_n.any():
            shares_nk[known_n] = relative_volumes(volumes_nk[known_n])
        return shares_nk

    def judge(
        self, settings: TissueAgeSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """Fit the regressor on the training subjects, each of whom counts once, and measure the others."""
        regressor = regressor_of(settings.regressor)
        ages = np.asarray(training.labels, dtype=np.float64)
        regressor.fit(training.embeddings, ages, regression__sample_weight=subject_weights(training.subjects))
        predicted = np.asarray(regressor.predict(evaluation.embeddings), dtype=np.float64)
        truth = np.asarray(evaluation.labels, dtype=np.float64)
        metrics = regression_metrics(predicted, truth, evaluation.subjects)
        metrics["median_mae"] = median_baseline(ages, truth, training.subjects, evaluation.subjects)["mae"]
        # Volumes say as much of sites in every trial, and to find out takes longer than the fit: a refit says it.
        metrics["site_balanced_accuracy"] = (
            of_sites(training, evaluation, judging) if judging.folds is None else math.nan
        )
        table = pd.DataFrame({"predicted": predicted, "error": np.abs(predicted - truth)})
        kind = "share" if settings.data.relative else "mL"
        for place, name in enumerate(settings.data.volumes):
            table[f"volume_{name.removesuffix('_ml')}_{kind}"] = evaluation.embeddings[:, place]
        return Outcome(metrics, table)

    def floor(self, settings: TissueAgeSettings, training: Truth, evaluation: Truth) -> Outcome | None:
        """The training median, as for brain age."""
        return BrainAge().floor(BrainAge.settings(), training, evaluation)

    def build(self, settings: TissueAgeSettings, in_channels: int, facts: Facts) -> nn.Module:
        """There is none."""
        raise UserError(NO_NETWORK)

    def objective(self, settings: TissueAgeSettings, facts: Facts) -> nn.Module:
        """There is none."""
        raise UserError(NO_NETWORK)

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        views_bvcxyz: torch.Tensor,
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """There is none."""
        raise UserError(NO_NETWORK)

    def observe(
        self, settings: TissueAgeSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """There is none."""
        raise UserError(NO_NETWORK)

    def predictions(
        self, settings: TissueAgeSettings, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """There are none."""
        raise UserError(NO_NETWORK)

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """There are none."""
        raise UserError(NO_NETWORK)

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """There are none."""
        raise UserError(NO_NETWORK)


def volumes_of(settings: TissueAgeSettings, manifest: pd.DataFrame) -> Floats:
    """The volumes (N, K) in mL, NaN where unknown.

    Raises:
        UserError: a column is absent, or holds no numbers.
    """
    columns = []
    for name in settings.data.volumes:
        if name not in manifest:
            known = did_you_mean(name, map(str, manifest.columns))
            raise UserError(f"data.volumes: the cohort has no column '{name}'; {known}")
        column = pd.to_numeric(manifest[name], errors="coerce")
        volumes = column.to_numpy(float)
        given = manifest[name].to_numpy(dtype=object)
        wrong = [row for row in np.flatnonzero(np.isnan(volumes)) if not _is_absent(given[row])]
        if wrong:
            whose = manifest["subject"].iloc[wrong[0]]
            raise UserError(f"data.volumes: {name} of {whose} is no number: {given[wrong[0]]!r}")
        negative = np.flatnonzero(volumes < 0)
        if len(negative):
            raise UserError(f"data.volumes: {name} of {manifest['subject'].iloc[negative[0]]} is below 0")
        columns.append(volumes)
    return np.stack(columns, axis=1)


def _is_absent(value: object) -> bool:
    return bool(pd.isna(value)) or value == ""  # type: ignore[call-overload]


def _is_whole(volumes_nk: Floats) -> npt.NDArray[np.bool_]:
    """Which scans (N,) have all volumes, and any tissue: a segmentation may have failed."""
    whole: npt.NDArray[np.bool_] = np.isfinite(volumes_nk).all(axis=1) & (volumes_nk.sum(axis=1) > 0)
    return whole


def regressor_of(settings: Regressor) -> Pipeline:
    """The regressor of these settings, unfitted; its last step is called `regression`."""
    if isinstance(settings, SupportVectorSettings):
        own = SVR(C=settings.penalty, epsilon=settings.tube)
        return Pipeline([("scale", StandardScaler()), ("regression", own)])
    if isinstance(settings, BoostingSettings):
        boosted = HistGradientBoostingRegressor(
            max_iter=settings.trees, max_depth=settings.depth, learning_rate=settings.rate, min_samples_leaf=5,
            early_stopping=False, random_state=0,
        )  # fmt: skip
        return Pipeline([("regression", boosted)])
    return age_regressor(settings.name, settings.degree)
