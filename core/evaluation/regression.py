"""How well ages are predicted. Everything takes arrays (N,) in years, one entry per subject."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from core.evaluation import Floats


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


def fit_age_bias(predicted_n: Floats, ages_n: Floats) -> AgeBias:
    """Least-squares line of the gap (predicted - age) on age; NaN with fewer than two different ages."""
    ages_n = np.asarray(ages_n, dtype=np.float64)
    gap_n = np.asarray(predicted_n, dtype=np.float64) - ages_n
    centred_n = ages_n - ages_n.mean()
    spread = float(centred_n @ centred_n)
    if spread == 0:
        return AgeBias(float("nan"), float("nan"))
    slope = float(centred_n @ gap_n) / spread
    return AgeBias(slope, float(gap_n.mean() - slope * ages_n.mean()))


def regression_metrics(predicted_n: Floats, ages_n: Floats) -> dict[str, float]:
    """`mae` and `rmse` in years, `r2`, `pearson_r`, and `age_bias` (slope of the gap on age).

    R² and the slope are NaN where all ages are equal, Pearson's r also where all predictions are.
    """
    predicted_n = np.asarray(predicted_n, dtype=np.float64)
    ages_n = np.asarray(ages_n, dtype=np.float64)
    if predicted_n.shape != ages_n.shape or ages_n.ndim != 1 or ages_n.size == 0:
        raise ValueError(f"predictions and ages must be (n,), n > 0; got {predicted_n.shape}, {ages_n.shape}")
    ages_vary = bool(np.ptp(ages_n) > 0)
    return {
        "mae": float(mean_absolute_error(ages_n, predicted_n)),
        "rmse": float(root_mean_squared_error(ages_n, predicted_n)),
        "r2": float(r2_score(ages_n, predicted_n)) if ages_vary else float("nan"),
        "pearson_r": pearson_r(predicted_n, ages_n),
        "age_bias": fit_age_bias(predicted_n, ages_n).slope,
    }


def pearson_r(first_n: Floats, second_n: Floats) -> float:
    """Pearson's correlation; NaN where one of the two is constant."""
    if np.ptp(first_n) == 0 or np.ptp(second_n) == 0:
        return float("nan")
    return float(np.corrcoef(first_n, second_n)[0, 1])


def median_baseline(training_ages_n: Floats, ages_n: Floats) -> dict[str, float]:
    """`regression_metrics` of predicting the training subjects' median age: the score to beat."""
    return regression_metrics(np.full(len(ages_n), np.median(training_ages_n)), ages_n)
