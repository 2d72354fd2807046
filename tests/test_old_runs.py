"""Runs that earlier versions made are read by this one: report, predict, and a resume with two more trials.

`tests/fixtures/run_0_1` is a run of version 0.1.0 (commit 4092ff5e6866) and its cohort, 40 made-up subjects of 12
voxels a side, as that version left them; Tune's files, TensorBoard's and the models of refits are left out:

    brainsweep sweep cohort --out run --trials 5 --folds 2 --slots 1 --holdout 0.25 --confirm-seeds 1 \
        --set model.width=0.03125 --set model.head.dimension=8 --set training.epochs=3 --set training.batch_size=8
"""

import json
import shutil
from pathlib import Path

import nibabel as nib
import pandas as pd
import pytest
from process_helpers import run, study_of, trials_of
from typer.testing import CliRunner

from core.run_description import RunDescription
from core.volumes.cohort.reader import Cohort
from core.volumes.images.preprocess import Preprocessing
from distributed.commands.app import app

FIXTURES = Path(__file__).parent / "fixtures"
SAID_THEN = {"search winner": 5.37, "published": 5.37, "L1 baseline": 13.11, "training median": 14.01}
"""Held-out MAE in years, as the version that made the run printed it."""


@pytest.fixture(params=["run_0_1"])
def old(request, tmp_path):
    """A copy of an old run and its cohort, neither of which is where it was made."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "study")
    return tmp_path / "study" / "run"


def call(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_the_report_of_an_old_run_says_what_it_said(old):
    said = call("report", old)
    page = (old / "report.html").read_text()
    for method, error in SAID_THEN.items():
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{method}  ")]
        assert f" {error:.2f} " in line
    # The cohort is found beside the run, so its ages are known.
    assert "incomplete" not in page
    ages = Cohort.open(old.parent / "cohort").manifest["age"]
    assert f"Ages run from {ages.min():.0f} to {ages.max():.0f} years" in page


def test_an_old_run_predicts_what_it_predicted_of_its_held_out_subjects(old, tmp_path):
    cohort = Cohort.open(old.parent / "cohort")
    then = pd.read_csv(old / "predictions.csv", dtype={"subject": str})
    then = then[then["method"] == "search winner"].set_index("subject")["predicted"]
    rows = cohort.manifest.index[cohort.manifest["subject"].isin(then.index[:3])]
    # Where the grid lies that `predict` brings the scans of a synthetic cohort to.
    grid = Preprocessing(spacing=8.0, shape=(12, 12, 12), intensity="raw", centre="world").affine
    files = []
    for row in rows:
        files.append(tmp_path / f"{cohort.manifest.loc[row, 'subject']}.nii.gz")
        nib.save(nib.Nifti1Image(cohort.read([row])[0, 0], grid), files[-1])
    evaluated = call("evaluate", old, old.parent / "cohort")
    assert f"{len(then)} held-out subjects" in evaluated
    nothing_kept = "this run has kept no out-of-fold predictions"
    assert nothing_kept in " ".join(evaluated.split())
    assert "mean gap (years)" in evaluated
    assert not any(words in evaluated for words in ("corrected gap", "90 % interval"))
    table = pd.read_csv(next((old / "evaluations").glob("*.csv")), dtype={"subject": str})
    assert table.set_index("subject")["predicted"].to_dict() == pytest.approx(then.to_dict(), abs=1e-3)
    said = call("predict", old, *files, "--out", tmp_path / "ages.csv")
    assert nothing_kept in said
    assert "corrected prediction" not in said
    found = pd.read_csv(tmp_path / "ages.csv")
    assert found[["low", "high", "corrected_prediction", "corrected_gap"]].isna().all(axis=None)
    assert found["trained_on"].eq("no").all()
    assert found["note"].str.endswith(", who was held out").all()
    ages = found["predicted"].tolist()
    assert ages == pytest.approx(then[cohort.manifest.loc[rows, "subject"]].tolist(), abs=0.05)


def test_fields_of_run_json_that_this_version_does_not_know_are_kept(old):
    path = old / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_the_future": {"a": 1}}))
    about = RunDescription.model_validate_json(path.read_bytes())
    again = json.loads(about.model_dump_json())
    assert again["of_the_future"] == {"a": 1}
    recorded = json.loads(path.read_text())
    cohort = recorded.pop("cohort")
    assert {name: again[name] for name in recorded} == recorded
    # A field that this version has added has its default.
    assert {name: again["cohort"][name] for name in cohort} == cohort


@pytest.mark.slow
def test_an_old_run_goes_on_with_two_more_trials(old):
    begun = RunDescription.model_validate_json((old / "run.json").read_bytes())
    before = {trial.number: (trial.state, trial.values, trial.params) for trial in trials_of(old)}
    done = run("resume", old, "--trials", "7", "--change-search", cwd=old.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    after = study_of(old).get_trials()
    assert len(before) == 5
    assert {trial.number: (trial.state, trial.values, trial.params) for trial in after[:5]} == before
    assert [trial.number for trial in after[5:]] == [5, 6]
    assert all(trial.state.is_finished() for trial in after)
    about = RunDescription.model_validate_json((old / "run.json").read_bytes())
    assert about.finished > begun.finished
    assert [change.what for change in about.changes] == [("5 trials become 7",)]
    assert "5 trials become 7" in (old / "report.html").read_text()
