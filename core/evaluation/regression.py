"""How well ages are predicted. Everything takes arrays (N,) in years, one entry per scan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import median_absolute_error

from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_means, subject_weights


@dataclass(frozen=True)
class AgeBias:
    """Straight line through the brain-age gap: gap = intercept + slope · age.

    Predictions shrink towards the mean age, so young brains look old and old ones young: the slope is
    negative, -1 for a constant prediction. Fit it on out-of-fold predictions for training subjects: the gaps
    of subjects that the model was fitted on are too small.
    """

    slope: float
    """Years of gap per year of age."""
    intercept: float
    """In years."""

    def correct_gap(self, predicted_n: Floats, ages_n: Floats) -> Floats:
        """Gap without its expected part: predicted - age - (intercept + slope · age) (Beheshti et al. 2019).

        It uses the true age, so it is for studying gaps, never for accuracy: a constant prediction plus this
        correction would score an MAE of 0.
        """
        return predicted_n - ages_n - (self.intercept + self.slope * ages_n)

    def correct_prediction(self, predicted_n: Floats) -> Floats:
        """(predicted - intercept) / (1 + slope) (Cole et al. 2018), which does not look at the true age.

        NaN where the slope is -1: a constant prediction cannot be stretched.
        """
        stretch = 1.0 + self.slope
        if abs(stretch) < 1e-9:
            return np.full(np.shape(predicted_n), np.nan)
        return (np.asarray(predicted_n) - self.intercept) / stretch


def fit_age_bias(predicted_n: Floats, ages_n: Floats, weights_n: Floats | None = None) -> AgeBias:
    """Least-squares line of the gap (predicted - age) on age; NaN if all ages are equal, or differ by rounding only."""
    ages_n = np.asarray(ages_n, dtype=np.float64)
    gap_n = np.asarray(predicted_n, dtype=np.float64) - ages_n
    mean_age, mean_gap = np.average(ages_n, weights=weights_n), np.average(gap_n, weights=weights_n)
    centred_n = ages_n - mean_age
    weighed_n = centred_n if weights_n is None else weights_n * centred_n
    spread = float(weighed_n @ centred_n)
    # A mean of equal ages differs from them in the last digit.
    if np.ptp(ages_n) <= 1e-9 * np.abs(ages_n).max():
        return AgeBias(float("nan"), float("nan"))
    slope = float(weighed_n @ gap_n) / spread
    return AgeBias(slope, float(mean_gap - slope * mean_age))


def regression_metrics(
    predicted_n: Floats, ages_n: Floats, subjects_n: Names | None = None
) -> dict[str, float]:
    """`mae`, `rmse` and `median_ae` in years, `mse`, `msle`, `r2`, `explained_variance`, `pearson_r`, and `age_bias`.

    `age_bias` is the slope of the gap on age. Every subject counts once, as the mean over the person's scans. R², the
    explained variance and the slope are NaN where all ages are equal, Pearson's r also where all predictions are, and
    the logarithmic error where a predicted age is negative.

    Args:
        predicted_n: ages as predicted from N scans.
        ages_n: the true ages at these scans.
        subjects_n: whose they are (N,); each of another subject if None.
    """
    predicted_n = np.asarray(predicted_n, dtype=np.float64)
    ages_n = np.asarray(ages_n, dtype=np.float64)
    if predicted_n.shape != ages_n.shape or ages_n.ndim != 1 or ages_n.size == 0:
        raise ValueError(f"predictions and ages must be (n,), n > 0; got {predicted_n.shape}, {ages_n.shape}")
    ages_vary = bool(np.ptp(ages_n) > 0)
    weights_n = None if subjects_n is None else subject_weights(subjects_n)
    undefined = float("nan")

    def mean(values_n: Floats) -> float:
        return float(np.average(values_n, weights=weights_n))

    # As scikit-learn defines them (tests/test_regression_metrics.py), whose checks of the arrays take longer than the
    # fit of a small table.
    missed_n = ages_n - predicted_n
    mse = mean(missed_n**2)
    variance = mean((ages_n - mean(ages_n)) ** 2)
    msle = undefined
    if min(predicted_n.min(), ages_n.min()) >= 0:
        msle = mean((np.log1p(ages_n) - np.log1p(predicted_n)) ** 2)
    return {
        "mae": mean(np.abs(missed_n)),
        "rmse": float(np.sqrt(mse)),
        "mse": mse,
        "msle": msle,
        "median_ae": float(
            np.median(np.abs(missed_n))
            if weights_n is None
            else median_absolute_error(ages_n, predicted_n, sample_weight=weights_n)
        ),
        "r2": 1 - mse / variance if ages_vary else undefined,
        "explained_variance": 1 - mean((missed_n - mean(missed_n)) ** 2) / variance
        if ages_vary
        else undefined,
        "pearson_r": pearson_r(predicted_n, ages_n, weights_n),
        "age_bias": fit_age_bias(predicted_n, ages_n, weights_n).slope,
    }


def pearson_r(first_n: Floats, second_n: Floats, weights_n: Floats | None = None) -> float:
    """Pearson's correlation; NaN where one of the two is constant."""
    if np.ptp(first_n) == 0 or np.ptp(second_n) == 0:
        return float("nan")
    if weights_n is None:
        return float(np.corrcoef(first_n, second_n)[0, 1])
    covariance = np.cov(first_n, second_n, aweights=weights_n)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def median_age(ages_n: Floats, subjects_n: Names | None = None) -> float:
    """The median over subjects of their mean age in years: what a model without images predicts for everyone."""
    return float(np.median(ages_n if subjects_n is None else subject_means(ages_n, subjects_n)))


def median_baseline(
    training_ages_n: Floats,
    ages_m: Floats,
    training_subjects_n: Names | None = None,
    subjects_m: Names | None = None,
) -> dict[str, float]:
    """`regression_metrics` of predicting the training subjects' median age: the score to beat."""
    median = median_age(training_ages_n, training_subjects_n)
    return regression_metrics(np.full(len(ages_m), median), ages_m, subjects_m)
