"""Linear probes of embeddings, tuned inside the subjects they are fitted on. N subjects, D features."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, KFold

from core.errors import UserError
from core.evaluation import Floats

# On standardised features: from almost no shrinkage to almost the mean age for every subject, which is
# the right answer to embeddings that hold nothing about age.
ALPHAS: tuple[float, ...] = tuple(float(alpha) for alpha in np.logspace(-3, 6, 28))

# BrainAge_DynLocRep, on embeddings as they are. Unit rows of length 128 have a variance of about 1/128 per
# feature, on which 100 already means "predict the mean" (spec.md A.5).
REFERENCE_ALPHAS: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class AgeProbe:
    """An affine map from embeddings to age: age = embedding · coefficients + intercept.

    Standardisation is folded into the coefficients, which apply to embeddings as the encoder gives them.
    """

    coefficients: tuple[float, ...]
    """(D,) years per unit of each feature."""
    intercept: float
    """In years."""
    alpha: float
    """The ridge penalty that was chosen."""
    subjects: int
    """How many subjects it was fitted on."""

    def predict(self, embeddings_nd: Floats) -> Floats:
        """Embeddings (N, D) -> ages (N,) in years, float64."""
        embeddings_nd = np.asarray(embeddings_nd, dtype=np.float64)
        if embeddings_nd.ndim != 2 or embeddings_nd.shape[1] != len(self.coefficients):
            raise ValueError(
                f"embeddings must have shape (n, {len(self.coefficients)}), got {embeddings_nd.shape}"
            )
        ages_n: Floats = embeddings_nd @ np.asarray(self.coefficients) + self.intercept
        return ages_n

    def to_json(self) -> str:
        """Plain numbers, which `from_json` reads back exactly."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AgeProbe:
        """The probe that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "coefficients": tuple(fields["coefficients"])})


def fit_age_probe(
    embeddings_nd: Floats,
    ages_n: Floats,
    alphas: Sequence[float] = ALPHAS,
    *,
    reference: bool = False,
) -> AgeProbe:
    """Ridge regression of age on embeddings, its penalty chosen by cross-validation inside these subjects.

    Features are standardised; the penalty is the one with the least mean absolute error when each subject is
    left out in turn (exact, in closed form, and the same on every run).

    Args:
        embeddings_nd: training subjects' embeddings (N, D), N of 3 or more, one row per subject: two rows of
            one subject would let each predict the other.
        ages_n: their ages (N,) in years.
        alphas: penalties to choose from.
        reference: as published: penalties 0.01 to 100 on the embeddings as they are, by R² over five folds
            taken in the order of the rows (fewer when N is below 10); `alphas` is then not used.

    Raises:
        UserError: too few subjects, or embeddings or ages that are not finite.
    """
    embeddings_nd, ages_n = _checked(embeddings_nd, ages_n)
    if reference:
        return _fit_reference(embeddings_nd, ages_n)
    mean_d, scale_d = standardisation(embeddings_nd)
    search = RidgeCV(alphas=tuple(alphas), scoring="neg_mean_absolute_error")
    search.fit((embeddings_nd - mean_d) / scale_d, ages_n)
    coefficients_d = search.coef_ / scale_d
    return AgeProbe(
        coefficients=tuple(float(value) for value in coefficients_d),
        intercept=float(search.intercept_ - mean_d @ coefficients_d),
        alpha=float(search.alpha_),
        subjects=len(ages_n),
    )


def _fit_reference(embeddings_nd: Floats, ages_n: Floats) -> AgeProbe:
    # R² needs two subjects in a fold.
    folds = KFold(min(5, max(2, len(ages_n) // 2)))
    search = GridSearchCV(Ridge(), {"alpha": REFERENCE_ALPHAS}, scoring="r2", cv=folds)
    with warnings.catch_warnings():
        # R² of a fold of one subject, when N = 3.
        warnings.simplefilter("ignore", category=UserWarning)
        search.fit(embeddings_nd, ages_n)
    ridge = search.best_estimator_
    return AgeProbe(
        coefficients=tuple(float(value) for value in ridge.coef_),
        intercept=float(ridge.intercept_),
        alpha=float(ridge.alpha),
        subjects=len(ages_n),
    )


def standardisation(features_nd: Floats) -> tuple[Floats, Floats]:
    """Mean and SD of each feature (D,), (D,); the SD is 1 for features that are constant up to rounding.

    Networks give float32. A collapsed encoder's features differ in their last digits only, and dividing by
    that SD would turn rounding into features.
    """
    mean_d = features_nd.mean(axis=0)
    deviation_d = features_nd.std(axis=0)
    rounding_d = 8 * np.finfo(np.float32).eps * np.abs(features_nd).max(axis=0)
    return mean_d, np.where(deviation_d > rounding_d, deviation_d, 1.0)


def _checked(embeddings_nd: Floats, ages_n: Floats) -> tuple[Floats, Floats]:
    embeddings_nd = np.asarray(embeddings_nd, dtype=np.float64)
    ages_n = np.asarray(ages_n, dtype=np.float64)
    if embeddings_nd.ndim != 2 or ages_n.shape != embeddings_nd.shape[:1]:
        raise ValueError(
            f"embeddings must have shape (n, d) and ages (n,), got {embeddings_nd.shape} and {ages_n.shape}"
        )
    if len(ages_n) < 3:
        raise UserError(f"an age probe needs at least 3 training subjects, got {len(ages_n)}")
    unusable = int((~np.isfinite(embeddings_nd).all(axis=1)).sum())
    if unusable:
        raise UserError(
            f"embeddings of {unusable} of {len(ages_n)} subjects hold NaN or infinity; training diverged"
        )
    if not np.isfinite(ages_n).all():
        raise UserError(f"ages of {int((~np.isfinite(ages_n)).sum())} of {len(ages_n)} subjects are missing")
    return embeddings_nd, ages_n
