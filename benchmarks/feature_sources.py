"""What the commands of `benchmarks.features` begin with: synthetic cohorts, small trees of scans, files of a user.

Everything is a place below the folder of the campaign, and is made when the first row asks for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from core.volumes.phantom.cohort import phantom_brain
from core.volumes.phantom.settings import PhantomSettings

MNI_2MM = (91, 109, 91)
"""The grid of the arrays of MRE and OpenBHB."""
TILT = 10.0
"""Degrees by which a head is turned, whose midline is to be found."""
FOREIGN = "theirs."
"""What the names of foreign weights begin with."""


class Prepared(NamedTuple):
    """How something is made: by a command or a function, from what else."""

    make: str | Callable[[Path], None]
    needs: tuple[str, ...] = ()


def brain(number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """A synthetic T1-weighted brain (X, Y, Z) at 8 mm, and its affine."""
    made = phantom_brain(PhantomSettings(kind="tissue", spacing=8.0), number)
    return made.channels["t1w"].astype(np.float32), made.affine


def write_image(path: Path, voxels: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> None:
    """A NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def write_text(path: Path, text: str) -> None:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mre(place: Path) -> None:
    """Arrays of two studies; everyone has a value of their own, so that a wrong row would be seen."""
    for study, ages in (("OA", (71.5, 64.0)), ("BMI", (23.0, 31.5, 28.0))):
        folder = place / study
        folder.mkdir(parents=True)
        for scale, quantity in ((30, "stiffness"), (0.1, "dr"), (10, "T1_masked")):
            np.save(folder / f"{quantity}_{study}.npy", np.stack([_block(scale * age) for age in ages]))
        np.save(folder / f"age_{study}.npy", np.array(ages))
        np.save(folder / f"sex_{study}.npy", np.array(["F", "M", "F"][: len(ages)]))
        np.save(folder / f"id_{study}.npy", np.arange(1, len(ages) + 1))
        np.save(folder / f"MRE_coverage_{study}.npy", np.linspace(0.9, 1.0, len(ages)))


def openbhb(place: Path) -> None:
    """An array whose rows stand in another order than the table: its voxels are as bright as the person is old."""
    order = (30, 10, 20)
    place.mkdir(parents=True)
    np.save(place / "train_quasiraw_2mm.npy", np.stack([_block(number) for number in order]))
    np.save(place / "participants_id.npy", np.array(order))
    lines = [f"{number}\t{number}\tfemale\t1\ttrain\tX" for number in sorted(order)]
    header = "participant_id\tage\tsex\tsite\tsplit\tstudy"
    write_text(place / "participants.tsv", "\n".join([header, *lines, ""]))


def _block(value: float) -> npt.NDArray[np.float32]:
    """A volume on the grid of 2 mm with a block of nearly one value."""
    volume = np.zeros(MNI_2MM, dtype=np.float32)
    volume[20:70, 25:85, 20:70] = value
    volume[40:50, 50:60, 40:50] *= 1.1
    return volume


def masked(place: Path) -> None:
    """Heads with a bright surrounding, and masks of their brains."""
    for number in range(3):
        voxels, affine = brain(number)
        folder = place / f"sub-{number:02d}" / "anat"
        write_image(folder / f"sub-{number:02d}_T1w.nii.gz", np.where(voxels > 0, voxels, 5000), affine)
        write_image(folder / f"sub-{number:02d}_mask.nii.gz", (voxels > 0).astype(np.uint8), affine)


def tilted(place: Path) -> None:
    """Symmetric heads that lie askew in their images."""
    turn = np.radians(TILT)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    for number in range(2):
        voxels, affine = brain(number)
        both = (voxels > 0) & (voxels[::-1] > 0)
        head = np.where(both, (voxels + voxels[::-1]) / 2, 0)
        path = place / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_T1w.nii.gz"
        write_image(path, head, motion @ affine)


