"""From scans to ages by tissue volumes, through the commands, against files and numbers that are computed by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from process_helpers import environment, run

from core.inference import load_predictor
from core.volumes.cohort.reader import Cohort

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIDE, SUBJECTS = 24, 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A BIDS tree of heads with a core that shrinks with age, on turned grids, and a run that segments them."""
    folder = tmp_path_factory.mktemp("chain")
    draws = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1) - (SIDE - 1) / 2
    people = []
    for number in range(SUBJECTS):
        name, age = f"sub-{number:02d}", float(draws.uniform(20, 80))
        centre = draws.uniform(-1, 1, 3)
        far = np.linalg.norm(grid - centre, axis=-1)
        classes = np.where(far < 9, 1, 0) + (far < 7.5 - age / 25)
        image = np.where(classes > 0, 100 * classes + draws.normal(0, 8, classes.shape), 0)
        affine = np.array([[0, -4.2, 0, 50], [4.2, 0, 0, -50], [0, 0, 4.0, -48], [0, 0, 0, 1.0]])
        anat = folder / "bids" / name / "anat"
        anat.mkdir(parents=True)
        nib.save(nib.Nifti1Image(image.astype(np.float32)[..., None], affine), anat / f"{name}_T1w.nii.gz")
        if number % 5 != 4:
            nib.save(nib.Nifti1Image(classes.astype(np.int16), affine), anat / f"{name}_dseg.nii.gz")
        people.append({"participant_id": name, "age": age, "site": "AB"[number % 2]})
    pd.DataFrame(people).to_csv(folder / "bids" / "participants.tsv", sep="\t", index=False)
    (folder / "bids" / "dataset_description.json").write_text('{"Name": "heads", "BIDSVersion": "1.9.0"}')
    done = run(
        "ingest", "bids", "cohort", "--channels", "T1w", "--maps", "dseg", "--spacing", "5", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    changes = {
        "data.classes": "[shell=1,core=2]", "data.balanced": "site", "model.name": "dynunet", "model.width": 0.25,
        "optimiser.learning_rate": 0.01, "training.epochs": 12, "training.batch_size": 4,
        "objective.name": "dice_cross_entropy",
    }  # fmt: skip
    options = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    done = run(
        "sweep", "cohort", "--task", "segmentation", "--trials", 1, "--folds", 2, "--slots", 1, "--confirm-seeds", 1,
        "--search-seed", 1, "--out", "tissue", *options, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def dice(one, other, number):
    return 2 * ((one == number) & (other == number)).sum() / ((one == number).sum() + (other == number).sum())


def read(path):
    return np.asarray(nib.load(path).dataobj).squeeze()


def test_the_evaluation_is_what_the_written_maps_give_on_the_scans_own_voxels(place):
    done = run("evaluate", "tissue", "cohort", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "own grids" in " ".join(done.stdout.split())
    (table_file,) = (
        path for path in (place / "tissue" / "evaluations").glob("*.csv") if "out-of-fold" not in path.name
    )
    table = pd.read_csv(table_file).set_index("subject")
    assert (table["grid"] == "own").all()
    scans = [f"bids/{name}/anat/{name}_T1w.nii.gz" for name in table.index]
    made = run("predict", "tissue", *scans, "--out", "maps", cwd=place)
    assert made.returncode == 0, made.stderr
    for name, row in table.iterrows():
        mine = read(place / "maps" / f"{name}_T1w_dseg.nii.gz")
        true = read(place / "bids" / name / "anat" / f"{name}_dseg.nii.gz")
        for number, word in ((1, "shell"), (2, "core")):
            assert row[f"dice_{word}"] == pytest.approx(dice(mine, true, number), abs=1e-6)
            assert row[f"ml_{word}"] == pytest.approx((mine == number).sum() * 4.2 * 4.2 * 4.0 / 1000)
    assert table["dice_shell"].mean() > 0.5


def test_every_person_is_judged_by_models_that_do_not_know_them(place):
    done = run("evaluate", "tissue", "cohort", "--out-of-fold", cwd=place)
    assert done.returncode == 0, done.stderr
    (table_file,) = (place / "tissue" / "evaluations").glob("*-out-of-fold.csv")
    table = pd.read_csv(table_file)
    labelled = [f"sub-{number:02d}" for number in range(SUBJECTS) if number % 5 != 4]
    assert table["subject"].tolist() == labelled
    roles = pd.read_csv(place / "tissue" / "splits.csv").set_index("subject")["role"]
    for fold in (0, 1):
        known = pd.read_csv(place / "tissue" / "confirmed" / "winner" / f"model-{fold}-1" / "trained_on.csv")
        assert not set(known["subject"]) & set(roles.index[roles.isin([f"fold {fold}", "holdout"])])
    cohort = Cohort.open(place / "cohort")
    for role, model in (("fold 0", "model-0-1"), ("fold 1", "model-1-1"), ("holdout", None)):
        folder = place / "tissue" / ("best" if model is None else f"confirmed/winner/{model}")
        predictor = load_predictor(folder)
        for name, row in table.set_index("subject").iterrows():
            if roles[name] == role:
                (number,) = np.flatnonzero(cohort.manifest["subject"] == name)
                said = predictor.predict(cohort.read([number]))
                assert row["share_core"] == pytest.approx(said["share_core"][0], abs=1e-5)
    by_site = done.stdout.split("metric")[1].splitlines()[0].split()
    assert by_site == ["all", "A", "B"]


def test_a_tree_becomes_a_tree_and_one_bad_scan_costs_no_other(place):
    bad = place / "bids" / "sub-99" / "anat"
    bad.mkdir(parents=True)
    (bad / "sub-99_T1w.nii.gz").write_bytes(b"no image")
    done = run(
        "predict",
        "tissue",
        "bids",
        "--out",
        "derivatives",
        "--probabilities",
        "--ensemble",
        "folds",
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    out = place / "derivatives"
    about = json.loads((out / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    table = pd.read_csv(out / "predictions.tsv", sep="\t")
    assert len(table) == SUBJECTS
    assert pd.read_csv(out / "skipped.tsv", sep="\t")["subject"].tolist() == ["sub-99"]
    own = nib.load(place / "bids" / "sub-03" / "anat" / "sub-03_T1w.nii.gz")
    made = nib.load(out / "sub-03" / "anat" / "sub-03_desc-brainsweep_dseg.nii.gz")
    assert made.shape == own.shape
    np.testing.assert_array_equal(made.affine, own.affine)
    several = read(out / "sub-03" / "anat" / "sub-03_desc-brainsweep_probseg.nii.gz")
    # The likeliest class of probabilities is what the map says.
    with_background = np.concatenate([1 - several.sum(-1, keepdims=True), several], axis=-1)
    clear = np.sort(with_background, axis=-1)
    clear = clear[..., -1] - clear[..., -2] > 1e-4
    np.testing.assert_array_equal(with_background.argmax(-1)[clear], read(made.get_filename())[clear])
    names = pd.read_csv(out / "desc-brainsweep_dseg.tsv", sep="\t")
    assert names.to_dict("list") == {"index": [1, 2], "name": ["shell", "core"]}
    refused = run("predict", "tissue", "bids", cwd=place)
    assert (refused.returncode, "--out FOLDER" in refused.stderr) == (2, True)


def test_volumes_are_derived_once_and_ages_follow_from_them(place):
    # What a stop has left, at two moments: a folder without its request, and columns that no index names.
    (place / "cohort" / "derived" / ".volumes-unfinished").mkdir(parents=True)
    (place / "cohort" / "derived" / "volumes").mkdir()
    (place / "cohort" / "derived" / "volumes" / "columns.parquet").write_bytes(b"half")
    done = run("derive", "cohort", "--from", "tissue", "--volumes", cwd=place)
    assert done.returncode == 0, done.stderr
    kept = pd.read_parquet(place / "cohort" / "derived" / "volumes" / "columns.parquet")
    assert not kept["seen"].any()
    np.testing.assert_allclose(kept["shell_share"] + kept["core_share"], 1)
    page = (place / "cohort" / "derived" / "volumes" / "quality.html").read_text()
    assert "models that had not been trained on it" in page
    true = [
        (read(path) == 2).sum() * 4.2 * 4.2 * 4.0 / 1000
        for path in sorted((place / "bids").glob("*/anat/*dseg*"))
    ]
    labelled = np.arange(SUBJECTS) % 5 != 4
    assert np.corrcoef(kept["core_ml"][labelled], true)[0, 1] > 0.8
    assert not (place / "cohort" / "derived" / ".volumes-unfinished").exists()
    again = run("derive", "cohort", "--from", "tissue", "--volumes", cwd=place)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    aged = run(
        "sweep", "cohort", "--task", "tissue_age", "--trials", 4, "--folds", 2, "--slots", 1, "--out", "ages",
        "--set", "data.volumes=[shell_ml,core_ml]", cwd=place,
    )  # fmt: skip
    assert aged.returncode == 0, aged.stderr
    recorded = json.loads((place / "ages" / "run.json").read_text())
    assert list(recorded["cohort"]["overlays"]) == ["volumes"]
    assert recorded["leaks"][0]["seen"] == []
    assert "Volumes and age" in (place / "ages" / "report.html").read_text()


def test_on_all_cores_the_volumes_are_the_same(place):
    first = run("derive", "cohort", "--from", "tissue", "--volumes", "--name", "here", cwd=place)
    assert first.returncode == 0, first.stderr
    code = "from distributed.commands import app, using; using.MANY = 1; app.main()"
    second = subprocess.run(
        [sys.executable, "-c", code, "derive", "cohort", "--from", "tissue", "--volumes", "--name", "there"],
        cwd=place, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    one, other = (
        pd.read_parquet(place / "cohort" / "derived" / name / "columns.parquet").to_numpy(float)
        for name in ("here", "there")
    )
    np.testing.assert_allclose(other, one)


def test_two_maps_with_one_name_are_refused_and_so_is_the_folder_of_the_scans(place):
    scan = "bids/sub-00/anat/sub-00_T1w.nii.gz"
    for files, out in (((scan, scan), "twice"), ((scan,), "bids/sub-00/anat")):
        refused = run("predict", "tissue", *files, "--out", out, cwd=place)
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1), refused.stderr
    assert not (place / "twice").exists()


def test_the_page_has_baselines_and_cases(place):
    results = pd.read_csv(place / "tissue" / "holdout.csv").set_index("method")["dice"]
    assert {"atlas", "majority class"} <= set(results.index)
    assert results["search winner"] > results["atlas"] > results["majority class"]
    page = (place / "tissue" / "report.html").read_text()
    assert "The best, the median and the worst case" in page
    assert "kept no pictures" not in page
