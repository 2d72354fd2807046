from __future__ import annotations

import json

import numpy as np
import pytest
from of_age import judge_together, judged_cell
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut

from core.errors import UserError
from core.evaluation.probes import (
    ALPHAS,
    REFERENCE_ALPHAS,
    AgeProbe,
    errors_without_each_subject,
    fit_age_probe,
    predictions_by_penalty,
    standardisation,
)
from core.tasks.brain_age import errors_of
from core.tasks.penalties import best_place
from core.tasks.task import JudgedCell


def unit_rows(subjects: int, features: int, seed: int = 0) -> np.ndarray:
    embeddings = np.random.default_rng(seed).normal(size=(subjects, features)).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def ages_of(embeddings: np.ndarray, noise: float = 2.0, seed: int = 1) -> np.ndarray:
    noise_n = np.random.default_rng(seed).normal(scale=noise, size=len(embeddings))
    return 50 + 100 * embeddings[:, 0].astype(np.float64) - 60 * embeddings[:, 1] + noise_n


def leave_one_out_error(embeddings: np.ndarray, ages: np.ndarray, alpha: float) -> float:
    """Mean absolute error of the slow way: N fits, each without one subject."""
    errors = []
    for left_out in range(len(ages)):
        rest = np.arange(len(ages)) != left_out
        ridge = Ridge(alpha=alpha).fit(embeddings[rest], ages[rest])
        errors.append(abs(ridge.predict(embeddings[[left_out]])[0] - ages[left_out]))
    return float(np.mean(errors))


@pytest.mark.parametrize("features", [10, 60])  # fewer and more than subjects
def test_the_penalty_is_the_best_of_leaving_each_subject_out(features: int) -> None:
    embeddings = unit_rows(24, features)
    ages = ages_of(embeddings, noise=8.0)
    alphas = (0.01, 1.0, 10.0, 100.0, 1e4)
    standard = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0)
    errors = [leave_one_out_error(standard.astype(np.float64), ages, alpha) for alpha in alphas]
    probe = fit_age_probe(embeddings, ages, alphas=alphas)
    assert probe.alpha == alphas[int(np.argmin(errors))]
    expected = Ridge(alpha=probe.alpha).fit(standard.astype(np.float64), ages).predict(standard)
    np.testing.assert_allclose(probe.predict(embeddings), expected, rtol=1e-5)


def test_unit_embeddings_that_hold_age_predict_it_for_new_subjects() -> None:
    embeddings = unit_rows(400, 128)
    ages = ages_of(embeddings, noise=0.5)
    probe = fit_age_probe(embeddings[:300], ages[:300])
    error = np.abs(probe.predict(embeddings[300:]) - ages[300:]).mean()
    assert error < 1.0 < 0.2 * np.abs(ages[300:] - np.median(ages[:300])).mean()


def test_embeddings_without_age_are_answered_with_about_the_mean() -> None:
    embeddings = unit_rows(60, 32)
    ages = np.random.default_rng(5).uniform(20, 80, 60)
    predicted = fit_age_probe(embeddings, ages).predict(unit_rows(200, 32, seed=9))
    assert predicted.std() < 0.25 * ages.std()


def test_the_probe_does_not_change_with_units_or_offsets_of_features() -> None:
    embeddings = unit_rows(40, 8).astype(np.float64)
    ages = ages_of(embeddings)
    scaled = embeddings * np.logspace(-4, 3, 8) + np.arange(8)
    plain, other = fit_age_probe(embeddings, ages), fit_age_probe(scaled, ages)
    assert plain.alpha == other.alpha
    np.testing.assert_allclose(other.predict(scaled), plain.predict(embeddings), rtol=1e-6)


