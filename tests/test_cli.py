"""The command line as people meet it: help with examples, and one line with exit code 2 for what they can mend."""

import gzip
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from small_cohort import SMALL, write_small_cohort

from core.evaluation.calibration import Calibration
from core.inference import save_calibration
from distributed.commands.app import app
from distributed.commands.cohorts import data
from distributed.commands.using import using

COHORTS = ["phantom", "ingest", "describe", "quality", "verify"]
RUNS = ["train", "sweep", "demo", "resume", "report", "compare", "settings"]
MODELS = ["evaluate", "predict", "explain", "derive"]
COMMANDS = COHORTS + RUNS + MODELS


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small").folder


def bids(folder: Path, age_column="age", damage=None) -> Path:
    """Three subjects with a small T1; `damage(path, voxels)` spoils the second one's file."""
    folder.mkdir()
    rows = [f"participant_id\t{age_column}\tsex"]
    for index in range(3):
        subject = f"sub-{index + 1:02d}"
        rows.append(f"{subject}\t{30 + index}\tF")
        path = folder / subject / "anat" / f"{subject}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        voxels = np.zeros((24, 28, 24), dtype=np.float32)
        voxels[6:18, 6:20, 6:18] = np.random.default_rng(index).uniform(50, 100, (12, 14, 12))
        nibabel.Nifti1Image(voxels, np.diag([8.0, 8.0, 8.0, 1.0])).to_filename(path)
        if damage and index == 1:
            damage(path, voxels)
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


def save(path, voxels):
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(brainsweep, command):
    code, out, _ = brainsweep(command, "--help")
    assert code == 0
    assert f"Example: brainsweep {command}" in " ".join(out.split())


def test_the_commands_are_these_and_no_others():
    assert [command.callback.__name__ for command in data.registered_commands] == COHORTS
    assert [command.callback.__name__ for command in app.registered_commands] == RUNS
    assert [command.callback.__name__ for command in using.registered_commands] == MODELS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["describe", "nowhere"], "nowhere is not a cohort"),
        (["sweep", "COHORT", "--space", "brian_age"], "unknown space 'brian_age'; did you mean 'brain_age'"),
        (
            ["sweep", "COHORT", "--folds", "90"],
            "folds=90 needs at least 90 development subjects, cohort has 19",
        ),
        (["sweep", "COHORT", "--folds", "1"], "--folds: Input should be greater than or equal to 2, got 1"),
        (["sweep", "COHORT", "--holdout", "2"], "--holdout: Input should be less than 1, got 2.0"),
        (
            ["sweep", "COHORT", "--data-mode", "ram"],
            "--data-mode: Input should be 'auto', 'resident', 'streaming' or 'direct', got 'ram'",
        ),
        (["sweep", "COHORT", "--scheduler", "ashaa"], "did you mean 'asha'"),
        (["sweep", "COHORT", "--sampler", "tpee"], "did you mean 'tpe'"),
        (["sweep", "COHORT", "--set", "objective.widht=2"], "did you mean 'objective.width'"),
        (["sweep", "COHORT", "--set", "objective.width=-2"], "width of exponential must be above 0, got -2"),
        (["sweep", "COHORT", "--set", "training.epochs"], "--set 'training.epochs' has no '='"),
        (
            ["train", "COHORT", "--fold", "7", "--out", "OUT"],
            "--fold 7 does not exist; with --folds 5 it is 0 to 4",
        ),
        (
            ["train", "COHORT", "--set", "data.channels=[t1w]", "--out", "OUT"],
            "'t1w', but the cohort has stiffness",
        ),
        (["resume", "nowhere"], "nowhere is not a run: it has no run.json"),
        (["report", "nowhere"], "no run at 'nowhere': there is no such folder"),
        (["predict", "nowhere", "a.nii.gz"], "nowhere is not a run: it has no run.json"),
        (["phantom", "OUT", "--spacing", "3"], "spacing must be 2, 4 or 8 mm, got 3"),
        (
            ["phantom", "OUT", "--channels", "fmri"],
            "--channels: channels must be of stiffness,t1w with kind ageing, got fmri",
        ),
        (
            ["ingest", "COHORT", "OUT", "--shape", "4,b"],
            "--shape must be three whole numbers such as 46,55,46",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(brainsweep, cohort, tmp_path, arguments, said):
    places = {"COHORT": cohort, "OUT": tmp_path / "out"}
    if arguments[0] == "sweep":
        arguments = [*arguments, "--out", "OUT"]
    code, _, err = brainsweep(*[places.get(word, word) for word in arguments])
    assert code == 2
    assert said in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_an_output_folder_that_cannot_be_written_is_named_before_anything_runs(
    brainsweep, cohort, tmp_path, command
):
    (tmp_path / "file").write_text("")
    code, _, err = brainsweep(command, cohort, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert str(tmp_path / "file") in err


def test_a_run_is_never_written_over(brainsweep, cohort, tmp_path):
    (tmp_path / "precious.txt").write_text("thesis")
    code, _, err = brainsweep("train", cohort, "--out", tmp_path)
    assert (code, "is not empty" in err) == (2, True)
    assert (tmp_path / "precious.txt").read_text() == "thesis"


def test_ingest_refuses_an_empty_folder_and_a_missing_age_column(brainsweep, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = brainsweep("ingest", tmp_path / "empty", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'empty'} is of no layout that is known: bids: ")
    study = bids(tmp_path / "study", age_column="years")
    code, _, err = brainsweep("ingest", study, tmp_path / "out", "--age-column", "age")
    assert code == 2
    # with the columns that are there
    assert "participants.tsv has no column 'age', only 'participant_id', 'years', 'sex'" in err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda path, voxels: save(path, np.where(voxels > 90, np.nan, voxels)),
            "has 409 NaN or infinite voxels",
        ),
        (
            lambda path, voxels: save(path, np.stack([voxels] * 3, axis=-1)),
            "is 4D with shape (24, 28, 24, 3)",
        ),
        (
            lambda path, voxels: path.write_bytes(path.read_bytes()[:400]),
            "NIfTI (Compressed file ended before",
        ),
        (
            lambda path, voxels: path.write_bytes(gzip.compress(b"not a brain")),
            "(it does not begin with a NIfTI header",
        ),
        (lambda path, voxels: path.unlink(), "sub-02 has no image sub-02/**/*_T1w.nii"),
    ],
    ids=["nan", "4d", "truncated", "no nifti", "missing"],
)
def test_ingest_leaves_out_what_cannot_be_used_and_names_it(brainsweep, tmp_path, damage, reason):
    source = bids(tmp_path / "study", damage=damage)
    code, out, _ = brainsweep("ingest", source, tmp_path / "out", "--spacing", 8, "--channels", "T1w")
    assert code == 0
    assert out.count("left out sub-") == 1
    (line,) = [line for line in out.splitlines() if line.startswith("left out sub-02: ")]
    assert reason in line
    assert f"2 scans in {tmp_path / 'out'}, 1 left out" in out.splitlines()
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv")
    assert rejects["subject"].tolist() == ["sub-02"]
    assert reason in rejects["reason"].item()
    code, _, err = brainsweep(
        "ingest", source, tmp_path / "strict", "--spacing", 8, "--channels", "T1w", "--strict"
    )
    assert code == 2
    assert err.startswith(f"error: {source}: sub-02: ")
    assert reason in err


