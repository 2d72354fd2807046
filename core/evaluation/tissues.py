"""Age from tissue volumes (system B): label maps -> mL -> a few coefficients. N subjects, K tissues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import BayesianRidge, LinearRegression, RidgeCV
from sklearn.metrics import (
    explained_variance_score,
    mean_squared_error,
    mean_squared_log_error,
    median_absolute_error,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.probes import ALPHAS
from core.evaluation.regression import regression_metrics
from core.lookup import look_up

TISSUES: Mapping[str, int] = {"csf": 1, "gm": 2, "wm": 3}

RegressorKind = Literal["linear", "ridge", "bayesian_ridge"]
REGRESSORS: Mapping[str, LinearRegression | RidgeCV | BayesianRidge] = {
    "linear": LinearRegression(),
    "ridge": RidgeCV(alphas=ALPHAS),
    "bayesian_ridge": BayesianRidge(),
}


def tissue_volumes(
    labels_xyz: npt.NDArray[np.generic], affine: Floats, tissues: Mapping[str, int] = TISSUES
) -> dict[str, float]:
    """Volume of each tissue in mL.

    Args:
        labels_xyz: label map (X, Y, Z), whole numbers.
        affine: 4x4, voxel index to mm; axes may be oblique.
        tissues: label of each tissue.
    """
    if labels_xyz.ndim != 3 or not np.array_equal(labels_xyz, np.round(labels_xyz)):
        raise UserError(
            f"a label map must be 3D whole numbers, got {labels_xyz.dtype} of shape {labels_xyz.shape}; "
            "was it resampled with interpolation?"
        )
    return {name: int((labels_xyz == label).sum()) * voxel_volume(affine) for name, label in tissues.items()}


def voxel_volume(affine: Floats) -> float:
    """mL of one voxel, from the determinant of its 4x4 affine in mm."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def relative_volumes(volumes_nk: Floats) -> Floats:
    """Volumes (N, K) in mL -> shares of their sum (N, K), the published features of system B."""
    total_n: Floats = volumes_nk.sum(axis=1, keepdims=True)
    if not (total_n > 0).all():
        raise UserError(f"row {int(np.argmin(total_n))} has no tissue at all; is its label map empty?")
    return volumes_nk / total_n


def age_regressor(kind: RegressorKind = "linear", degree: int = 1) -> Pipeline:
    """Regression of age on polynomials of the features, unfitted; published: "linear" of degree 3.

    Shares sum to one, so that the published 20 cubic monomials of three shares span 10 dimensions only and
    their least-squares problem is singular. Here the features are first turned into uncorrelated ones of unit
    variance, the empty direction dropped, and the monomials of those standardised: the same space of
    functions, hence the same least-squares predictions, from 9 well-scaled columns and the intercept.
    The penalties of "ridge" and "bayesian_ridge" act on those columns.
    """
    if not 1 <= degree <= 4:
        raise UserError(f"degree {degree} must be from 1 to 4")
    return Pipeline(
        [
            ("decorrelate", PCA(n_components=1 - 1e-9, svd_solver="full", whiten=True)),
            ("monomials", PolynomialFeatures(degree, include_bias=False)),
            ("scale", StandardScaler()),
            ("regression", clone(look_up(REGRESSORS, kind, "regressor"))),
        ]
    )


def regressor_metrics(predicted_n: Floats, ages_n: Floats) -> dict[str, float]:
    """The six metrics of system B: mae, r2, mse, msle, median_ae, explained_variance.

    The logarithmic error is NaN where a predicted age is negative; R² and explained variance where all ages
    are equal.
    """
    common = regression_metrics(predicted_n, ages_n)
    undefined = float("nan")
    explained = undefined if np.isnan(common["r2"]) else float(explained_variance_score(ages_n, predicted_n))
    logarithmic = undefined if np.min(predicted_n) < 0 else float(mean_squared_log_error(ages_n, predicted_n))
    return {
        "mae": common["mae"],
        "r2": common["r2"],
        "mse": float(mean_squared_error(ages_n, predicted_n)),
        "msle": logarithmic,
        "median_ae": float(median_absolute_error(ages_n, predicted_n)),
        "explained_variance": explained,
    }


def cross_validate(
    regressor: Pipeline, features_nk: Floats, ages_n: Floats, folds: Sequence[npt.NDArray[np.int64]]
) -> tuple[Floats, list[dict[str, float]]]:
    """Out-of-fold predictions (N,), NaN for subjects in no fold, and `regressor_metrics` of each fold.

    Args:
        regressor: unfitted, cloned for each fold.
        features_nk: (N, K).
        ages_n: (N,) in years.
        folds: validation rows of each fold, disjoint; training is on the rows of the other folds, so rows in
            no fold (the hold-out) are never used.
    """
    predicted_n = np.full(len(ages_n), np.nan)
    metrics = []
    for fold, validation in enumerate(folds):
        training = np.concatenate([rows for other, rows in enumerate(folds) if other != fold])
        fitted = clone(regressor).fit(features_nk[training], ages_n[training])
        predicted_n[validation] = fitted.predict(features_nk[validation])
        metrics.append(regressor_metrics(predicted_n[validation], ages_n[validation]))
    return predicted_n, metrics
