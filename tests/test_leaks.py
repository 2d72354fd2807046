"""Nothing that is fitted may see the subjects on which it is measured: intensity statistics, probe, penalty, model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from of_age import judge, judge_together, judged_cell, observed, predicted_by, probe_of
from sklearn.linear_model import Ridge
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.evaluation.probes import ALPHAS, fit_age_probe
from core.evaluation.splits import Splits
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import published

HELD_OUT = [2, 9, 16, 23]
FIRST_FOLD = [1, 8, 15, 22]
OTHERS = [0, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 17, 18, 19, 20, 21]
SPLITS = Splits(np.array(HELD_OUT), (np.array(FIRST_FOLD), np.array(OTHERS)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def cell_of(cohort, volumes=None, ages=None):
    """The first cell of a trial, after one epoch; `volumes` and `ages` (24,) may replace those of the cohort."""
    held = InMemory.of(cohort)
    held = held if volumes is None else InMemory(volumes, held.scales)
    manifest = cohort.manifest if ages is None else cohort.manifest.assign(age=ages)
    settings = resolve(merge(published("brain_age"), SMALL))
    cell = CellTraining(settings, Subjects(held, manifest, SPLITS, ("stiffness",)), Cell(0, 0), Place())
    cell.run_epoch()
    return cell


def test_no_cell_of_the_search_holds_a_held_out_subject():
    subjects = Subjects(None, pd.DataFrame(), SPLITS, ("stiffness",))
    rows = [[part.tolist() for part in subjects.rows_of(fold)] for fold in (0, 1, HOLDOUT)]
    assert rows == [[OTHERS, FIRST_FOLD], [FIRST_FOLD, OTHERS], [sorted(FIRST_FOLD + OTHERS), HELD_OUT]]


def test_the_intensity_statistics_are_those_of_the_training_voxels(cohort):
    volumes = InMemory.of(cohort).volumes.copy()
    voxels = volumes[OTHERS][volumes[OTHERS] != 0].astype(np.float64)
    (mean,), (sd,) = cell_of(cohort).statistics
    assert (mean, sd) == pytest.approx((voxels.mean(), voxels.std()), rel=1e-9)
    volumes[FIRST_FOLD] *= 3  # what is evaluated may look as it will
    assert cell_of(cohort, volumes=volumes).statistics == ((mean,), (sd,))


def test_a_cell_judges_with_a_probe_of_its_training_subjects(cohort):
    """Nothing of the evaluation subjects, neither ages nor voxels, moves the model or the probe that judges them."""
    cell = cell_of(cohort)
    outcome = cell.judge()
    assert probe_of(outcome).subjects == len(OTHERS)
    ages = cohort.manifest["age"].to_numpy().copy()
    ages[FIRST_FOLD] += 40
    older = cell_of(cohort, ages=ages).judge()
    assert older.fitted == outcome.fitted
    np.testing.assert_array_equal(predicted_by(older), predicted_by(outcome))
    volumes = InMemory.of(cohort).volumes.copy()
    volumes[FIRST_FOLD] *= 3
    brighter = cell_of(cohort, volumes=volumes).judge()
    assert brighter.fitted == outcome.fitted
    assert (predicted_by(brighter) != predicted_by(outcome)).all()


def test_the_probe_and_its_penalty_depend_on_the_training_subjects_alone():
    generator = np.random.default_rng(0)
    noise, clean = generator.normal(size=(20, 6)), generator.normal(size=(80, 6))
    training = observed(
        noise, generator.uniform(20, 80, 20), np.array(["a", "b"] * 10), np.arange(20).astype(str)
    )
    # the evaluation subjects' ages follow from their embeddings without noise, which asks for another penalty
    evaluation = observed(
        clean, 50 + 10 * clean[:, 0], np.array(["a", "b"] * 40), np.arange(20, 100).astype(str)
    )
    alone = fit_age_probe(noise, training.labels)
    together = fit_age_probe(
        np.concatenate([noise, clean]), np.concatenate([training.labels, evaluation.labels])
    )
    assert alone.alpha > 100 * together.alpha
    outcome = judge(training, evaluation)
    assert probe_of(outcome) == alone
    mean, sd = noise.mean(axis=0), noise.std(axis=0)
    ridge = Ridge(alpha=alone.alpha).fit((noise - mean) / sd, training.labels)
    np.testing.assert_allclose(predicted_by(outcome), ridge.predict((clean - mean) / sd), rtol=1e-9)
    median_error = np.abs(evaluation.labels - np.median(training.labels)).mean()
    assert outcome.metrics["median_mae"] == pytest.approx(median_error, rel=1e-12)


def of_scans(embeddings, ages, subjects, scans):
    return observed(embeddings[scans], ages[scans], np.full(len(scans), "a"), subjects[scans])


def judged_in_folds(embeddings, ages, subjects, splits):
    """What a trial makes of frozen embeddings (n, d) for its cells: metrics and predictions by fold."""
    return judge_together(cells_of(embeddings, ages, subjects, splits))


def cells_of(embeddings, ages, subjects, splits):
    cells = []
    for fold, rows in enumerate(splits.folds):
        training, judged = (
            of_scans(embeddings, ages, subjects, scans) for scans in (splits.training(fold), rows)
        )
        outcome = judge(training, judged, folds=splits.fold_of(splits.training(fold)))
        cells.append(
            judged_cell(
                fold, outcome.kept["by_penalty"], judged.labels, judged.subjects, outcome.kept["without"]
            )
        )
    return cells


def frozen(seed, people=18, scans=2, features=12, folds=4):
    """Embeddings in which a little about age is found, of people with two scans each."""
    draws = np.random.default_rng(seed)
    subjects = np.repeat([f"s{index:02}" for index in range(people)], scans)
    ages = np.repeat(draws.uniform(20, 80, people), scans)
    embeddings = draws.normal(size=(len(ages), features))
    embeddings[:, 0] += ages / 20
    of_person = draws.permutation(np.arange(people) % folds)
    of_scan = np.repeat(of_person, scans)
    splits = Splits(np.arange(0), tuple(np.flatnonzero(of_scan == fold) for fold in range(folds)))
    return embeddings, ages, subjects, splits


@pytest.mark.parametrize("seed", range(12))
def test_no_age_of_a_judged_person_has_a_part_in_the_prediction(seed):
    """All of nested cross-validation: with embeddings that do not change, a person's age changes no own prediction."""
    embeddings, ages, subjects, splits = frozen(seed)
    before = judged_in_folds(embeddings, ages, subjects, splits)
    for fold, rows in enumerate(splits.folds):
        changed = ages.copy()
        changed[subjects == subjects[rows[0]]] = 200.0
        after = judged_in_folds(embeddings, changed, subjects, splits)
        assert after[fold][0]["penalty"] == before[fold][0]["penalty"]
        np.testing.assert_array_equal(after[fold][1], before[fold][1])


