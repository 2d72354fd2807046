from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from core.evaluation.regression import (
    AgeBias,
    fit_age_bias,
    median_baseline,
    pearson_r,
    regression_metrics,
)

AGES = np.array([20.0, 30.0, 50.0, 60.0])
PREDICTED = np.array([25.0, 28.0, 50.0, 53.0])  # errors 5, -2, 0, -7


def test_metrics_by_hand() -> None:
    metrics = regression_metrics(PREDICTED, AGES)
    assert metrics["mae"] == pytest.approx(14 / 4)
    assert metrics["rmse"] == pytest.approx((78 / 4) ** 0.5)
    assert metrics["r2"] == pytest.approx(1 - 78 / 1000)  # ages about 40: 400 + 100 + 100 + 400
    # gap on age: (-20*5 + -10*-2 + 10*0 + 20*-7) / 1000
    assert metrics["age_bias"] == pytest.approx(-0.22)


def test_metrics_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 50)
    predicted = 0.6 * ages + 18 + rng.normal(scale=5, size=50)
    metrics = regression_metrics(predicted, ages)
    assert metrics["pearson_r"] == pytest.approx(stats.pearsonr(predicted, ages).statistic)
    line = stats.linregress(ages, predicted - ages)
    bias = fit_age_bias(predicted, ages)
    assert (bias.slope, bias.intercept) == pytest.approx((line.slope, line.intercept))


def test_corrected_gaps_of_the_fitted_subjects_no_longer_follow_age() -> None:
    rng = np.random.default_rng(1)
    ages = rng.uniform(20, 80, 80)
    predicted = 0.5 * ages + 25 + rng.normal(scale=4, size=80)
    bias = fit_age_bias(predicted, ages)
    corrected = bias.correct_gap(predicted, ages)
    assert np.corrcoef(corrected, ages)[0, 1] == pytest.approx(0, abs=1e-12)
    assert corrected.mean() == pytest.approx(0, abs=1e-12)


def test_a_correction_fitted_on_training_subjects_corrects_others_without_having_seen_them() -> None:
    rng = np.random.default_rng(2)
    ages = rng.uniform(20, 80, 600)
    predicted = 0.5 * ages + 25 + rng.normal(scale=4, size=600)
    bias = fit_age_bias(predicted[:400], ages[:400])
    held_out, theirs = predicted[400:], ages[400:]
    assert fit_age_bias(held_out, theirs).slope == pytest.approx(-0.5, abs=0.05)
    assert fit_age_bias(bias.correct_prediction(held_out), theirs).slope == pytest.approx(0, abs=0.08)
    gap = bias.correct_gap(held_out, theirs)
    assert stats.linregress(theirs, gap).slope == pytest.approx(0, abs=0.05)
    # one subject at a time: nothing of the held-out subjects enters the line
    assert bias.correct_prediction(held_out[:1])[0] == bias.correct_prediction(held_out)[0]
    np.testing.assert_allclose(gap, held_out - (bias.intercept + (1 + bias.slope) * theirs))


def test_corrected_predictions_of_a_pure_line_are_the_ages() -> None:
    predicted = 0.5 * AGES + 25
    np.testing.assert_allclose(fit_age_bias(predicted, AGES).correct_prediction(predicted), AGES)


def test_a_constant_prediction_has_slope_minus_one_and_cannot_be_stretched() -> None:
    bias = fit_age_bias(np.full(4, 40.0), AGES)
    assert bias.slope == pytest.approx(-1)
    assert np.isnan(bias.correct_prediction(np.full(4, 40.0))).all()
    assert np.isnan(AgeBias(-1.0, 40.0).correct_prediction(np.array([40.0]))).all()


def test_median_baseline_uses_training_ages_only() -> None:
    metrics = median_baseline(np.array([10.0, 30.0, 90.0]), AGES)
    assert metrics["mae"] == pytest.approx((10 + 0 + 20 + 30) / 4)
    assert np.isnan(metrics["pearson_r"])


@pytest.mark.parametrize("ages", [[40.0], [40.0, 40.0, 40.0]])
def test_what_equal_ages_cannot_tell_is_nan(ages: list[float]) -> None:
    metrics = regression_metrics(np.array(ages) + 2, np.array(ages))
    assert metrics["mae"] == metrics["rmse"] == 2
    assert np.isnan([metrics["r2"], metrics["pearson_r"], metrics["age_bias"]]).all()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\), \(4,\)"):
        regression_metrics(PREDICTED[:3], AGES)
    with pytest.raises(ValueError, match="n > 0"):
        regression_metrics(np.array([]), np.array([]))
    assert np.isnan(pearson_r(np.ones(4), AGES))
