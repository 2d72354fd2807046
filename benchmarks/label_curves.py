"""What does a pre-training bring, at every number of labels? Curves of several methods on phantoms, in one command.

    python -m benchmarks.label_curves symmetry OUT [--labelled 8,32,all] [--subjects 120] [--spacing 4] [--epochs 20 30]
    python -m benchmarks.label_curves contrasts OUT [--labelled 2,4,8,all] [--subjects 64] [--epochs 30 60]

`symmetry` (system C): half of the people are ill on one side of the brain; classes from scratch, after a plain
pre-training (rotation, contrast, inpainting), a symmetric one, and masked autoencoding. `contrasts` (system D): tumours
in four contrasts, of which few are labelled; regions from scratch, after SimCLR of slices, after contrast guided by
clusters, and after masked autoencoding. Every method is a `sweep --labelled …` of one configuration with three refit
seeds on the same held-out people, pre-trained in every cell on the people of that cell. Repeat the command after a
stop: what is finished is kept.
The table and the picture are written to OUT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from core.report.curve import curve_table, read_curve
from core.report.figures.curve import label_curve
from core.run_names import RUN_JSON, WINNER

SCRATCH = "from scratch"
OFF = ("pretraining.objective.symmetry.name=null",)
METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "symmetry": {
        SCRATCH: (),
        "plain": ("pretraining.task=symmetry_pretraining", *OFF),
        "symmetric": ("pretraining.task=symmetry_pretraining",),
        "masked": ("pretraining.task=masked_pretraining",),
    },
    "contrasts": {
        SCRATCH: (),
        "SimCLR of slices": ("pretraining.task=contrast_pretraining", "pretraining.objective.name=simclr"),
        "guided by clusters": ("pretraining.task=contrast_pretraining", "pretraining.data.constraint=tissue"),
        "masked": ("pretraining.task=masked_pretraining",),
    },
}
"""What is set beside the published configuration, by method."""
OF_ALL = {
    "symmetry": ("data.target=disease", "model.width=0.25", "model.window=3", "optimiser.learning_rate=0.001",
                 "training.batch_size=8", "views.crop_size=40", "views.crop_place=centre"),
    "contrasts": ("training.batch_size=4",),
}  # fmt: skip
OF_PRETRAINING = {
    "symmetry": (
        "pretraining.training.batch_size=8",
        "pretraining.optimiser.learning_rate=0.001",
        "pretraining.views.crop_size=40",
    ),
    "contrasts": ("pretraining.training.batch_size=8",),
}
SPACE = {"symmetry": "symmetry_classification", "contrasts": "contrast_segmentation"}
PHANTOM = {"symmetry": ("lesions", "8,32,all", 120), "contrasts": ("contrasts", "2,4,8,all", 64)}
EPOCHS = {"symmetry": (20, 30), "contrasts": (30, 60)}
"""Epochs of the pre-training, and of what follows."""


def main() -> None:
    """Run what is not there yet, and show all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=list(METHODS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--labelled", help="budgets of labels")
    parser.add_argument("--subjects", type=int, help="synthetic people")
    parser.add_argument("--spacing", type=float, default=4.0, help="edge of a voxel in mm")
    parser.add_argument("--slots", type=int, default=2, help="trainings at a time")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("BEFORE", "AFTER"), help="of the two stages")
    options = parser.parse_args()
    kind, labelled, subjects = PHANTOM[options.system]
    cohort = options.out / "cohort"
    brainsweep("phantom", str(cohort), "--kind", kind, "--subjects", str(options.subjects or subjects), "--spacing",
               f"{options.spacing:g}")  # fmt: skip
    if options.system == "contrasts" and not (cohort / "derived" / "tissue" / "overlay.json").exists():
        brainsweep("derive", str(cohort), "--constraint", "tissue")
    before, after = options.epochs or EPOCHS[options.system]
    for method, changes in METHODS[options.system].items():
        folder = options.out / method.replace(" ", "-")
        if (folder / RUN_JSON).exists():
            brainsweep("resume", str(folder))
            continue
        given = [*OF_ALL[options.system], f"training.epochs={after}", *changes]
        if changes:
            given += [*OF_PRETRAINING[options.system], f"pretraining.training.epochs={before}"]
        if options.system == "symmetry" and options.spacing > 4 and changes:
            given.append("pretraining.decoder.kind=transposed")
        brainsweep(
            "sweep", str(cohort), "--space", SPACE[options.system], "--out", str(folder), "--labelled",
            options.labelled or labelled, "--trials", "1", "--folds", "2", "--holdout", "0.4", "--refit-seeds",
            "3", "--slots", str(options.slots),
            *[word for each in given for word in ("--set", each)],
        )  # fmt: skip
    show(options.system, options.out)


def brainsweep(*words: str) -> None:
    """Run a command as a user types it; stop if it fails."""
    print("$ brainsweep", *words, flush=True)
    subprocess.run([sys.executable, "-m", "distributed", *words], check=True)


def show(system: str, out: Path) -> None:
    """The table of all methods, and their curves in one picture."""
    parts = []
    for method in METHODS[system]:
        curve = read_curve(out / method.replace(" ", "-"))
        table = curve_table(curve)
        own = table[table["method"] == WINNER].assign(method=method)
        parts.append(own)
        if method == SCRATCH:
            parts.append(table[table["method"] != WINNER])
    whole = pd.concat(parts, ignore_index=True)
    whole.to_csv(out / "curves.csv", index=False)
    print(
        whole[["method", "labelled", "value", "low", "high", "seeds", "subjects"]]
        .round(3)
        .to_string(index=False)
    )
    label_curve(whole, list(METHODS[system]), curve.task.judged_by.heading).savefig(
        out / "curves.png", dpi=120
    )
    print(f"{out}/curves.csv and {out}/curves.png")


if __name__ == "__main__":
    main()
