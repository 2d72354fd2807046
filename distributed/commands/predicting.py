"""The best model of a run on new data: `predict` for files, `evaluate` for a cohort."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from core.errors import UserError
from core.evaluation.calibration import Calibration, gap_metrics, gap_table
from core.evaluation.regression import regression_metrics
from core.files.tables import write_table
from core.files.writing import writing_to
from core.inference import Predictor, load_predictor, prepare_file
from core.run_access import EVALUATION
from core.run_description import CohortOfRun
from core.run_names import NESTED, RUN_JSON, SPLITS
from core.volumes.cohort.reader import Cohort
from core.volumes.images.preprocess import Preprocessing
from distributed.commands.known_scans import KnownScans, roles_of
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell
from distributed.run.folder import RunFolder, open_run
from distributed.sweeps.looks import count_looks, looks_beside

NO_CALIBRATION = (
    "this run has kept no out-of-fold predictions, so there is neither a correction for the age bias nor a prediction "
    "interval"
)
OLDEST = 130
"""No person was older, in years."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for files."""

    table: pd.DataFrame
    """One row per file; see `predict_files`."""
    notes: tuple[str, ...]
    """What cannot be given for any of them, and why."""


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
    ages: Sequence[float] | None = None,
) -> Predictions:
    """Predict the ages of NIfTI files, which are prepared like the cohort of the run.

    Args:
        run: folder of the run.
        files: one NIfTI file per subject.
        masks: the brain mask of each file, in their order; needed if the cohort was made with masks.
        ages: the true age of each file in years, in their order, for the gap.

    Returns:
        A table with the columns file; those of `gap_table`; trained_on (yes, no, perhaps or unknown; see `Standing`);
        and note (empty, or why the prediction may be wrong or too good).

    Raises:
        UserError: no model, a file that cannot be read, another number of masks or ages than files, an age that is no
            number of years, or a model of several channels.
    """
    _check_counts(files, masks, ages)
    folder = _open_single(run)
    predictor = load_predictor(folder.path / "best")
    if len(predictor.channels) > 1:
        raise UserError(
            f"the model needs channels {', '.join(predictor.channels)} of each subject; "
            "ingest them into a cohort and use `brainsweep evaluate`"
        )
    known, preprocessing = KnownScans.of(folder, predictor.channels[0]), _preprocessing(folder)
    predicted, trained_on, notes = [], [], []
    for file, mask in zip(files, [None] * len(files) if masks is None else masks, strict=True):
        scan = prepare_file(file, preprocessing, mask)
        predicted.append(float(predictor.predict(scan.voxels[None])[0]))
        standing = known.standing(file, scan)
        trained_on.append(standing.trained_on)
        said = (predictor.unfamiliar(scan.voxels[None]), standing.note)
        notes.append("; ".join(note for note in said if note))
    table = gap_table(predictor.calibration, np.array(predicted), None if ages is None else np.array(ages))
    table.insert(0, "file", [str(file) for file in files])
    return Predictions(table.assign(trained_on=trained_on, note=notes), _lacks(predictor.calibration))


def _check_counts(files: Sequence[Path], masks: Sequence[Path] | None, ages: Sequence[float] | None) -> None:
    if ages is not None and len(ages) != len(files):
        raise UserError(f"{len(files)} volumes need as many --age, got {len(ages)}")
    if masks is not None and len(masks) != len(files):
        raise UserError(f"{len(files)} volumes need as many brain masks, got {len(masks)}")
    for age in ages or ():
        if not 0 <= age <= OLDEST:
            raise UserError(f"--age must be in years, from 0 to {OLDEST}, got {age:g}")


def _lacks(calibration: Calibration | None) -> tuple[str, ...]:
    return (NO_CALIBRATION,) if calibration is None else calibration.lacks


def evaluate_run(run: Path, cohort: str | Path) -> Evaluation:
    """Predict the ages of a cohort. In the cohort of the run itself only the held-out subjects are judged.

    Raises:
        UserError: no model, or a cohort with another spacing or without the channels of the model.
    """
    folder = _open_single(run)
    predictor = load_predictor(folder.path / "best")
    opened = Cohort.open(cohort)
    _check_alike(folder, predictor, opened)
    rows, notes = _rows_to_judge(folder, opened)
    channels = [opened.description.channels.index(channel) for channel in predictor.channels]
    volumes = opened.read(rows)[:, channels]
    predicted = predictor.predict(volumes)
    unfamiliar = predictor.unfamiliar(volumes)
    notes += (unfamiliar,) if unfamiliar else ()
    of_scan = opened.manifest.iloc[rows][["subject", "age", "site"]].reset_index(drop=True)
    ages, subjects = of_scan["age"].to_numpy(float), of_scan["subject"].to_numpy(str)
    gaps = gap_table(predictor.calibration, predicted, ages)
    table = pd.concat([of_scan, gaps.drop(columns="age")], axis=1)
    path = evaluation_table(folder.path, opened.description.name, opened.description.hash)
    path.parent.mkdir(exist_ok=True)
    with writing_to(path.parent):
        write_table(table, path)
    metrics = regression_metrics(predicted, ages, subjects) | gap_metrics(gaps, subjects)
    return Evaluation(table, metrics, notes + _lacks(predictor.calibration), path)


def evaluation_table(run: Path, name: str, digest: str) -> Path:
    """Where the table of a cohort is written. Others may have written the cohort: its `name` leads nowhere else."""
    plain = re.sub(r"[^\w.-]", "_", name).lstrip(".")[:80] or "cohort"
    return run / "evaluations" / f"{plain}-{re.sub('[^0-9a-f]', '_', digest[:8])}.csv"


def _open_single(run: Path) -> RunFolder:
    """The run, if it has one best model; UserError for a nested search, which has one for every hold-out."""
    folder = open_run(run)
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
            f"cohort {cohort.location} has voxels of {cohort.description.spacing:g} mm, the model was trained at "
            f"{trained.spacing:g} mm; ingest it with --spacing {trained.spacing:g}"
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


def _rows_to_judge(folder: RunFolder, cohort: Cohort) -> tuple[np.ndarray, tuple[str, ...]]:
    """All rows of another cohort; in the cohort of the run itself the rows on which the model was not trained."""
    roles = pd.Series(roles_of(folder), dtype=str)
    if cohort.description.hash == _cohort_of(folder).hash:
        role = cohort.manifest["subject"].map(roles)
        if role.isna().any():
            unknown = cohort.manifest["subject"][role.isna()].iloc[0]
            raise UserError(
                f"{folder.path / SPLITS} is damaged: it does not say whether {unknown} was held out; put it back from "
                "a backup"
            )
        held_out = role.eq("holdout").to_numpy()
        people = set(cohort.manifest["subject"][held_out])
        note = f"this is the run's own cohort: only its {len(people)} held-out subjects are judged"
        return np.flatnonzero(held_out), (note, _look(folder, np.flatnonzero(held_out), people))
    known = cohort.manifest["subject"].drop_duplicates()
    shared = known.isin(roles.index[roles != "holdout"]).sum()
    notes: tuple[str, ...] = ()
    if shared:
        notes = (f"{shared} subject names also occur among the training subjects: if they are the same people, "
                 "these figures are too good",)  # fmt: skip
    return np.arange(len(cohort)), notes
