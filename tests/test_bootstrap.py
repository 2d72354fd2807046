from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from core.evaluation.bootstrap import bootstrap_interval


def mean_error(predicted: np.ndarray, ages: np.ndarray) -> float:
    return float(np.abs(predicted - ages).mean())


def test_interval_of_a_mean_is_its_standard_error() -> None:
    sample = np.random.default_rng(0).normal(50, 10, 200)
    interval = bootstrap_interval(lambda values: float(values.mean()), sample)
    half_width = 1.96 * sample.std() / 200**0.5
    assert interval.value == pytest.approx(sample.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half_width, rel=0.1)


def test_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    ages = rng.uniform(20, 80, 60)
    predicted = ages + rng.normal(scale=6, size=60)
    ours = bootstrap_interval(mean_error, predicted, ages, resamples=4000, level=0.9)
    theirs = stats.bootstrap(
        (predicted, ages),
        mean_error,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        confidence_level=0.9,
        rng=0,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_rows_of_one_subject_stay_together() -> None:
    """Four copies of every subject hold no more than one: the interval must not shrink."""
    sample = np.random.default_rng(2).normal(size=50)
    subjects = np.arange(50)
    once = bootstrap_interval(lambda values: float(values.mean()), sample)
    copied = np.tile(sample, 4)
    whole = bootstrap_interval(lambda values: float(values.mean()), copied, subjects=np.tile(subjects, 4))
    apart = bootstrap_interval(lambda values: float(values.mean()), copied)
    assert (whole.low, whole.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_resamples_without_an_answer_are_counted() -> None:
    def share(values: np.ndarray) -> float:
        return float(values.mean()) if (values > 0).any() else float("nan")

    interval = bootstrap_interval(share, np.array([0.0, 0.0, 1.0]), resamples=1000)
    assert interval.undefined / 1000 == pytest.approx((2 / 3) ** 3, abs=0.05)
    assert interval.low > 0


def test_the_same_seed_gives_the_same_interval() -> None:
    sample = np.random.default_rng(3).normal(size=20)
    first, second, other = (
        bootstrap_interval(np.mean, sample, seed=seed, resamples=200) for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


def test_arrays_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[5, 4\] and 5"):
        bootstrap_interval(mean_error, np.zeros(5), np.zeros(4))
    with pytest.raises(ValueError, match=r"got \[5\] and 4"):
        bootstrap_interval(np.mean, np.zeros(5), subjects=np.arange(4))
