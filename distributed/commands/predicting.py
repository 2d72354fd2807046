"""A run's best model on new data: `predict` for files, `evaluate` for a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from core.errors import UserError
from core.evaluation.regression import regression_metrics
from core.inference import Predictor, load_predictor, prepare_files
from core.run_description import CohortOfRun
from core.run_names import RUN_JSON, SPLITS
from core.volumes.cohort.reader import Cohort
from core.volumes.images.preprocess import Preprocessing
from distributed.run.folder import RunFolder, open_run


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a cohort, and what they amount to."""

    predictions: pd.DataFrame
    metrics: dict[str, float]
    notes: tuple[str, ...]
    table: Path


def predict_files(run: Path, files: Sequence[Path], masks: Sequence[Path] | None = None) -> pd.DataFrame:
    """Columns file, predicted (age in years), note: NIfTI files prepared as the run's cohort was, then predicted.

    `masks` are the files' brain masks, needed where the cohort was made with such.

    Raises:
        UserError: no model, a file that cannot be read, a mask too many or too few, or a model of several channels.
    """
    if masks is not None and len(masks) != len(files):
        raise UserError(f"{len(files)} volumes need as many brain masks, got {len(masks)}")
    folder = open_run(run)
    predictor = load_predictor(folder.path / "best")
    if len(predictor.channels) > 1:
        raise UserError(
            f"the model needs channels {', '.join(predictor.channels)} of each subject; "
            "ingest them into a cohort and use `brainsweep evaluate`"
        )
    rows = []
    for number, file in enumerate(files):
        mask = None if masks is None else [masks[number]]
        volume = prepare_files([file], _preprocessing(folder), mask)
        age = float(predictor.predict(volume)[0])
        rows.append({"file": str(file), "predicted": age, "note": predictor.unfamiliar(volume) or ""})
    return pd.DataFrame(rows)


def evaluate_run(run: Path, cohort: str | Path) -> Evaluation:
    """Predict a cohort's ages. On the run's own cohort only the held-out subjects are judged.

    Raises:
        UserError: no model, or a cohort of another spacing or without the channels.
    """
    folder = open_run(run)
    predictor = load_predictor(folder.path / "best")
    opened = Cohort.open(cohort)
    _check_alike(folder, predictor, opened)
    rows, notes = _rows_to_judge(folder, opened)
    channels = [opened.description.channels.index(channel) for channel in predictor.channels]
    volumes = opened.read(rows)[:, channels]
    predicted = predictor.predict(volumes)
    unfamiliar = predictor.unfamiliar(volumes)
    notes += (unfamiliar,) if unfamiliar else ()
    table = opened.manifest.iloc[rows][["subject", "age", "site"]].assign(predicted=predicted)
    path = folder.path / "evaluations" / f"{opened.description.name}-{opened.description.hash[:8]}.csv"
    path.parent.mkdir(exist_ok=True)
    table.to_csv(path, index=False)
    metrics = regression_metrics(predicted, table["age"].to_numpy(float))
    return Evaluation(table, metrics, notes, path)


def _cohort_of(folder: RunFolder) -> CohortOfRun:
    recorded = folder.about.cohort
    if recorded is None:
        raise UserError(f"{folder.path}/{RUN_JSON} does not say which cohort the run was made on")
    return recorded


def _preprocessing(folder: RunFolder) -> Preprocessing:
    """The pipeline of the run's cohort; phantoms are made on the grid, in MNI space, with raw intensities."""
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


def _rows_to_judge(folder: RunFolder, cohort: Cohort) -> tuple[np.ndarray, tuple[str, ...]]:
    """All rows of another cohort; of the run's own, those the model was not trained on."""
    roles = pd.read_csv(folder.path / SPLITS, dtype=str).set_index("subject")["role"]
    if cohort.description.hash == _cohort_of(folder).hash:
        held_out = cohort.manifest["subject"].map(roles).eq("holdout").to_numpy()
        note = f"this is the run's own cohort: only its {held_out.sum()} held-out subjects are judged"
        return np.flatnonzero(held_out), (note,)
    shared = cohort.manifest["subject"].isin(roles.index[roles != "holdout"]).sum()
    notes: tuple[str, ...] = ()
    if shared:
        notes = (f"{shared} subject names also occur among the training subjects: if they are the same people, "
                 "these figures are too good",)  # fmt: skip
    return np.arange(len(cohort)), notes
