"""Age bias and prediction intervals: against lines fitted by NumPy, a slow definition, and simulated people."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from of_age import TASK
from small_cohort import SMALL, write_small_cohort
from typer.testing import CliRunner

from core.evaluation.calibration import (
    FEWEST,
    LEAST_STRETCH,
    LEVEL,
    Calibration,
    calibrate,
    gap_metrics,
    gap_table,
)
from core.evaluation.splits import make_splits
from distributed.commands.app import app
from distributed.run.folder import RunFolder
from distributed.sweeps.tables import calibrate_best


def people(n, seed=0, slope=-0.4, noise=4.0):
    draws = np.random.default_rng(seed)
    ages = draws.uniform(20, 80, n)
    predicted = ages + 22 + slope * ages + draws.normal(0, noise, n)
    return predicted, ages, np.array([f"s{index}" for index in range(n)])


def test_the_corrections_are_those_of_the_papers():
    predicted, ages, subjects = people(60)
    alpha, beta = np.polyfit(ages, predicted, 1)  # Cole et al. 2018: predicted = alpha * age + beta
    slope, intercept = np.polyfit(ages, predicted - ages, 1)  # Beheshti et al. 2019: gap on age
    calibration = calibrate(predicted, ages, subjects)
    others, their_ages, _ = people(30, seed=7)
    table = gap_table(calibration, others, their_ages)
    np.testing.assert_allclose(table["gap"], others - their_ages)
    np.testing.assert_allclose(table["corrected_prediction"], (others - beta) / alpha)
    np.testing.assert_allclose(table["corrected_gap"], others - their_ages - (slope * their_ages + intercept))
    moved = others + (their_ages - (alpha * their_ages + beta))  # de Lange and Cole 2020
    np.testing.assert_allclose(table["corrected_gap"], moved - their_ages, atol=1e-9)


def test_the_corrected_gaps_of_the_people_it_was_fitted_on_do_not_depend_on_age():
    predicted, ages, subjects = people(60)
    table = gap_table(calibrate(predicted, ages, subjects), predicted, ages)
    assert abs(np.corrcoef(table["corrected_gap"], ages)[0, 1]) < 1e-9
    assert abs(np.mean(table["corrected_gap"])) < 1e-9
    assert abs(np.corrcoef(table["gap"], ages)[0, 1]) > 0.5


def slow_half_width(errors, subjects):
    """The smallest error that (n + 1) · 9/10 of n people do not exceed, each person by the share of their scans."""
    names = sorted(set(subjects))
    for error in sorted(errors):
        shares = [
            np.mean([e <= error for e, s in zip(errors, subjects, strict=True) if s == name])
            for name in names
        ]
        if round(10 * sum(shares), 6) >= 9 * (len(names) + 1):
            return error
    return None


@pytest.mark.parametrize(
    ("n", "rank"), [(8, None), (9, 9), (18, 18), (19, 18), (29, 27), (99, 90), (100, 91)]
)
def test_half_of_the_interval_is_the_error_that_nine_of_ten_new_people_do_not_exceed(n, rank):
    predicted, ages, subjects = people(n, seed=n)
    errors = sorted(abs(predicted - ages))
    found = calibrate(predicted, ages, subjects)
    assert found.half_width == (None if rank is None else errors[rank - 1])
    assert found.half_width == slow_half_width(abs(predicted - ages), subjects)
    assert (found.half_width is None) == (n < FEWEST)


@pytest.mark.parametrize("seed", range(5))
def test_scans_and_seeds_of_a_person_share_what_the_person_counts(seed):
    draws = np.random.default_rng(seed)
    subjects = np.array([f"s{draws.integers(14):02d}" for _ in range(50)])
    ages, predicted = draws.uniform(20, 80, 50), draws.uniform(20, 80, 50)
    found = calibrate(predicted, ages, subjects)
    assert found.half_width == slow_half_width(abs(predicted - ages), subjects)
    assert found.subjects == len(set(subjects))


def test_thirds_of_nine_people_are_nine_people():
    predicted, ages, subjects = (np.repeat(values, 3) for values in people(9))
    assert calibrate(predicted, ages, subjects).half_width == max(abs(predicted - ages))


def shares_inside(n, scans, draws=1500):
    """How often a new person's scan is inside; the errors of a person's scans have a part in common."""
    inside = []
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        ages = np.repeat(generator.uniform(20, 80, n + 1), scans)
        common = np.repeat(generator.normal(0, 4, n + 1), scans)
        predicted = ages + common + generator.normal(0, 4, len(ages))
        subjects = np.repeat([f"s{number}" for number in range(n + 1)], scans)
        old, new = slice(0, n * scans), n * scans
        half_width = calibrate(predicted[old], ages[old], subjects[old]).half_width
        inside.append(abs(predicted[new] - ages[new]) <= half_width)
    return float(np.mean(inside))


@pytest.mark.parametrize(("n", "scans"), [(9, 1), (25, 1), (40, 3)])
def test_new_people_are_inside_as_often_as_promised(n, scans):
    share, error = shares_inside(n, scans), math.sqrt(LEVEL * (1 - LEVEL) / 1500)
    assert share > LEVEL - 3 * error
    # Split conformal intervals are too wide by 1 / (n + 1) at most, if all errors differ.
    assert share < LEVEL + 1 / (n + 1) + 3 * error


@pytest.mark.parametrize("age", [30.0, 30.1, 0.1])
def test_people_of_one_age_say_nothing_about_how_gaps_depend_on_age(age):
    """The mean of twelve times 30.1 is not 30.1: the line through this rounding had a slope of 1e14."""
    predicted, _, subjects = people(12)
    calibration = calibrate(predicted, np.full(12, age), subjects)
    assert (math.isnan(calibration.slope), calibration.half_width is None) == (True, False)
    (said,) = calibration.lacks
    assert said.startswith("all people of this run are of one age")
    table = gap_table(calibration, predicted, np.full(12, age))
    assert table[["corrected_gap", "corrected_prediction"]].isna().all().all()
    assert Calibration.from_json(calibration.to_json()).lacks == calibration.lacks


def test_errors_that_are_not_finite_give_no_interval():
    predicted, ages, subjects = people(12)
    predicted[:6] = math.nan
    assert calibrate(predicted, ages, subjects).half_width is None


def test_a_person_counts_once_with_all_scans_and_seeds():
    predicted, ages, subjects = people(20, seed=1)
    once = calibrate(predicted, ages, subjects)
    first = [0] * 30 + list(range(20))
    many = calibrate(predicted[first], ages[first], subjects[first])
    assert (many.subjects, once.subjects) == (20, 20)
    assert (many.slope, many.half_width) == pytest.approx((once.slope, once.half_width))


@pytest.mark.parametrize(("stretch", "stretched"), [(0.05, False), (-0.3, False), (0.3, True)])
def test_a_model_that_hardly_follows_age_has_no_corrected_prediction_and_says_so(stretch, stretched):
    assert (stretch >= LEAST_STRETCH) == stretched
    predicted, ages, subjects = people(40, slope=stretch - 1, noise=0.1)
    calibration = calibrate(predicted, ages, subjects)
    table = gap_table(calibration, predicted, ages)
    assert table["corrected_prediction"].notna().all() == stretched
    assert table["corrected_prediction"].isna().all() != stretched
    assert table["corrected_gap"].notna().all()
    said = (
        f"predictions hardly follow age (by {stretch:.2f} years for each year of age): there is no corrected"
    )
    assert [line.startswith(said) for line in calibration.lacks] == ([] if stretched else [True])


def test_too_few_people_have_no_interval_and_it_is_said():
    predicted, ages, subjects = people(8)
    calibration = calibrate(predicted, ages, subjects)
    table = gap_table(calibration, predicted, ages)
    assert table[["low", "high"]].isna().all(axis=None)
    assert not any("interval" in name for name in gap_metrics(table, subjects))
    assert calibration.lacks == (
        "no interval: it needs out-of-fold predictions of 9 people, and this run has 8",
    )


def test_without_a_calibration_or_ages_the_columns_are_the_same():
    calibration = calibrate(*people(20))
    columns = list(gap_table(calibration, np.array([40.0]), np.array([30.0])))
    assert columns == ["predicted", "low", "high", "corrected_prediction", "age", "gap", "corrected_gap"]
    without_ages = gap_table(calibration, np.array([40.0]))
    assert without_ages.dropna(axis=1).columns.tolist() == columns[:4]
    alone = gap_table(None, np.array([40.0]), np.array([30.0]))
    assert alone.dropna(axis=1).to_dict("records") == [{"predicted": 40.0, "age": 30.0, "gap": 10.0}]
    assert list(without_ages) == list(alone) == columns


def test_people_inside_and_mean_gaps_are_counted_by_person():
    calibration = Calibration(slope=-0.5, intercept=25.0, half_width=6.0, level=LEVEL, subjects=30)
    predicted = np.array([40.0, 50.0, 42.0, 61.0, 62.0, 64.0])
    ages = np.array([45.0, 43.0, 30.0, 60.0, 61.0, 62.0])
    subjects = np.array(["a", "a", "b", "c", "c", "c"])  # of two scans of a, one is inside
    table = gap_table(calibration, predicted, ages)
    found = gap_metrics(table, subjects)
    assert found["inside the 90 % interval"] == "1.5 of 3 subjects"
    assert found["mean gap (years)"] == pytest.approx(((-5 + 7) / 2 + 12 + (1 + 1 + 2) / 3) / 3)
    corrected = predicted - ages - 25 + 0.5 * ages
    assert found["mean corrected gap (years)"] == pytest.approx(
        (corrected[:2].mean() + corrected[2] + corrected[3:].mean()) / 3
    )
    once = [0, 0, 0, 1, 1, 1, *[2] * 6, *[3, 4, 5] * 2]  # six of each person
    for words, gap in (("gap", predicted - ages), ("corrected gap", corrected)):
        expected = np.corrcoef(gap[once], ages[once])[0, 1]
        assert found[f"correlation of {words} with age"] == pytest.approx(expected)


def test_a_calibration_comes_back_exactly_and_is_plain_json():
    one_age = calibrate(np.arange(12.0), np.full(12, 30.0), np.arange(12).astype(str))
    for found in (calibrate(*people(12), source="trial 3, 5 cells"), calibrate(*people(4)), one_age):
        text = found.to_json()
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        back = Calibration.from_json(text)
        assert repr(back) == repr(found)  # NaN is not equal to itself
    assert math.isnan(back.slope)
    assert not back.stretches


def write_cells(trial, predicted, ages, subjects, folds=2):
    trial.mkdir(parents=True)
    for fold, rows in enumerate(np.array_split(np.arange(len(ages)), folds)):
        table = {"subject": subjects[rows], "age": ages[rows], "site": "", "predicted": predicted[rows]}
        pd.DataFrame(table).to_csv(trial / f"predictions-{fold}-0.csv", index=False)


def test_the_file_of_a_run_is_made_of_the_cells_of_the_trial_and_never_of_the_hold_out(tmp_path):
    (tmp_path / "best").mkdir()
    trial = tmp_path / "trials" / "0007"
    predicted, ages, subjects = people(24, seed=5)
    write_cells(trial, predicted, ages, subjects)
    held_out = pd.DataFrame({"subject": ["x"], "age": [10.0], "site": [""], "predicted": [99.0]})
    held_out.to_csv(trial / "predictions-0.csv", index=False)  # what a refit would write
    calibrate_best(RunFolder(tmp_path), TASK, trial, "trial 7")
    made = json.loads((tmp_path / "best" / "calibration.json").read_text())
    expected = calibrate(predicted, ages, subjects, "trial 7, 2 cells")
    assert (made["source"], made["subjects"]) == ("trial 7, 2 cells", 24)
    assert (made["slope"], made["half_width"]) == pytest.approx((expected.slope, expected.half_width))


def test_a_trial_without_predictions_has_no_calibration(tmp_path):
    (tmp_path / "best").mkdir()
    calibrate_best(RunFolder(tmp_path), TASK, Path(tmp_path / "trials" / "0000"), "trial 0")
    assert not (tmp_path / "best" / "calibration.json").exists()


def test_the_ages_and_voxels_of_held_out_people_do_not_matter(tmp_path, monkeypatch):
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    before = write_small_cohort(tmp_path / "cohort")
    splits = make_splits(before.manifest, 2)
    monkeypatch.setattr("distributed.sweeps.train_one.splits_of", lambda *_, **__: splits)
    made = []
    for name in ("before", "after"):
        run = tmp_path / name
        done = CliRunner().invoke(
            app, ["train", str(tmp_path / "cohort"), "--folds", "2", "--out", str(run), *changes]
        )
        assert done.exit_code == 0, done.output
        made.append((run / "best" / "calibration.json").read_text())
        changed = before.manifest.copy()
        changed.loc[splits.holdout, "age"] = 99.0
        place = ["shard", "position", "offset", "checksum"]
        changed.loc[splits.holdout, place] = changed.loc[splits.folds[0][0], place].to_numpy()
        changed.to_parquet(tmp_path / "cohort" / "manifest.parquet")
    assert made[0] == made[1]
    found = json.loads(made[0])
    assert (found["source"], found["subjects"]) == ("fold 0, 1 cell", len(splits.folds[0]))
