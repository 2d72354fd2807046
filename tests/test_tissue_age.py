"""Age from volumes: against scikit-learn by hand, columns that are wrong, and the commands to a page."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from of_age import assign
from process_helpers import run
from small_cohort import write_small_cohort

from core.config import check_settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.evaluation.tissues import relative_volumes
from core.tasks import find_task
from core.tasks.task import Judging, Observed
from core.tasks.tissue_age import regressor_of, volumes_of
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.run.assignment import read_progress
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner
from search_spaces import published

TASK = find_task("tissue_age")


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("tissue_age"), given))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small", 40)


def manifest_of(cohort):
    draws, ages = np.random.default_rng(0), cohort.manifest["age"].to_numpy(float)
    return cohort.manifest.assign(
        csf_ml=150 + 2.0 * (ages - 20) + draws.normal(0, 10, len(ages)),
        gm_ml=750 - 2.5 * (ages - 20) + draws.normal(0, 10, len(ages)),
        wm_ml=500 + draws.normal(0, 10, len(ages)),
    )


@pytest.mark.parametrize("name", ["linear", "bayesian_ridge", "ridge", "svr", "gradient_boosting"])
def test_a_trial_judges_every_fold_by_a_regressor_of_the_others(cohort, tmp_path, name):
    manifest = manifest_of(cohort)
    splits = make_splits(manifest, folds=2, holdout=0.2)
    subjects = Subjects(InMemory.of(cohort), manifest, splits, ("stiffness",))
    settings = settings_of(**{"regressor.name": name})
    cells = [{"fold": fold, "seed": 0} for fold in range(2)]
    runner, assignment = (
        Runner(subjects),
        assign(tmp_path / "trials" / "0000", settings.model_dump(mode="json"), cells),
    )
    answer = runner(assignment)
    while not answer["done"]:
        answer = runner(assignment)
    shares = relative_volumes(manifest[["csf_ml", "gm_ml", "wm_ml"]].to_numpy(float))
    ages = manifest["age"].to_numpy(float)
    found = read_progress(tmp_path / "trials" / "0000")["cells"]
    for fold, row in enumerate(found):
        training, judged = subjects.rows_of(fold)
        predicted = (
            regressor_of(settings.regressor).fit(shares[training], ages[training]).predict(shares[judged])
        )
        assert row["mae"] == pytest.approx(np.abs(predicted - ages[judged]).mean())
        assert row["mae"] < row["median_mae"]
        assert {"mse", "msle", "median_ae", "explained_variance", "r2"} <= row.keys()


def test_a_person_with_two_scans_counts_once(cohort):
    """A regressor of a person's scan twice is that of the person once."""
    manifest = manifest_of(cohort)
    twice = pd.concat([manifest, manifest.iloc[:10]], ignore_index=True)
    outcomes = []
    for table in (manifest, twice):
        settings = settings_of()
        features, labels = TASK.features(settings, table), TASK.labels(settings, table)
        people = table["subject"].to_numpy(str)
        seen = Observed(labels, np.full(len(table), ""), people, features)
        outcomes.append(TASK.judge(settings, seen, seen, Judging(sites=False)).metrics["mae"])
    assert outcomes[0] == pytest.approx(outcomes[1])


def test_people_without_a_volume_have_no_part(cohort):
    manifest = manifest_of(cohort)
    manifest.loc[manifest.index[3], "gm_ml"] = np.nan
    labels = TASK.labels(settings_of(), manifest)
    assert np.flatnonzero(np.isnan(labels)).tolist() == [3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.drop(columns="gm_ml"), "has no column 'gm_ml'"),
        (lambda table: table.assign(gm_ml="big"), "gm_ml of sub-000 is no number: 'big'"),
        (lambda table: table.assign(wm_ml=-1.0), "wm_ml of sub-000 is below 0"),
    ],
)
def test_columns_that_hold_no_volumes_are_refused(cohort, change, says):
    with pytest.raises(UserError, match=says):
        volumes_of(settings_of(), change(manifest_of(cohort)))


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"training.epochs": 2}, r"training\.epochs must be 1"),
        ({"begin.weights": "x"}, "no network that could start"),
        ({"regressor.degree": 9}, r"regressor\.degree"),
        ({"regressor.name": "svr", "regressor.degree": 2}, "cannot act"),
    ],
)
def test_what_cannot_act_is_refused(chosen, says):
    with pytest.raises(UserError, match=says):
        check_settings(resolve(merge(published("tissue_age"), chosen)))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_from_phantoms_to_a_page_and_a_comparison(tmp_path):
    write_phantom_cohort(tmp_path / "cohort", PhantomSettings(subjects=48, spacing=8))
    done = run(
        "sweep", "cohort", "--task", "tissue_age", "--trials", 4, "--folds", 3, "--slots", 1, "--out", "tissue",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "brainsweep predict" not in done.stdout
    held_out = pd.read_csv(tmp_path / "tissue" / "holdout.csv").groupby("method")["mae"].mean()
    assert held_out["search winner"] < 0.6 * held_out["training median"]
    trained = run("train", "cohort", "--task", "tissue_age", "--out", "one", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    refused = run("predict", "one", "scan.nii.gz", cwd=tmp_path)
    assert refused.returncode == 2
    again = run(
        "sweep", "cohort", "--task", "tissue_age", "--set", "data.relative=false", "--trials", 2, "--folds", 3,
        "--slots", 1, "--splits-from", "tissue", "--out", "absolute", cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    compared = run("compare", "tissue", "absolute", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
