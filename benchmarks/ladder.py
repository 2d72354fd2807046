"""Who finds the lesions of phantoms, down to those that cannot be seen? Every rung of the ladder, cross-validated.

    python -m benchmarks.ladder [--rungs 1,2,3,4,5] [--subjects 160] [--spacing 4] [--window 7] [--out TABLE.csv]

Half of the people are ill (`core.volumes.phantom.lesions`); the same people are ill on every rung. Compared are a
ResNet-18, the symmetric Swin, which sees every scan beside its mirror image, and principal components of the voxels
with a logistic regression. All of them are trained on the same folds, by the settings of `train --task classification`
but for the encoder; nothing is chosen by these numbers. The table has the macro AUC of all people, each predicted by
the model of the fold without them, with its 95 % interval over people, and the balanced accuracy. On the last rung
nothing can be seen, so a method that is better than chance there has found a leak.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from core.config import Settings, merge, resolve
from core.evaluation.splits import make_splits
from core.report.answer.classes import auc_interval, pooled_auc
from core.run_settings import RunSettings
from core.tasks.task import Outcome
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Labelled, Place, Subjects
from distributed.training.voxels import VoxelCell
from search_spaces import published

TARGET = "disease"
FOLDS = 5
VOXELS, SWIN = "voxels", "symmetric Swin"
METHODS: Mapping[str, Settings] = {
    VOXELS: {},
    "ResNet-18": {"model.name": "resnet18"},
    SWIN: {"model.name": "swin_symmetry"},
}


def settings_of(changes: Settings) -> RunSettings:
    """The published settings of a classification of the phantoms' disease, with `changes`."""
    return resolve(merge(published("classification"), {"data.target": TARGET, **changes}))


def judge_fold(subjects: Subjects, settings: RunSettings, fold: int, seed: int, place: Place) -> Outcome:
    """The outcome of a network on one fold."""
    training = CellTraining(settings, subjects, Cell(fold, seed), place)
    for _ in range(training.rounds):
        training.run_epoch()
    outcome = training.judge(sites=False)
    training.close()
    return outcome


def judge_voxels(subjects: Subjects, settings: RunSettings, fold: int, seed: int, place: Place) -> Outcome:
    """The outcome of the classical baseline on one fold."""
    cell = VoxelCell(settings, subjects, Cell(fold, seed), place)
    cell.run_epoch()
    return cell.judge(sites=False)


def judge_rung(
    rung: int,
    methods: Mapping[str, Settings],
    subjects: Subjects,
    changes: Settings,
    seed: int,
    place: Place,
) -> Iterator[dict[str, object]]:
    """A line for every one of the `methods`, with what its settings differ in, on one rung."""
    for method in methods:
        settings = settings_of({**methods[method], **changes})
        judge = judge_voxels if method == VOXELS else judge_fold
        started = time.perf_counter()
        tables = [
            table_of(subjects, settings, judge(subjects, settings, fold, seed, place), fold)
            for fold in range(FOLDS)
        ]
        # People are ranked within the fold that one model predicts.
        people = pd.concat([table.assign(outer=fold) for fold, table in enumerate(tables)], ignore_index=True)
        low, high = auc_interval(people, 0.95)
        right = people["predicted"] == people["truth"]
        yield {
            "rung": rung, "method": method, "n": len(people), "macro_auc": pooled_auc(people), "low": low, "high": high,
            "balanced_accuracy": right.groupby(people["truth"]).mean().mean(),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip


def table_of(subjects: Subjects, settings: RunSettings, outcome: Outcome, fold: int) -> pd.DataFrame:
    """The predictions of one fold with the truth."""
    labelled = Labelled.of(subjects, settings)
    rows = labelled.rows_of(fold)[1]
    names = subjects.manifest["subject"].to_numpy(str)[rows]
    return outcome.predictions.assign(subject=names, truth=labelled.labels[rows])


def main() -> None:
    """Make the cohorts, run all methods on them, print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--rungs", default="1,2,3,4,5")
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--subjects", type=int, default=160)
    arguments.add_argument("--spacing", type=float, default=4.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--epochs", type=int, default=50)
    arguments.add_argument(
        "--width", type=float, default=None, help="of the networks; as published if absent"
    )
    arguments.add_argument("--window", type=int, default=7, help="of the Swin, in patches; 7 is published")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    console = Console()
    lines: list[dict[str, object]] = []
    changes: Settings = {"training.epochs": given.epochs} | (
        {} if given.width is None else {"model.width": given.width}
    )
    methods = {name: METHODS[name] for name in given.methods.split(",")}
    if SWIN in methods:
        methods[SWIN] = {**methods[SWIN], "model.window": given.window}
    place = Place(torch.device(given.device))
    for rung in map(int, given.rungs.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            made = PhantomSettings(
                kind="lesions", rung=rung, subjects=given.subjects, spacing=given.spacing, seed=given.seed
            )
            cohort = write_phantom_cohort(Path(folder) / "cohort", made)
            splits = make_splits(cohort.manifest, folds=FOLDS, holdout=0.0, seed=given.seed, by=TARGET)
            subjects = Subjects.of(cohort, splits, InMemory.of(cohort))
            for line in judge_rung(rung, methods, subjects, changes, given.seed, place):
                lines.append(line)
                console.print(pd.DataFrame([line]).round(3).to_string(index=False), highlight=False)
                if given.out is not None:
                    pd.DataFrame(lines).to_csv(given.out, index=False)
    console.print(pd.DataFrame(lines).round(3).to_string(index=False), highlight=False)


if __name__ == "__main__":
    main()
