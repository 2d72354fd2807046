from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict

from core.errors import UserError
from core.evaluation.regression import regression_metrics
from core.evaluation.tissues import age_regressor, relative_volumes
from core.volumes.phantom.cohort import phantom_brain, phantom_participants
from core.volumes.phantom.settings import PhantomSettings


def shares_and_ages(subjects: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shares of CSF, GM and WM that change with age along a curve."""
    rng = np.random.default_rng(seed)
    ages = rng.uniform(20, 90, subjects)
    csf = 150 + 0.03 * (ages - 20) ** 2 + rng.normal(scale=15, size=subjects)
    gm = 750 - 2.5 * (ages - 20) + rng.normal(scale=25, size=subjects)
    wm = 480 + rng.normal(scale=25, size=subjects)
    return relative_volumes(np.stack([csf, gm, wm], axis=1)), ages


def test_age_of_phantoms_from_their_own_label_maps() -> None:
    """The whole classical path, its volumes against the known truth and its ages against the median."""
    settings = PhantomSettings(subjects=32, spacing=4.0, ages="uniform")
    brains = [phantom_brain(settings, index) for index in range(32)]
    voxel = 4.0**3 / 1000
    volumes = np.array([[voxel * (brain.tissue == number).sum() for number in (1, 2, 3)] for brain in brains])
    truth = np.array([[brain.volumes_ml[f"{name}_ml"] for name in ("csf", "gm", "wm")] for brain in brains])
    np.testing.assert_allclose(volumes.sum(axis=1), truth.sum(axis=1), rtol=0.02)
    np.testing.assert_allclose(volumes[:, 2], truth[:, 2], rtol=0.04)  # white matter
    # A voxel has one label and thin CSF loses it to grey matter, by a like amount in everybody.
    assert [np.corrcoef(volumes[:, tissue], truth[:, tissue])[0, 1] > 0.95 for tissue in range(3)] == [
        True
    ] * 3
    ages = phantom_participants(settings)["age"].to_numpy()
    predicted = cross_val_predict(age_regressor("linear"), relative_volumes(volumes), ages, cv=KFold(4))
    assert regression_metrics(predicted, ages)["mae"] < 0.6 * np.abs(ages - np.median(ages)).mean()


def test_a_scan_without_tissue_is_refused() -> None:
    with pytest.raises(UserError, match="row 1 has no tissue"):
        relative_volumes(np.array([[1.0, 2, 3], [0, 0, 0]]))


def published_cubic(shares: np.ndarray) -> np.ndarray:
    """The 20 monomials of up to three of three numbers, as published."""
    factors = [three for degree in range(4) for three in combinations_with_replacement(range(3), degree)]
    return np.stack([np.prod(shares[:, list(which)], axis=1) for which in factors], axis=1)


def test_cubic_predictions_are_those_of_the_published_twenty_monomials() -> None:
    shares, ages = shares_and_ages()
    monomials = published_cubic(shares)
    assert monomials.shape[1] == 20
    coefficients = np.linalg.lstsq(monomials[:60], ages[:60], rcond=1e-12)[0]
    regressor = age_regressor("linear", degree=3).fit(shares[:60], ages[:60])
    assert regressor.named_steps["regression"].rank_ == 9  # and the intercept: rank 10
    np.testing.assert_allclose(regressor.predict(shares[60:]), monomials[60:] @ coefficients, rtol=1e-4)


def test_the_basis_is_well_conditioned() -> None:
    shares, _ = shares_and_ages()
    columns = age_regressor("linear", degree=3)[:-1].fit_transform(shares)
    assert np.linalg.cond(columns) < 100
    assert np.linalg.cond(published_cubic(shares)) > 1e6


def test_absolute_volumes_keep_all_three_directions() -> None:
    volumes = np.random.default_rng(0).normal([200, 700, 500], 40, (50, 3))
    assert age_regressor("linear", degree=1)[:-1].fit_transform(volumes).shape == (50, 3)
    assert age_regressor("linear", degree=3)[:-1].fit_transform(volumes).shape == (50, 19)


@pytest.mark.parametrize("kind", ["linear", "ridge", "bayesian_ridge"])
@pytest.mark.parametrize("degree", [1, 3])
def test_every_regressor_finds_age_in_unseen_subjects(kind: str, degree: int) -> None:
    shares, ages = shares_and_ages(160)
    regressor = age_regressor(kind, degree).fit(shares[:100], ages[:100])
    assert r2_score(ages[100:], regressor.predict(shares[100:])) > 0.7


def test_metrics_by_hand() -> None:
    ages, predicted = np.array([20.0, 30.0, 50.0, 60.0]), np.array([25.0, 28.0, 50.0, 53.0])
    metrics = regression_metrics(predicted, ages)
    by_hand = {
        "mae": 14 / 4,
        "r2": 1 - 78 / 1000,
        "mse": 78 / 4,
        "msle": np.mean((np.log1p(predicted) - np.log1p(ages)) ** 2),
        "median_ae": 3.5,
        "explained_variance": 1 - (78 / 4 - 1) / 250,  # errors have a mean of -1
    }
    assert {name: metrics[name] for name in by_hand} == pytest.approx(by_hand)
    assert np.isnan(regression_metrics(predicted - 40, ages)["msle"])
    assert np.isnan(regression_metrics(predicted, np.full(4, 40.0))["explained_variance"])
    # A person with two scans counts once.
    people = np.array(["a", "b", "b", "c"])
    weights = np.array([1, 0.5, 0.5, 1])
    again = regression_metrics(predicted, ages, people)
    assert again["mse"] == pytest.approx(np.average((predicted - ages) ** 2, weights=weights))


def test_unknown_choices_are_answered() -> None:
    with pytest.raises(UserError, match=r"unknown regressor 'rigde'; did you mean 'ridge'\?"):
        age_regressor("rigde")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="degree 5 must be from 1 to 4"):
        age_regressor(degree=5)
