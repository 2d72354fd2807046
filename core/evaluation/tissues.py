"""Age from tissue volumes (system B): label maps -> mL -> a few coefficients. N subjects, K tissues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import BayesianRidge, LinearRegression, RidgeCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.probes import ALPHAS
from core.lookup import look_up

RegressorKind = Literal["linear", "ridge", "bayesian_ridge"]
REGRESSORS: Mapping[str, LinearRegression | RidgeCV | BayesianRidge] = {
    "linear": LinearRegression(),
    "ridge": RidgeCV(alphas=ALPHAS),
    "bayesian_ridge": BayesianRidge(),
}


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
