from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from core.evaluation.bootstrap import studentised_interval


def slow_interval(values: list[float], level: float, seed: int) -> tuple[float, float]:
    """The definition, resample by resample (Efron and Tibshirani 1993, equation 12.22)."""
    n, mean = len(values), sum(values) / len(values)
    draws = np.random.default_rng(seed).integers(0, n, (9_999, n))
    found = []
    for drawn in draws:
        sample = [values[index] for index in drawn]
        centre = sum(sample) / n
        error = math.sqrt(sum((each - centre) ** 2 for each in sample) / (n - 1) / n)
        if abs(centre - mean) < 1e-12:
            found.append(0.0)
        else:
            found.append(math.copysign(math.inf, centre - mean) if error < 1e-12 else (centre - mean) / error)
    found.sort()
    low_rank, high_rank = (math.ceil(share * 9_999) - 1 for share in ((1 - level) / 2, (1 + level) / 2))
    error = math.sqrt(sum((each - mean) ** 2 for each in values) / (n - 1) / n)
    return mean - found[high_rank] * error, mean - found[low_rank] * error


@pytest.mark.parametrize("level", [0.8, 0.95, 1 - 0.05 / 3])
def test_it_is_the_definition(level: float) -> None:
    values = [1.5, -2.0, 4.0, 0.5, 9.0, 3.0, -1.0]
    expected = slow_interval(values, level, seed=4)
    assert studentised_interval(np.array(values), level, seed=4) == pytest.approx(expected, rel=1e-9)


def test_of_many_normal_values_it_is_that_of_student() -> None:
    values = np.random.default_rng(0).normal(50, 10, 300)
    expected = stats.t.interval(0.95, 299, values.mean(), stats.sem(values))
    found = studentised_interval(values)
    assert found == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))


def test_it_follows_skewness() -> None:
    """Far values lie above the mean, so the mean may be far higher and hardly lower."""
    values = np.random.default_rng(1).exponential(size=12)
    low, high = studentised_interval(values)
    assert high - values.mean() > 1.5 * (values.mean() - low)
    mirrored = studentised_interval(-values)
    assert mirrored == pytest.approx((-high, -low), rel=0.02)


@pytest.mark.parametrize("subjects", [6, 10, 26])
def test_two_equal_methods_are_seldom_called_different(subjects: int) -> None:
    """5 % are asked; the percentile interval has 15, 10 and 6 %, and 20, 15 and 9 % where gains are skewed."""
    draws = np.random.default_rng(7)
    for gains in (
        np.abs(draws.normal(size=(300, subjects))) - np.abs(draws.normal(size=(300, subjects))),
        draws.exponential(size=(300, subjects)) - 1,
    ):
        bounds = np.array([studentised_interval(sample) for sample in gains])
        outside = (bounds[:, 0] > 0) | (bounds[:, 1] < 0)
        # Of 300 samples with a rate of 6 %, three standard errors are 4 %.
        assert outside.mean() < 0.1


def test_too_few_and_equal_values() -> None:
    assert all(map(math.isnan, studentised_interval(np.arange(5.0))))
    assert studentised_interval(np.full(8, 3.0)) == (3.0, 3.0)
    first, again, other = (studentised_interval(np.arange(9.0) ** 2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