def test_the_penalty_of_a_fold_is_that_of_nested_cross_validation():
    """By a slow loop over people of other folds, with scikit-learn's Ridge on standardised features."""
    embeddings, ages, subjects, splits = frozen(99, scans=1)
    for fold, (metrics, predicted) in enumerate(judged_in_folds(embeddings, ages, subjects, splits)):
        curves = []
        for inner, rows in enumerate(splits.folds):
            if inner == fold:
                continue
            known = np.setdiff1d(np.arange(len(ages)), np.concatenate([rows, splits.folds[fold]]))
            mean, sd = embeddings[known].mean(axis=0), embeddings[known].std(axis=0)
            curves.append(
                [
                    np.mean(np.abs(ridge.predict((embeddings[rows] - mean) / sd) - ages[rows]))
                    for alpha in ALPHAS
                    for ridge in [Ridge(alpha=alpha).fit((embeddings[known] - mean) / sd, ages[known])]
                ]
            )
        best = ALPHAS[int(np.argmin(np.mean(curves, axis=0)))]
        assert metrics["penalty"] == best
        known = splits.training(fold)
        probe = fit_age_probe(embeddings[known], ages[known], penalty=best)
        np.testing.assert_allclose(predicted, probe.predict(embeddings[splits.folds[fold]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "is_enough"), [((2, 2, 3), False), ((3, 3, 3), True), ((1, 2, 2, 2), True)]
)
def test_cells_choose_for_each_other_from_the_second_on_or_never(sizes, is_enough):
    """Without the folds of two and two a probe has three people, and without any other two it has two: too few."""
    people = sum(sizes)
    draws, ends = np.random.default_rng(0), np.cumsum(sizes)
    splits = Splits(
        np.arange(0), tuple(np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True))
    )
    subjects = np.array([f"s{index}" for index in range(people)])
    cells = cells_of(draws.normal(size=(people, 4)), draws.uniform(20, 80, people), subjects, splits)
    assert [bool(judge_together(cells[: count + 1])) for count in range(1, len(sizes))] == [is_enough] * (
        len(sizes) - 1
    )


def test_the_fold_of_a_row():
    splits = Splits(np.array([0, 4]), (np.array([2, 5]), np.array([1, 6]), np.array([3])))
    assert splits.fold_of(np.array([1, 2, 3, 5, 6])).tolist() == [1, 0, 2, 0, 1]
    assert splits.fold_of(splits.training(1)).tolist() == [0, 2, 0]
