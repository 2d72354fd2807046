"""People who were scanned more than once: one person counts once, in what is fitted, measured and said."""

import json

import numpy as np
import pandas as pd
import pytest
from small_cohort import SIDE, SMALL
from typer.testing import CliRunner

from core.evaluation.by_subject import subject_means, subject_weights
from core.evaluation.logistic import fit_logistic_probe
from core.evaluation.regression import median_baseline, regression_metrics
from core.evaluation.site import site_balanced_accuracy
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from distributed.commands.app import app

PEOPLE, SESSIONS = 24, 2
GENERATOR_SEED = 5


def call(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Bright balls as in `small_cohort`, every one twice, a year apart; the first person four times."""
    folder = tmp_path_factory.mktemp("sessions") / "cohort"
    generator = np.random.default_rng(GENERATOR_SEED)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid, axis=0) < 0.8
    writer = CohortWriter(
        folder, name="sessions", channels=("stiffness",), shape=(SIDE,) * 3, spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="test", synthetic=True,
    )  # fmt: skip
    with writer:
        for person in range(PEOPLE):
            age = float(generator.uniform(20, 80))
            for session in range(4 if person == 0 else SESSIONS):
                volume = ball * (3 - 0.02 * (age + session) + generator.normal(0, 0.1, ball.shape))
                writer.add(
                    volume[None].astype(np.float32), subject=f"sub-{person:02d}", session=f"ses-{session}",
                    age=age + session, site=f"site-{person % 2}",
                )  # fmt: skip
    return folder


def test_a_subject_weighs_one_and_without_sessions_nothing_is_weighted():
    subjects = np.array(["a", "b", "a", "c", "a"])
    np.testing.assert_allclose(subject_weights(subjects), [1 / 3, 1, 1 / 3, 1, 1 / 3])
    assert subject_weights(np.array(["a", "b", "c"])) is None
    np.testing.assert_allclose(subject_means(np.array([1.0, 5.0, 2.0, 7.0, 3.0]), subjects), [2, 5, 7])
    values = np.array([3.0, 1.0])
    np.testing.assert_array_equal(subject_means(values, np.array(["b", "a"])), values)


def test_metrics_are_means_over_people():
    subjects = np.array(["a", "a", "b", "c"])
    ages = np.array([20.0, 22.0, 40.0, 60.0])
    predicted = np.array([30.0, 26.0, 43.0, 58.0])
    found = regression_metrics(predicted, ages, subjects)
    assert found["mae"] == pytest.approx(((10 + 4) / 2 + 3 + 2) / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(((100 + 16) / 2 + 9 + 4) / 3))
    once = np.repeat(np.arange(4), [3, 3, 6, 6])
    expected = regression_metrics(predicted[once], ages[once])
    assert found == pytest.approx(expected, rel=1e-12)
    median = median_baseline(ages, np.array([50.0]), subjects, np.array(["d"]))
    # Of 21, 40 and 60; over scans it would be 31.
    assert median["mae"] == pytest.approx(10)


def test_the_site_probe_keeps_a_person_in_one_fold_and_counts_the_person_once():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(24, 5))
    sites = np.array(["x", "y"] * 12)
    subjects = np.array([f"s{number}" for number in range(24)])
    twice = np.repeat(np.arange(24), 2)
    noise = 0.01 * generator.normal(size=(48, 5))
    probe = fit_logistic_probe(embeddings[twice] + noise, sites[twice], subjects[twice])
    for rest, left_out in probe.classifier.cv.split(embeddings[twice], sites[twice], subjects[twice]):
        assert not set(subjects[twice][rest]) & set(subjects[twice][left_out])
    test, test_sites = generator.normal(size=(10, 5)), np.array(["x", "y"] * 5)
    people = np.array([f"t{number}" for number in range(10)])
    often = np.repeat(np.arange(10), [5, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    arguments = embeddings, sites, test[often], test_sites[often]
    assert site_balanced_accuracy(*arguments, subjects, people[often]) == site_balanced_accuracy(
        embeddings, sites, test, test_sites, subjects, people
    )


def test_a_cohort_with_sessions_is_trained_on_judged_and_told_by_people(cohort, tmp_path):
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    run = tmp_path / "run"
    call("train", cohort, "--out", run, "--folds", 2, *changes)
    manifest = Cohort.open(cohort).manifest
    roles = pd.read_csv(run / "splits.csv", dtype=str)
    assert len(roles) == len(manifest) == PEOPLE * SESSIONS + 2
    assert (roles.groupby("subject")["role"].nunique() == 1).all()
    cells = pd.read_csv(run / "cells.csv")
    validated = roles[roles["role"] == "fold 0"]["subject"].nunique()
    assert cells["n"].tolist() == [validated]
    said = call("evaluate", run, cohort)
    held_out = roles[roles["role"] == "holdout"]["subject"].nunique()
    assert f"only its {held_out} held-out subjects are judged" in " ".join(said.split())
    words = [line.split() for line in said.splitlines()]
    counts = {line[0]: int(line[1]) for line in words if line and line[0] in ("subjects", "scans")}
    assert counts == {
        "subjects": held_out,
        "scans": int((roles["role"] == "holdout").sum()),
    }
    table = pd.read_csv(next((run / "evaluations").glob("*.csv")), dtype={"subject": str})
    errors = (table["predicted"] - table["age"]).abs().groupby(table["subject"]).mean()
    (mae,) = [line[1] for line in words if line[:1] == ["mae"]]
    assert float(mae) == pytest.approx(errors.mean(), rel=1e-3)

    calibration = json.loads((run / "best" / "calibration.json").read_text())
    kept = pd.read_csv(run / "trials" / "0000" / "predictions-0-0.csv", dtype={"subject": str})
    assert set(kept["subject"]) == set(roles[roles["role"] == "fold 0"]["subject"])
    assert calibration["subjects"] == validated < len(kept)
    by_person = 1 / kept.groupby("subject")["truth"].transform("size")
    gap = kept["predicted"] - kept["truth"]
    slope, intercept = np.polyfit(kept["truth"], gap, 1, w=np.sqrt(by_person))
    assert (calibration["slope"], calibration["intercept"]) == pytest.approx((slope, intercept))
    half_width = calibration["half_width"]
    assert (by_person * (gap.abs() <= half_width)).sum() >= 0.9 * (validated + 1) - 1e-9
    assert (by_person * (gap.abs() < half_width)).sum() < 0.9 * (validated + 1)
    np.testing.assert_allclose(table["high"] - table["predicted"], half_width)
    corrected = table["gap"] - (intercept + slope * table["age"])
    np.testing.assert_allclose(table["corrected_gap"], corrected)
    shares = (table["gap"].abs() <= half_width).groupby(table["subject"]).mean()
    shown = " ".join(said.split())
    assert f"inside the 90 % interval {shares.sum():g} of {held_out} subjects" in shown
    for name, values in (("gap", table["gap"]), ("corrected gap", corrected)):
        mean = values.groupby(table["subject"]).mean().mean()
        # Behind it stand the same of every site.
        assert f" mean {name} (years) {mean:.4g} " in shown