def test_reference_probe_is_the_published_search() -> None:
    embeddings = unit_rows(53, 16).astype(np.float64)
    ages = ages_of(embeddings, noise=5.0)
    folds = np.array_split(np.arange(53), 5)  # in the order of the rows
    scores = []
    for alpha in REFERENCE_ALPHAS:
        of_folds = []
        for fold in folds:
            rest = np.setdiff1d(np.arange(53), fold)
            predicted = Ridge(alpha=alpha).fit(embeddings[rest], ages[rest]).predict(embeddings[fold])
            residual = ((ages[fold] - predicted) ** 2).sum()
            of_folds.append(1 - residual / ((ages[fold] - ages[fold].mean()) ** 2).sum())
        scores.append(np.mean(of_folds))
    probe = fit_age_probe(embeddings, ages, reference=True)
    assert probe.alpha == REFERENCE_ALPHAS[int(np.argmax(scores))]
    expected = Ridge(alpha=probe.alpha).fit(embeddings, ages).predict(embeddings)
    np.testing.assert_allclose(probe.predict(embeddings), expected, rtol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("subjects", [3, 6, 9])
def test_few_subjects_are_enough(subjects: int, reference: bool) -> None:
    embeddings = unit_rows(subjects, 128)
    ages = np.linspace(20, 70, subjects)
    assert np.isfinite(fit_age_probe(embeddings, ages, reference=reference).predict(embeddings)).all()


def test_collapsed_embeddings_predict_the_mean_age_and_not_rounding() -> None:
    rounding = np.random.default_rng(0).integers(-1, 2, size=(30, 16)) * np.float32(2**-24)
    embeddings = np.full((30, 16), 0.25, dtype=np.float32) + rounding
    assert np.ptp(embeddings) > 0
    ages = np.random.default_rng(1).uniform(20, 80, 30)
    np.testing.assert_allclose(fit_age_probe(embeddings, ages).predict(embeddings), ages.mean(), atol=0.01)
    np.testing.assert_array_equal(standardisation(embeddings.astype(np.float64))[1], 1.0)


def test_probe_survives_json_exactly_and_as_plain_numbers() -> None:
    embeddings = unit_rows(20, 6)
    probe = fit_age_probe(embeddings, ages_of(embeddings))
    fields = json.loads(probe.to_json())
    assert len(fields["coefficients"]) == 6
    assert fields["subjects"] == 20
    assert AgeProbe.from_json(probe.to_json()) == probe
    assert fields["alpha"] in ALPHAS


def test_unusable_subjects_are_counted_in_the_message() -> None:
    embeddings = unit_rows(10, 4)
    ages = np.linspace(20, 60, 10)
    embeddings[3, 1] = np.nan
    with pytest.raises(UserError, match="embeddings of 1 of 10 subjects hold NaN"):
        fit_age_probe(embeddings, ages)
    with pytest.raises(UserError, match="ages of 1 of 10 subjects are missing"):
        fit_age_probe(unit_rows(10, 4), np.where(ages == 20, np.nan, ages))
    with pytest.raises(UserError, match="at least 3 training subjects, got 2"):
        fit_age_probe(unit_rows(2, 4), ages[:2])
    with pytest.raises(ValueError, match=r"shape \(n, 4\), got \(2, 5\)"):
        fit_age_probe(unit_rows(10, 4), ages).predict(np.zeros((2, 5)))


def with_sessions(values: np.ndarray, scans: list[int]) -> np.ndarray:
    """Row i of `values` as often as subject i was scanned."""
    return np.repeat(values, scans, axis=0)


@pytest.mark.parametrize("features", [6, 60])
def test_the_error_without_a_subject_is_that_of_a_fit_without_any_of_the_scans(features: int) -> None:
    generator = np.random.default_rng(3)
    scans = [1, 2, 3, 1, 2, 4, 1, 1, 2, 2]
    subjects = with_sessions(np.array([f"s{number}" for number in range(10)]), scans)
    embeddings = with_sessions(generator.normal(size=(10, features)), scans)
    embeddings = embeddings + 0.1 * generator.normal(size=embeddings.shape)
    ages = with_sessions(generator.uniform(20, 80, 10), scans) + generator.uniform(0, 2, len(subjects))
    weights = 1 / with_sessions(np.array(scans, float), scans)
    for alpha in (0.1, 10.0, 1e4):
        errors = np.zeros(len(ages))
        for rest, left_out in LeaveOneGroupOut().split(embeddings, ages, subjects):
            ridge = Ridge(alpha=alpha).fit(embeddings[rest], ages[rest], sample_weight=weights[rest])
            errors[left_out] = abs(ridge.predict(embeddings[left_out]) - ages[left_out])
        (found,) = errors_without_each_subject(embeddings, ages, subjects, [alpha])
        assert found == pytest.approx(np.average(errors, weights=weights), rel=1e-9)


def test_a_second_scan_that_is_the_first_one_again_changes_nothing() -> None:
    embeddings = unit_rows(30, 64).astype(np.float64)
    ages = ages_of(embeddings, noise=8.0)
    subjects = np.array([f"s{number}" for number in range(30)])
    once, twice = (
        fit_age_probe(embeddings, ages, subjects),
        fit_age_probe(*(with_sessions(each, [2] * 30) for each in (embeddings, ages, subjects))),
    )
    assert (twice.alpha, twice.subjects) == (once.alpha, 30)
    np.testing.assert_allclose(twice.predict(embeddings), once.predict(embeddings), rtol=1e-8)
    # Taken for people of their own, the scans would choose almost no penalty: each predicts the other.
    naive = fit_age_probe(*(with_sessions(each, [2] * 30) for each in (embeddings, ages)))
    assert naive.alpha < once.alpha


def test_two_sessions_predict_new_people_no_worse_than_one() -> None:
    errors: dict[str, list[float]] = {"one": [], "two": [], "median": []}
    for seed in range(5):
        generator = np.random.default_rng(seed)
        ages = generator.uniform(20, 80, 260)
        direction = generator.normal(size=64)
        people = 0.5 * np.outer((ages - 50) / 30, direction) + 2 * generator.normal(size=(260, 64))
        subjects = np.array([f"s{number}" for number in range(260)])
        first = people[:60] + 0.1 * generator.normal(size=(60, 64))
        both = with_sessions(people[:60], [2] * 60) + 0.1 * generator.normal(size=(120, 64))
        one = fit_age_probe(first, ages[:60], subjects[:60])
        two = fit_age_probe(both, with_sessions(ages[:60], [2] * 60), with_sessions(subjects[:60], [2] * 60))
        for name, probe in (("one", one), ("two", two)):
            errors[name].append(float(np.abs(probe.predict(people[60:]) - ages[60:]).mean()))
        errors["median"].append(float(np.abs(np.median(ages[:60]) - ages[60:]).mean()))
    assert np.mean(errors["two"]) < 1.05 * np.mean(errors["one"]) < 0.9 * np.mean(errors["median"])


@pytest.mark.parametrize("features", [5, 40])
@pytest.mark.parametrize("scans", [[1] * 24, [1, 2, 3] * 8])
def test_predictions_with_every_penalty_are_those_of_ridge_fitted_one_by_one(
    features: int, scans: list[int]
) -> None:
    embeddings = with_sessions(unit_rows(24, features), scans)
    embeddings = embeddings + np.random.default_rng(3).normal(0, 0.02, embeddings.shape)
    ages, unseen = with_sessions(ages_of(unit_rows(24, features)), scans), unit_rows(7, features, seed=9)
    subjects = np.repeat(np.arange(24), scans).astype(str)
    predicted = predictions_by_penalty(embeddings, ages, unseen, subjects)
    for alpha, found in zip(ALPHAS, predicted, strict=True):
        mean, scale = embeddings.mean(axis=0), embeddings.std(axis=0)
        weights = np.repeat(1 / np.array(scans), scans)
        ridge = Ridge(alpha=alpha).fit((embeddings - mean) / scale, ages, sample_weight=weights)
        np.testing.assert_allclose(found, ridge.predict((unseen - mean) / scale), rtol=1e-5)
        probe = fit_age_probe(embeddings, ages, subjects, penalty=alpha)
        assert probe.alpha == alpha
        np.testing.assert_allclose(found, probe.predict(unseen), rtol=1e-5)


def judged(fold: int, seed: int, folds: int = 3, people: int = 6) -> JudgedCell:
    draws = np.random.default_rng([fold, seed])
    subjects = np.repeat([f"{fold}-{index}" for index in range(people)], 2)
    predicted = draws.normal(50, 10, (len(ALPHAS), 2 * people))
    without = {other: draws.uniform(5, 20, len(ALPHAS)) for other in range(folds) if other != fold}
    return judged_cell(fold, predicted, draws.uniform(20, 80, 2 * people), subjects, without)


def test_every_cell_has_the_penalty_that_is_best_in_the_cells_of_other_folds() -> None:
    """Two seeds of three folds, by nested loops: the other seed of the same fold has the same people."""
    cells = [judged(fold, seed) for seed in range(2) for fold in range(3)]
    for cell, (metrics, predicted) in zip(cells, judge_together(cells), strict=True):
        others = [other for other in cells if other.fold != cell.fold]
        errors = [
            sum(other.kept["without"][cell.fold][place] for other in others) / len(others)
            for place in range(len(ALPHAS))
        ]
        best = errors.index(min(errors))
        assert metrics["penalty"] == ALPHAS[best]
        assert (predicted == cell.kept["by_penalty"][best]).all()
        assert metrics["mae"] == pytest.approx(
            np.abs(predicted - cell.truth.labels).reshape(-1, 2).mean(axis=1).mean()
        )


def test_the_error_of_a_cell_counts_every_person_once() -> None:
    subjects, ages = np.array(["a", "a", "a", "b"]), np.array([20.0, 22.0, 24.0, 60.0])
    cell = judged_cell(0, np.array([[23.0, 25.0, 27.0, 61.0], [20.0, 22.0, 24.0, 80.0]]), ages, subjects, {})
    np.testing.assert_allclose(errors_of(cell), [2.0, 10.0])


def test_cells_that_cannot_choose_for_each_other_choose_nothing() -> None:
    """Of one fold; or of two, where without the people of the one nobody is left for the probe of the other."""
    assert judge_together([judged(0, 0), judged(0, 1)]) == []
    assert judge_together([judged(0, 0, folds=1), judged(1, 0, folds=1)]) == []
    assert best_place([np.arange(28.0), np.arange(28.0)[::-1] * 3]) == len(ALPHAS) - 1