def test_from_nifti_files_to_predictions(brainsweep, tmp_path):
    source = tmp_path / "study"
    code, _, _ = brainsweep("phantom", source, "--nifti", "--subjects", 12, "--spacing", 8)
    assert code == 0
    cohort = tmp_path / "cohort"
    code, out, _ = brainsweep(
        "ingest", source, cohort, "--channels", "stiffness", "--intensity", "raw", "--spacing", 8
    )
    assert code == 0
    assert f"12 scans in {cohort}, 0 left out" in out.splitlines()
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    run = tmp_path / "run"
    code, out, _ = brainsweep("train", cohort, "--folds", 2, "--out", run, *small)
    assert code == 0
    ages = pd.read_csv(source / "participants.tsv", sep="\t", index_col="participant_id")["age"]
    role = pd.read_csv(run / "splits.csv", index_col="subject")["role"]
    assert role.value_counts().to_dict() == {"fold 0": 5, "fold 1": 5, "holdout": 2}
    errors_of_median = (ages[role == "fold 0"] - ages[role == "fold 1"].median()).abs()
    cells = pd.read_csv(run / "cells.csv")
    assert cells["median_mae"].item() == pytest.approx(errors_of_median.mean())
    shown = [f"{cells[name].item():.2f}" for name in ("mae", "r2", "site_balanced_accuracy", "median_mae")]
    assert ["0", "0", "5", *shown] in [line.split() for line in out.splitlines()]  # fold, seed, n

    held_out = role.index[role == "holdout"]
    volumes = [next(source.rglob(f"{subject}_stiffness.nii.gz")) for subject in held_out]
    table = tmp_path / "ages.csv"
    code, out, _ = brainsweep("predict", run, *volumes, "--out", table)
    assert code == 0
    from_files = pd.read_csv(table).set_axis(held_out)
    assert from_files["file"].tolist() == list(map(str, volumes))
    code, out, _ = brainsweep("evaluate", run, cohort)
    assert code == 0
    assert "only its 2 held-out subjects are judged" in out
    assert "look 1 of this run" in out
    _, again, _ = brainsweep("evaluate", run, cohort)
    assert "look 2 of this run at its held-out subjects. Whoever chooses" in " ".join(again.split())
    from_cohort = pd.read_csv(next((run / "evaluations").iterdir()), index_col="subject")["predicted"]
    assert sorted(from_cohort.index) == sorted(held_out)
    # the cohort stores voxels with fewer digits than the files
    np.testing.assert_allclose(from_files["predicted"], from_cohort[held_out], atol=0.05)
    assert np.ptp(from_cohort) > 0.5
    (error,) = [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["mae"]]
    assert float(error) == pytest.approx((from_cohort - ages[held_out]).abs().mean(), abs=0.005)

    volume = volumes[0]
    image = nibabel.load(volume)
    save_scaled = tmp_path / "pascal.nii.gz"
    nibabel.Nifti1Image(image.get_fdata() * 1000, image.affine).to_filename(save_scaled)
    code, out, _ = brainsweep("predict", run, volume, save_scaled)
    assert (code, out.count("other units?")) == (0, 1)

    calibration = json.loads((run / "best" / "calibration.json").read_text())
    assert (calibration["subjects"], calibration["source"]) == (5, "fold 0, 1 cell")
    assert "no interval: it needs out-of-fold predictions of 9 people, and this run has 5" in out
    trained, validated = (role.index[role == name][0] for name in ("fold 1", "fold 0"))
    renamed = tmp_path / "anonymous.nii.gz"  # known by its voxels, not by its name
    shutil.copyfile(next(source.rglob(f"{trained}_stiffness.nii.gz")), renamed)
    other = tmp_path / f"{trained}_other.nii.gz"  # known by its name only
    nibabel.Nifti1Image(image.get_fdata() * 1.05, image.affine).to_filename(other)
    scans = [renamed, other, next(source.rglob(f"{validated}_stiffness.nii.gz")), volume]
    with_ages = [word for age in (30, 40, 50, 60) for word in ("--age", age)]
    found = Calibration(slope=-0.25, intercept=10.0, half_width=12.0, level=0.9, subjects=30)
    save_calibration(run / "best", found.to_json())
    code, out, _ = brainsweep("predict", run, *scans, *with_ages, "--out", table)
    assert code == 0
    assert "no interval" not in out
    said = pd.read_csv(table, keep_default_na=False)
    columns = "file predicted low high corrected_prediction age gap corrected_gap trained_on note"
    assert list(said) == columns.split()
    assert said["trained_on"].tolist() == ["yes", "perhaps", "no", "no"]
    too_good = "on whom the model was trained: the prediction is too good, and the interval does not hold"
    assert said["note"].tolist() == [
        f"this is a scan of {trained}, {too_good}",
        f"its name is that of the subject {trained}, {too_good}",
        f"this is a scan of {validated}, who was in the validation fold, not in the training",
        f"this is a scan of {held_out[0]}, who was held out",
    ]
    predicted = said["predicted"]
    np.testing.assert_allclose(said["age"], [30, 40, 50, 60])
    np.testing.assert_allclose(said["low"], predicted - 12)
    np.testing.assert_allclose(said["high"], predicted + 12)
    np.testing.assert_allclose(said["corrected_prediction"], (predicted - 10) / 0.75)
    np.testing.assert_allclose(said["gap"], predicted - said["age"])
    np.testing.assert_allclose(said["corrected_gap"], predicted - said["age"] - 10 + 0.25 * said["age"])
    shown = " ".join(out.split())
    for name in ("90 % interval", "corrected prediction", "gap", "corrected gap", "groups"):
        assert name in shown
    for row in said[["low", "high"]].to_numpy():
        assert f"{row[0]:.1f} to {row[1]:.1f}" in shown

    code, out, _ = brainsweep("predict", run, *scans, "--out", table)
    assert "corrected gap" not in out
    assert list(pd.read_csv(table)) == columns.split()
    for ages, refused in (
        ([30], "4 volumes need as many --truth, got 1"),
        ([30, 40, 50, 1950], "in years"),
    ):
        code, _, error = brainsweep(
            "predict", run, *scans, *[word for age in ages for word in ("--age", age)]
        )
        assert (code, refused in error) == (2, True)
    cohort.rename(tmp_path / "elsewhere")
    code, _, _ = brainsweep("predict", run, renamed, "--out", table)
    assert code == 0
    assert pd.read_csv(table)["trained_on"].item() == "unknown"
    assert "the cohort of the run was not found" in pd.read_csv(table)["note"].item()


def test_a_flipped_byte_is_found_by_verify_and_nothing_else_is(brainsweep, tmp_path):
    source = bids(tmp_path / "study")
    cohort = tmp_path / "out"
    code, _, _ = brainsweep(
        "ingest", source, cohort, "--spacing", 8, "--channels", "T1w", "--format", "parquet"
    )
    assert code == 0
    assert brainsweep("verify", cohort)[0] == 0
    shard = next((cohort / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, out, _ = brainsweep("verify", cohort)
    assert code == 1
    assert shard.name in out


def test_quality_writes_a_page_that_names_every_subject(brainsweep, tmp_path):
    cohort = tmp_path / "out"
    brainsweep("ingest", bids(tmp_path / "study"), cohort, "--spacing", 8, "--channels", "T1w")
    code, out, _ = brainsweep("quality", cohort)
    assert code == 0
    assert "quality.html" in out
    page = (cohort / "quality.html").read_text()
    assert set(re.findall(r"sub-\d+", page)) == {"sub-01", "sub-02", "sub-03"}
