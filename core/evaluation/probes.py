"""Linear probes of embeddings, tuned inside the subjects they are fitted on. N scans, D features."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, KFold

from core.errors import UserError
from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_weights

# On standardised features: from almost no shrinkage to almost the mean age for every subject, which is
# the right answer to embeddings that hold nothing about age.
ALPHAS: tuple[float, ...] = tuple(float(alpha) for alpha in np.logspace(-3, 6, 28))

# BrainAge_DynLocRep, on embeddings as they are. Unit rows of length 128 have a variance of about 1/128 per
# feature, on which 100 already means "predict the mean" (spec.md A.5).
REFERENCE_ALPHAS: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)


FEWEST_SUBJECTS = 3
"""Of a probe: with two, each would predict the other."""


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
    subjects_n: Names | None = None,
    alphas: Sequence[float] = ALPHAS,
    *,
    penalty: float | None = None,
    reference: bool = False,
) -> AgeProbe:
    """Ridge regression of age on embeddings, its penalty chosen by cross-validation inside these subjects.

    Features are standardised; the penalty is the one with the least mean absolute error when each subject is
    left out in turn, with all scans (exact, in closed form, and the same on every run). A subject counts once,
    with however many scans.

    Args:
        embeddings_nd: embeddings of the training subjects' scans (N, D), of 3 subjects or more.
        ages_n: the ages (N,) at these scans in years.
        subjects_n: whose they are (N,); each of another subject if None.
        alphas: penalties to choose from.
        penalty: the penalty to use, if it was chosen on people that the encoder does not know; see `Task.penalty_of`.
        reference: as published: penalties 0.01 to 100 on the embeddings as they are, by R² over five folds
            taken in the order of the rows (fewer when N is below 10); `alphas` is then not used.

    Raises:
        UserError: too few subjects, or embeddings or ages that are not finite.
    """
    subjects_n = np.arange(len(ages_n)).astype(str) if subjects_n is None else np.asarray(subjects_n, str)
    embeddings_nd, ages_n = _checked(embeddings_nd, ages_n, subjects_n)
    if reference:
        return _fit_reference(embeddings_nd, ages_n)
    mean_d, scale_d = standardisation(embeddings_nd)
    standard_nd, weights_n = (embeddings_nd - mean_d) / scale_d, subject_weights(subjects_n)
    if penalty is not None:
        alpha = penalty
        ridge = Ridge(alpha=alpha).fit(standard_nd, ages_n, sample_weight=weights_n)
    elif weights_n is None:
        ridge = RidgeCV(alphas=tuple(alphas), scoring="neg_mean_absolute_error").fit(standard_nd, ages_n)
        alpha = float(ridge.alpha_)
    else:
        errors = errors_without_each_subject(standard_nd, ages_n, subjects_n, alphas)
        alpha = float(alphas[int(np.argmin(errors))])
        ridge = Ridge(alpha=alpha).fit(standard_nd, ages_n, sample_weight=weights_n)
    coefficients_d = ridge.coef_ / scale_d
    return AgeProbe(
        coefficients=tuple(float(value) for value in coefficients_d),
        intercept=float(ridge.intercept_ - mean_d @ coefficients_d),
        alpha=alpha,
        subjects=len(np.unique(subjects_n)),
    )


def predictions_by_penalty(
    embeddings_nd: Floats,
    ages_n: Floats,
    unseen_md: Floats,
    subjects_n: Names | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> Floats:
    """The ages (P, M) in years that the probe predicts with each of P penalties.

    Args:
        embeddings_nd: embeddings (N, D) that the probe is fitted on, as in `fit_age_probe`.
        ages_n: the ages (N,) at these scans in years.
        unseen_md: embeddings (M, D) to predict from.
        subjects_n: whose the scans are (N,); each of another subject if None.
        alphas: the penalties.
    """
    subjects_n = np.arange(len(ages_n)).astype(str) if subjects_n is None else np.asarray(subjects_n, str)
    embeddings_nd, ages_n = _checked(embeddings_nd, ages_n, subjects_n)
    mean_d, scale_d = standardisation(embeddings_nd)
    weights_n = subject_weights(subjects_n)
    weights_n = np.ones(len(ages_n)) if weights_n is None else weights_n
    total, root_n = weights_n.sum(), np.sqrt(weights_n)
    known_nd, unknown_md = (
        (each - mean_d) / scale_d for each in (embeddings_nd, np.asarray(unseen_md, float))
    )
    centre_d, mean_age = weights_n @ known_nd / total, weights_n @ ages_n / total
    left_nk, spread_k, right_kd = np.linalg.svd(root_n[:, None] * (known_nd - centre_d), full_matrices=False)
    along_k = left_nk.T @ (root_n * (ages_n - mean_age))
    scores_mk = (unknown_md - centre_d) @ right_kd.T
    return np.stack([mean_age + scores_mk @ (spread_k / (spread_k**2 + alpha) * along_k) for alpha in alphas])


def errors_without_each_subject(
    features_nd: Floats, ages_n: Floats, subjects_n: Names, alphas: Sequence[float]
) -> list[float]:
    """For each penalty, the mean absolute error in years when each subject's scans are left out in turn.

    In closed form: what is left of scans g is (I - H_gg)^-1 times their residuals in the fit of all, where H is the
    hat matrix in the space of the weighted rows (Cook and Weisberg 1982, section 2.2.3).
    """
    weights_n = subject_weights(subjects_n)
    weights_n = np.ones(len(ages_n)) if weights_n is None else weights_n
    total, root_n = weights_n.sum(), np.sqrt(weights_n)
    centred_nd = features_nd - weights_n @ features_nd / total
    left_nk, spread_k, _ = np.linalg.svd(root_n[:, None] * centred_nd, full_matrices=False)
    target_n = root_n * (ages_n - weights_n @ ages_n / total)
    rows = [np.flatnonzero(subjects_n == subject) for subject in np.unique(subjects_n)]
    errors = []
    for alpha in alphas:
        kept_nk = left_nk * (spread_k**2 / (spread_k**2 + alpha))
        residual_n = target_n - kept_nk @ (left_nk.T @ target_n)
        error = 0.0
        for of_subject in rows:
            mean_part_gg = np.outer(root_n[of_subject], root_n[of_subject]) / total
            hat_gg = mean_part_gg + kept_nk[of_subject] @ left_nk[of_subject].T
            left_out_g = np.linalg.solve(np.eye(len(of_subject)) - hat_gg, residual_n[of_subject])
            error += float(root_n[of_subject] @ np.abs(left_out_g))
        errors.append(error / total)
    return errors


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


def _checked(embeddings_nd: Floats, ages_n: Floats, subjects_n: Names) -> tuple[Floats, Floats]:
    embeddings_nd = np.asarray(embeddings_nd, dtype=np.float64)
    ages_n = np.asarray(ages_n, dtype=np.float64)
    if embeddings_nd.ndim != 2 or ages_n.shape != embeddings_nd.shape[:1]:
        raise ValueError(
            f"embeddings must have shape (n, d) and ages (n,), got {embeddings_nd.shape} and {ages_n.shape}"
        )
    people = len(np.unique(subjects_n))
    if people < FEWEST_SUBJECTS:
        raise UserError(f"an age probe needs at least {FEWEST_SUBJECTS} training subjects, got {people}")
    unusable = len(np.unique(subjects_n[~np.isfinite(embeddings_nd).all(axis=1)]))
    if unusable:
        raise UserError(
            f"embeddings of {unusable} of {people} subjects hold NaN or infinity; training diverged"
        )
    if not np.isfinite(ages_n).all():
        missing = len(np.unique(subjects_n[~np.isfinite(ages_n)]))
        raise UserError(f"ages of {missing} of {people} subjects are missing")
    return embeddings_nd, ages_n
