"""System A whole, by the commands that a user types: pre-training on an OpenBHB folder, fine-tuning, the challenge."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from process_helpers import run

from core.evaluation.site import openbhb_score

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]

SMALL = ("--set", "model.width=0.125", "--set", "training.epochs=3", "--set", "training.batch_size=8")
SWEEP = ("--trials", 2, "--folds", 2, "--holdout", 0.4, "--slots", 1, "--scheduler", "none")


def openbhb_folder(folder: Path, name: str, subjects: int, seed: int) -> None:
    """Phantoms as OpenBHB has them: one array of all volumes, from right to left, and ids in another order."""
    made = run(
        "phantom", f"{name}-scans", "--nifti", "--subjects", subjects, "--spacing", 2, "--channels", "t1w",
        "--sites", 2, "--ages", "uniform", "--seed", seed, cwd=folder,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    table = pd.read_csv(folder / f"{name}-scans" / "participants.tsv", sep="\t")
    order = np.random.default_rng(0).permutation(len(table))
    subjects_in_order = table["participant_id"].iloc[order].tolist()
    files = [next((folder / f"{name}-scans" / each).rglob("*_T1w.nii.gz")) for each in subjects_in_order]
    volumes = [nib.load(file).get_fdata()[::-1] for file in files]
    (folder / name / "train").mkdir(parents=True)
    np.save(folder / name / "train" / "quasiraw_2mm.npy", np.stack(volumes).astype(np.float32)[:, np.newaxis])
    np.save(
        folder / name / "train" / "participants_id.npy",
        np.array([int(each[4:]) for each in subjects_in_order]),
    )
    people = table[["participant_id", "age", "sex", "site"]].assign(
        participant_id=[str(int(each[4:])) for each in table["participant_id"]]
    )
    people.to_csv(folder / name / "participants.tsv", sep="\t", index=False)


def figure(printed: str, name: str) -> float:
    found = re.search(rf"{re.escape(name)}\s+([-\d.]+)", printed)
    assert found, printed
    return float(found[1])


def test_from_openbhb_to_the_score_of_the_challenge(tmp_path):
    for name, subjects, seed in (("big", 24, 0), ("elsewhere", 8, 9)):
        openbhb_folder(tmp_path, name, subjects, seed)
        ingested = run("ingest", name, f"c-{name}", "--spacing", 8, "--intensity", "raw", cwd=tmp_path)
        assert ingested.returncode == 0, ingested.stderr
    other = run(
        "phantom", "small", "--subjects", 16, "--spacing", 8, "--channels", "t1w", "--seed", 7, "--ages", "uniform",
        cwd=tmp_path,
    )  # fmt: skip
    assert other.returncode == 0, other.stderr

    pre = run(
        "sweep", "c-big", "--space", "brain_age_pretraining", "--objectives", "openbhb_score,mae", *SWEEP, *SMALL,
        "--set", "views.noise=0.05", "--out", "pre", cwd=tmp_path,
    )  # fmt: skip
    assert pre.returncode == 0, pre.stderr
    known = pd.read_csv(tmp_path / "pre" / "best" / "trained_on.csv", dtype=str)
    splits = pd.read_csv(tmp_path / "pre" / "splits.csv", dtype=str)
    assert set(known["subject"]) == set(splits.loc[splits["role"] != "holdout", "subject"])
    assert known["source_hash"].str.fullmatch("[0-9a-f]{32}").all()

    # The channels have other names, and one of each is needed.
    tuned = run(
        "sweep", "small", "--start", "none", "--start", "pre", *SWEEP, *SMALL, "--set", "data.normalise=per_volume",
        "--out", "tuned", cwd=tmp_path,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert "into the encoder: 120 loaded" in tuned.stdout
    methods = set(pd.read_csv(tmp_path / "tuned" / "holdout.csv")["method"])
    assert methods & {"best from scratch", "best from pre"}

    # What the challenge scores: the site from the internal test, the error from people of elsewhere.
    of_pre = pd.read_csv(tmp_path / "pre" / "holdout.csv").set_index("method").loc["search winner"]
    said = run("evaluate", "pre", "c-elsewhere", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    mae, accuracy = figure(said.stdout, "mae"), float(of_pre["site_balanced_accuracy"])
    score = figure(said.stdout, "OpenBHB score (site balanced accuracy ** 0.3 * MAE)")
    assert score == pytest.approx(openbhb_score(accuracy, mae), rel=1e-2)
    # Its own held-out people are no external test.
    assert "OpenBHB" not in run("evaluate", "pre", "c-big", cwd=tmp_path).stdout
