"""The best model of a run on new data: `predict` for files, `evaluate` for a cohort."""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from rich.console import Console

from core.config import task_of
from core.errors import UserError
from core.files.tables import read_table, write_table
from core.files.writing import replacing, writing_to
from core.inference import Predictor, load_predictor, on_own_grid, prepare_file, segmented
from core.run_access import EVALUATION
from core.run_description import CohortOfRun
from core.run_names import CURVE, NESTED, RUN_JSON, SPLITS, WINNER
from core.tasks import find_task
from core.tasks.task import Prediction, is_known, truth_of
from core.volumes.cohort.description import spacing_in_words
from core.volumes.cohort.reader import Cohort
from core.volumes.images.preprocess import Preprocessing
from distributed.commands.known_scans import KnownScans, roles_of
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell
from distributed.run.folder import RunFolder, open_run
from distributed.run.trust import check_trusted
from distributed.sweeps.looks import count_looks, looks_beside


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a cohort, and their metrics."""

    predictions: pd.DataFrame
    metrics: dict[str, float | str]
    notes: tuple[str, ...]
    table: Path


def predict_files(
    run: Path,
    files: Sequence[Path],
    masks: Sequence[Path] | None = None,
    truth: Sequence[str] | None = None,
    *,
    maps: Path | None = None,
    probabilities: bool = False,
    console: Console | None = None,
    is_trusted: bool = False,
) -> Prediction:
    """Predict what the task of the run says of NIfTI files, which are prepared like the cohort of the run.

    Args:
        run: folder of the run.
        files: one NIfTI file per subject.
        masks: the brain mask of each file, in their order; needed if the cohort was made with masks.
        truth: the truth about each file, in their order and as it was typed.
        maps: a folder for the maps of classes of a task that has any, each on the grid of its file.
        probabilities: whether to write those of the classes, too.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.

    Returns:
        A table with the columns file; those of the task; trained_on (yes, no, perhaps or unknown; see `Standing`);
        and note (empty, or why the prediction may be wrong or too good).

    Raises:
        UserError: no model, a file that cannot be read, another number of masks or truths than files, a truth that the
            task does not understand, or a model of several channels.
    """
    if truth is not None and len(truth) != len(files):
        raise UserError(f"{len(files)} volumes need as many --truth (--age), got {len(truth)}")
    if masks is not None and len(masks) != len(files):
        raise UserError(f"{len(files)} volumes need as many brain masks, got {len(masks)}")
    folder = _open_single(run)
    predictor = _predictor_of(folder, console, is_trusted)
    task = find_task(predictor.settings.task)
    known_truth = None if truth is None else task.read_truth(truth, predictor.facts)
    if len(predictor.channels) > 1:
        raise UserError(
            f"the model needs channels {', '.join(predictor.channels)} of each subject; "
            "ingest them into a cohort and use `brainsweep evaluate`"
        )
    known, preprocessing = KnownScans.of(folder, predictor.channels[0]), _preprocessing(folder)
    predicted, trained_on, notes, volumes = [], [], list[str](), list[dict[str, float]]()
    for file, mask in zip(files, [None] * len(files) if masks is None else masks, strict=True):
        scan = prepare_file(file, preprocessing, mask)
        outputs = predictor.observe(scan.voxels[None])
        predicted.append(predictor.predictions(outputs))
        made = predictor.maps(outputs)
        dense = {
            name: segmented(each, scan, file) for name, each in predictor.probability_maps(outputs).items()
        }
        volumes.append({f"ml_{name}": ml for each in dense.values() for name, ml in each.milliliters.items()})
        if maps is not None:
            own = {name: on_own_grid(several[0], scan, file) for name, several in made.items()}
            own |= {name: each.classes for name, each in dense.items()}
            if probabilities:
                own |= {f"{name}_probabilities": each.probabilities for name, each in dense.items()}
            _write_maps(own, file, maps)
        standing = known.standing(file, scan)
        trained_on.append(standing.trained_on)
        said = (predictor.unfamiliar(scan.voxels[None]), standing.note)
        notes.append("; ".join(note for note in said if note))
    presented = predictor.present(pd.concat(predicted, ignore_index=True), known_truth)
    names = [*made, *dense]
    if names and maps is None:
        lacks = (*presented.lacks, f"the {', '.join(names)} maps are not written: give --out FOLDER")
        presented = replace(presented, lacks=lacks)
    if probabilities and not dense:
        raise UserError(f"--probabilities cannot act: the task {task.about.name} has none of voxels")
    of_classes = pd.DataFrame(volumes)
    shown = presented.shown.assign(
        **{
            f"{str(name).removeprefix('ml_')} (mL)": [f"{ml:.1f}" for ml in column]
            for name, column in of_classes.items()
        }
    )
    presented = replace(presented, shown=shown)
    table = pd.concat([presented.table.copy(), of_classes], axis=1)
    table.insert(0, "file", [str(file) for file in files])
    return replace(presented, table=table.assign(trained_on=trained_on, note=notes))


def _write_maps(maps: Mapping[str, nib.Nifti1Image], file: Path, folder: Path) -> None:
    """Write the maps of a scan as NIfTI files: FOLDER/sub-01_T1w_NAME.nii.gz."""
    stem = file.name.removesuffix(".gz").removesuffix(".nii")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in maps.items():
            with replacing(folder / f"{stem}_{name}.nii.gz") as path:
                path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _predictor_of(folder: RunFolder, console: Console | None, is_trusted: bool) -> Predictor:
    """The best model of a run; the file of its task is executed only if it is the one with which the run began."""
    check_trusted(folder, None, console or Console(quiet=True), is_trusted=is_trusted, does="this command")
    return load_predictor(folder.path / "best", task_of(folder.about.settings))


def evaluate_run(
    run: Path, cohort: str | Path, *, console: Console | None = None, is_trusted: bool = False
) -> Evaluation:
    """Predict a cohort, and measure it. In the cohort of the run itself only the held-out subjects are judged.

    Args:
        run: folder of the run.
        cohort: folder or URL of the cohort.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.

    Raises:
        UserError: no model, or a cohort with another spacing, without the channels of the model, or of which nothing is
            known that could be compared with the predictions.
    """
    folder = _open_single(run)
    predictor = _predictor_of(folder, console, is_trusted)
    task = find_task(predictor.settings.task)
    opened = Cohort.open(cohort)
    _check_alike(folder, predictor, opened)
    labels = task.labels(predictor.settings, opened.manifest)
    rows, notes = _rows_to_judge(folder, opened, np.flatnonzero(is_known(labels)))
    if rows.size == 0:
        raise UserError(
            f"the {task.describe(predictor.settings).truth} of no scan to judge in {opened.location} is known"
        )
    channels = [opened.description.channels.index(channel) for channel in predictor.channels]
    volumes = opened.read(rows)[:, channels]
    presented = predictor.present(predictor.predict(volumes), labels[rows])
    unfamiliar = predictor.unfamiliar(volumes)
    notes += (unfamiliar,) if unfamiliar else ()
    of_scan = opened.manifest.iloc[rows][["subject", "site"]].reset_index(drop=True)
    table = pd.concat([of_scan, presented.table], axis=1)
    path = evaluation_table(folder.path, opened.description.name, opened.description.hash)
    path.parent.mkdir(exist_ok=True)
    with writing_to(path.parent):
        write_table(table, path)
    known = truth_of(opened.manifest, labels, rows)
    is_own = opened.description.hash == _cohort_of(folder).hash
    metrics = task.measure(presented.table, known, {} if is_own else _internal(folder))
    return Evaluation(table, metrics, notes + presented.lacks, path)


def _internal(folder: RunFolder) -> dict[str, float]:
    """The mean of every metric over the refits of the winner, on the held-out people of the run; {} without them."""
    try:
        table = read_table(folder.path / "holdout.csv")
    except (FileNotFoundError, UserError):
        return {}
    of_winner = table[table["method"] == WINNER].drop(columns="method").select_dtypes("number")
    return {} if of_winner.empty else {str(name): float(value) for name, value in of_winner.mean().items()}


def evaluation_table(run: Path, name: str, digest: str) -> Path:
    """Where the table of a cohort is written. Others may have written the cohort: its `name` leads nowhere else."""
    plain = re.sub(r"[^\w.-]", "_", name).lstrip(".")[:80] or "cohort"
    return run / "evaluations" / f"{plain}-{re.sub('[^0-9a-f]', '_', digest[:8])}.csv"


def _open_single(run: Path) -> RunFolder:
    """The run, if it has one best model; UserError for a nested search, which has one for every hold-out."""
    folder = open_run(run)
    if folder.about.kind == CURVE:
        raise UserError(
            f"{run} is a curve, with a best model for every budget of labels; use one of its sweeps, such as "
            f"{run}/labelled-all"
        )
    if folder.about.kind == NESTED:
        raise UserError(
            f"{run} is a nested search: it judges the search and has no model of its own; use one of its sweeps, such "
            f"as {run}/outer-1, or run a sweep without --outer"
        )
    return folder


def _cohort_of(folder: RunFolder) -> CohortOfRun:
    recorded = folder.about.cohort
    if recorded is None:
        raise UserError(f"{folder.path}/{RUN_JSON} does not say which cohort the run was made on")
    return recorded


def _preprocessing(folder: RunFolder) -> Preprocessing:
    """The preprocessing of the cohort of the run; phantoms are made on the grid, in MNI space, with raw intensities."""
    cohort = _cohort_of(folder)
    if cohort.synthetic:
        return Preprocessing.model_validate(
            {"spacing": cohort.spacing, "shape": cohort.shape, "intensity": "raw", "centre": "world"}
        )
    return Preprocessing.from_settings(cohort.preprocessing)


def _check_alike(folder: RunFolder, predictor: Predictor, cohort: Cohort) -> None:
    trained = _cohort_of(folder)
    if cohort.description.spacing != trained.spacing:
        raise UserError(
            f"cohort {cohort.location} has voxels of {spacing_in_words(cohort.description.spacing)}, the model was "
            f"trained at {spacing_in_words(trained.spacing or 0.0)}; ingest it with the same --spacing"
        )
    absent = [channel for channel in predictor.channels if channel not in cohort.description.channels]
    if absent:
        raise UserError(
            f"cohort {cohort.location} has channels {', '.join(cohort.description.channels)}, "
            f"but the model needs {', '.join(absent)}"
        )


def _look(folder: RunFolder, rows: np.ndarray, people: Collection[str]) -> str:
    """Record that the held-out `rows` are used now; returns how often this was done, here and in runs beside this one.

    A run whose folder cannot be written is evaluated nowhere, because its table would have no place.
    """
    AccessRecord(folder.access).note(rows, Cell(HOLDOUT, 0, EVALUATION))
    own, beside = count_looks(folder), looks_beside(folder, people)
    note = f"look {own} of this run at its held-out subjects"
    if beside:
        others = ", ".join(f"{name} {looks}" for name, looks in beside.items())
        note += f"; other runs beside it have looked at some of them, too ({others})"
    if own + sum(beside.values()) > 1:
        note += ". Whoever chooses by such looks has searched on the hold-out, and its error is too good"
    return note


def _rows_to_judge(
    folder: RunFolder, cohort: Cohort, labelled: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """All `labelled` rows of another cohort; of the run's own cohort those on which the model was not trained."""
    roles = pd.Series(roles_of(folder), dtype=str)
    if cohort.description.hash == _cohort_of(folder).hash:
        role = cohort.manifest["subject"].map(roles)
        if role.isna().any():
            unknown = cohort.manifest["subject"][role.isna()].iloc[0]
            raise UserError(
                f"{folder.path / SPLITS} is damaged: it does not say whether {unknown} was held out; put it back from "
                "a backup"
            )
        held_out = np.intersect1d(np.flatnonzero(role.eq("holdout")), labelled)
        people = set(cohort.manifest["subject"].iloc[held_out])
        note = f"this is the run's own cohort: only its {len(people)} held-out subjects are judged"
        return held_out, (note, _look(folder, held_out, people))
    known = cohort.manifest["subject"].drop_duplicates()
    shared = known.isin(roles.index[roles != "holdout"]).sum()
    notes: tuple[str, ...] = ()
    if shared:
        notes = (f"{shared} subject names also occur among the training subjects: if they are the same people, "
                 "these figures are too good",)  # fmt: skip
    return labelled, notes
