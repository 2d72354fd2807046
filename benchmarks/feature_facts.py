"""Facts that the general checks cannot say, each in the docstring of its function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.feature_checks import read, settings_of, weights_of
from core.volumes.cohort.reader import Cohort
from core.volumes.images.nifti import read_volume

Fact = Callable[[Path], bool]
Array = npt.NDArray[Any]
AGES, CONTRASTS, PLAIN = Path("cohorts/ages"), Path("cohorts/contrasts"), Path("runs/plain")


def is_as_bright_as_old(*factors: float) -> Fact:
    """Whether the voxels of each channel are so many times the age of their person."""

    def fact(cohort: Path) -> bool:
        """The voxels of everyone are those of a person of this age."""
        ages, volumes = Cohort.open(cohort).manifest["age"], volumes_of(cohort)
        found = [
            [np.median(each[each > 0]) / age for each in scan]
            for scan, age in zip(volumes, ages, strict=True)
        ]
        return len(ages) > 2 and np.allclose(found, factors, rtol=0.02)

    return fact


def has_studies(cohort: Path) -> bool:
    """People have the study and the sex that are in the arrays."""
    table = Cohort.open(cohort).manifest
    return set(table["site"]) == {"OA", "BMI"} and set(table["sex"]) == {"F", "M"}


def is_z_scored(cohort: Path) -> bool:
    """The brain inside its mask has mean 0 and SD 1, and the bright voxels around it are gone."""
    inside = [each[each != 0] for each in volumes_of(cohort)]
    return all(abs(each.mean()) < 0.1 and abs(each.std() - 1) < 0.1 and each.max() < 6 for each in inside)


def is_centred(cohort: Path) -> bool:
    """On 32 x 36 x 32 voxels of 6 mm brains lie where they lay, and maps have the numbers that they had."""
    opened = Cohort.open(cohort)
    maps, affine = opened.read_map("dseg", range(len(opened))), np.array(opened.description.affine)
    files = sorted(Path("sources/people").rglob("*_dseg.nii.gz"))
    apart = [
        _middle(each, affine) - _middle(*read_volume(own)) for each, own in zip(maps, files, strict=True)
    ]
    return maps.shape[1:] == (32, 36, 32) and np.abs(apart).max() < 1 and set(np.unique(maps)) == {0, 1, 2, 3}


def _middle(voxels: Array, affine: Array) -> Array:
    """The mean place in mm of all voxels that are not 0."""
    place: Array = affine[:3, :3] @ np.argwhere(voxels).mean(axis=0) + affine[:3, 3]
    return place


def reaches(*shape: int) -> Fact:
    """Whether the volumes have a shape (C, X, Y, Z), and the voxels of every channel reach from 0 to 1."""

    def fact(cohort: Path) -> bool:
        """Volumes have the shape that was asked for, and voxels reach from 0 to 1."""
        volumes = volumes_of(cohort)
        highest = volumes.max(axis=(0, 2, 3, 4))
        return volumes.shape[1:] == shape and volumes.min() == 0 and np.allclose(highest, 1, atol=0.01)

    return fact


def is_read_by_h5py(cohort: Path) -> bool:
    """The shards are HDF5 files with the voxels that brainsweep reads."""
    found = []
    for path in sorted((cohort / "shards").glob("*.h5")):
        with h5py.File(path) as shard:
            found.append(shard["volumes"][:])
    return np.array_equal(np.concatenate(found), volumes_of(cohort))


def has_clusters(overlay: Path) -> bool:
    """Every brain is divided into 20 clusters, and nothing outside."""
    opened, inside = Cohort.open(CONTRASTS), (volumes_of(CONTRASTS) != 0).any(axis=1)
    maps = opened.read_map(overlay.name, range(len(opened)))
    return all(set(np.unique(each)) == set(range(21)) for each in maps) and np.array_equal(maps > 0, inside)


def has_shares(overlay: Path) -> bool:
    """Everyone has the volumes of three tissues in mL, and their shares."""
    table = read(overlay / "columns.parquet").filter(like=overlay.name)
    volumes, shares = (table.filter(like=kind).to_numpy(float) for kind in ("_ml", "_share"))
    total = volumes.sum(axis=1, keepdims=True)
    return volumes.shape == (8, 3) and total.min() > 100 and np.allclose(shares, volumes / total, atol=1e-4)


def is_on_grid_of(scan: str) -> Fact:
    """Whether the map in a folder has the voxels of a scan at the same places."""

    def fact(folder: Path) -> bool:
        """The map lies on the voxels of its scan."""
        (written,) = folder.rglob("*.nii.gz")
        voxels, affine = read_volume(written, may_be_constant=True)
        own, place = read_volume(scan)
        return voxels.shape == own.shape and np.allclose(affine, place)

    return fact


def has_embeddings(cases: Path) -> bool:
    """The one case has an embedding of 192 numbers, and an asymmetry from 0 to 1."""
    embeddings = read(cases.with_name("embeddings.parquet")).filter(like="embedding_")
    return embeddings.shape == (1, 192) and read(cases)["asymmetry"].between(0, 1).all().item()


def folds_are_alike(run: Path) -> bool:
    """Without --leave-out folds are alike in age, and the same in two runs."""
    roles = roles_of(PLAIN)
    means = Cohort.open(AGES).manifest.set_index("subject")["age"].groupby(roles).mean()
    return abs(means["fold 0"] - means["fold 1"]) < 5 and roles.equals(roles_of(Path("runs/cutout")))


def sites_are_whole(run: Path) -> bool:
    """All people of a site have one role."""
    sites = Cohort.open(AGES).manifest.set_index("subject")["site"]
    return bool(roles_of(run).groupby(sites).nunique().eq(1).all())


def scale_is_of_training(run: Path) -> bool:
    """Fitted once, the scale is that of the non-zero voxels of the training subjects alone."""
    cohort = Cohort.open(AGES)
    voxels = cohort.read(np.flatnonzero(cohort.manifest["subject"].map(roles_of(PLAIN)) == "fold 1"))
    inside = voxels[voxels != 0].astype(np.float64)
    known = json.loads((PLAIN / "best" / "input.json").read_text())["statistics"]
    return np.allclose([*known["mean"], *known["sd"]], [inside.mean(), inside.std()], rtol=1e-3)


def is_aggregated(run: Path) -> bool:
    """The value of both trials is the mean over 2 folds x 2 seeds, with its SD and number."""
    of_cells = read(run / "cells.csv").groupby("number")["mae"].agg(["mean", "std", "count"])
    trials = read(run / "trials.csv").set_index("number")[["value", "sd", "n"]]
    return len(trials) == 2 and bool((trials["n"] == 4).all()) and np.allclose(of_cells, trials)


def probe_reads(features: int) -> Fact:
    """Whether the ridge probe of a model has so many coefficients."""

    def fact(run: Path) -> bool:
        """The ridge probe reads the features that were asked for."""
        return len(json.loads((run / "best" / "probe.json").read_text())["coefficients"]) == features

    return fact


def is_continued(history: Path) -> bool:
    """Every epoch is there once, and between two of them one process ended and another one began."""
    known = read(history)
    pauses = known["first_step_at"].diff()[1:]
    return known["epoch"].tolist() == list(range(1, 61)) and pauses.max() > 20 * pauses.median()


def is_clipped(history: Path) -> bool:
    """The training clips gradients at a norm of 0.5."""
    return settings_of(history.parent)["training.gradient_clip"] == 0.5


def encoder_is_kept(theirs: str, ours: str) -> Fact:
    """Whether the encoder has what it began with; the names of its weights begin with this in the file, and here."""

    def fact(run: Path) -> bool:
        """The frozen encoder has, bit for bit, the weights that it began with."""
        (start,) = (run / "starts").iterdir()
        begun, now = weights_of(start), weights_of(run / "best")
        taken = [name.removeprefix(theirs) for name in begun if name.startswith(theirs)]
        return bool(taken) and all(np.array_equal(begun[theirs + name], now[ours + name]) for name in taken)

    return fact


def is_conditional(run: Path) -> bool:
    """Only supcon has bins, and only the others have kernels; both kinds were tried."""
    trials = read(run / "trials.csv")
    has_bins, has_kernel = (trials[f"objective.{name}"].notna() for name in ("bin_width", "kernel"))
    is_supcon = trials["objective.name"] == "supcon"
    return is_supcon.nunique() == 2 and has_bins.equals(is_supcon) and has_kernel.equals(~is_supcon)


def volumes_of(cohort: Path) -> Array:
    """All volumes (N, C, X, Y, Z) of a cohort."""
    opened = Cohort.open(cohort)
    return opened.read(range(len(opened)))


def roles_of(run: Path) -> pd.Series[str]:
    """The fold of every subject, or that they are held out."""
    return read(run / "splits.csv").set_index("subject")["role"]