def fold_list(place: Path) -> None:
    """A list with folds, as Decathlon and system C have it; one person is in two of them."""
    scans = []
    for number, (person, fold) in enumerate([("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2), ("a", 2)]):
        voxels, affine = brain(number)
        write_image(place / f"{number}.nii.gz", voxels, affine)
        told = {"label": number % 2, "fold": fold, "id": person, "age": 30 + number}
        scans.append({"image": [f"{number}.nii.gz"], **told})
    write_text(place / "folds.json", json.dumps({"training": scans}))


def cases(place: Path) -> None:
    """A folder for each case with four contrasts, as BraTS has them."""
    for number in range(2):
        voxels, affine = brain(number)
        for factor, contrast in enumerate(("t1n", "t1c", "t2w", "t2f"), start=1):
            path = place / f"case-{number}" / f"case-{number}-{contrast}.nii.gz"
            write_image(path, factor * voxels, affine)


def foreign_weights(place: Path) -> None:
    """The weights of an encoder under other names, without its first layer."""
    weights = load_file("runs/swin/best/model.safetensors")
    names = [name for name in weights if name.startswith("encoder.") and "patch_embed" not in name]
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name.replace("encoder.", FOREIGN, 1): weights[name] for name in names}, place)


def killed(place: Path) -> None:
    """A training that is killed when a few of its epochs are over."""
    words = (
        f"train cohorts/ages --out {place} --folds 2 --set model.width=0.0625 --set training.epochs=60 "
        "--set training.gradient_clip=0.5 --set objective.neighbours=null"
    )
    print("$ brainsweep", words, " (and killed after a few epochs)", flush=True)
    training = subprocess.Popen(
        [sys.executable, "-m", "distributed", *words.split()],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    progress = place / "trials" / "0000" / "progress.json"
    while training.poll() is None and not (progress.exists() and progress.read_text().count('"epoch"') > 3):
        time.sleep(0.05)
    training.kill()
    training.wait()


def text_file(text: str) -> Callable[[Path], None]:
    """A file that a user has written."""
    return lambda place: write_text(place, text)


BINS = """\
def space(trial):
    if trial.suggest_categorical("objective.name", ["simclr", "supcon"]) == "supcon":
        trial.suggest_categorical("objective.bin_width", [5.0, 20.0])
    return dict(trial.params)
"""
NOTHING = "def space(trial):\n    return dict(trial.params)\n"
"""A space that searches nothing itself: only what --choose names."""
LAUNCHER = """\
task: brain_age
model: {name: resnet18, width: 0.0625}
objective: {name: y_aware, kernel: rbf, width: 2.0}
training: {epochs: 50, batch_size: 12}
"""

PREPARED: dict[str, Prepared] = {
    "cohorts/ages": Prepared("phantom cohorts/ages --spacing 8 --subjects 24"),
    "cohorts/others": Prepared("phantom cohorts/others --spacing 8 --subjects 12 --seed 1"),
    "cohorts/tissue": Prepared("phantom cohorts/tissue --kind tissue --spacing 8 --subjects 16"),
    "cohorts/people": Prepared("phantom cohorts/people --kind tissue --spacing 8 --subjects 8 --seed 1"),
    "cohorts/lesions": Prepared("phantom cohorts/lesions --kind lesions --spacing 8 --subjects 24"),
    "cohorts/contrasts": Prepared("phantom cohorts/contrasts --kind contrasts --spacing 8 --subjects 24"),
    "cohorts/wide": Prepared(
        "ingest sources/people cohorts/wide --channels T1w --spacing 8 --shape 36,36,36"
    ),
    "sources/people": Prepared(
        "phantom sources/people --nifti --kind tissue --spacing 8 --subjects 12 --seed 2"
    ),
    "sources/ct": Prepared("phantom sources/ct --nifti --kind ct --spacing 8 --subjects 3"),
    "sources/mre": Prepared(mre),
    "sources/openbhb": Prepared(openbhb),
    "sources/masked": Prepared(masked),
    "sources/tilted": Prepared(tilted),
    "sources/folds": Prepared(fold_list),
    "sources/cases": Prepared(cases),
    "files/foreign.pt": Prepared(foreign_weights, ("runs/swin",)),
    "files/launcher.yaml": Prepared(text_file(LAUNCHER)),
    "files/bins.py": Prepared(text_file(BINS)),
    "files/chosen.py": Prepared(text_file(NOTHING)),
    "runs/killed": Prepared(killed, ("cohorts/ages",)),
    "runs/pretrained": Prepared(
        "train cohorts/others --space brain_age_pretraining --out runs/pretrained --folds 2 --set model.width=0.0625 "
        "--set training.epochs=1"
    ),
    "runs/swin": Prepared(
        "train cohorts/lesions --space classification --out runs/swin --folds 2 --set data.target=sex "
        "--set model.name=swin --set model.width=0.25 --set training.epochs=2 --set training.batch_size=4 "
        "--set objective.class_weights=none"
    ),
    "runs/whole": Prepared(
        "train cohorts/lesions --space symmetry_segmentation --out runs/whole --folds 2 --set data.target=lesion "
        "--set model.width=0.25 --set training.epochs=2 --set training.batch_size=4 --set views.crop_size=null "
        "--set views.pad_to=null --set views.crop_on_class=0"
    ),
    "runs/contrast": Prepared(
        "train cohorts/contrasts --space contrast_pretraining --out runs/contrast --folds 2 --set model.width=0.25 "
        "--set training.epochs=2 --set training.batch_size=4 --set data.constraint=tissue "
        "--set optimiser.plateau.watches=training",
        ("cohorts/contrasts/derived/tissue",),
    ),
}
"""By place, what rows share, or compare with."""
