"""The best model of a run on new data: `predict` for files, `evaluate` for a cohort."""

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
    """Predictions for a cohort, and their metrics."""

    predictions: pd.DataFrame
    metrics: dict[str, float]
    notes: tuple[str, ...]
    table: Path


def predict_files(run: Path, files: Sequence[Path], masks: Sequence[Path] | None = None) -> pd.DataFrame:
    """Predict the ages of NIfTI files, which are prepared like the cohort of the run.

    Args:
        run: folder of the run.
        files: one NIfTI file per subject.
        masks: the brain mask of each file, in their order; needed if the cohort was made with masks.

    Returns:
        Columns file, predicted (age in years), note (empty, or why the prediction may be wrong).

    Raises:
        UserError: no model, a file that cannot be read, another number of masks than files, or a model of several
            channels.
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
    """Predict the ages of a cohort. In the cohort of the run itself only the held-out subjects are judged.

    Raises:
        UserError: no model, or a cohort with another spacing or without the channels of the model.
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
    metrics = regression_metrics(predicted, table["age"].to_numpy(float), table["subject"].to_numpy(str))
    return Evaluation(table, metrics, notes, path)


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


def _rows_to_judge(folder: RunFolder, cohort: Cohort) -> tuple[np.ndarray, tuple[str, ...]]:
    """All rows of another cohort; in the cohort of the run itself the rows on which the model was not trained."""
    # One line for each scan; all scans of a subject have one role.
    splits = pd.read_csv(folder.path / SPLITS, dtype=str, keep_default_na=False).drop_duplicates("subject")
    roles = splits.set_index("subject")["role"]
    if cohort.description.hash == _cohort_of(folder).hash:
        held_out = cohort.manifest["subject"].map(roles).eq("holdout").to_numpy()
        people = cohort.manifest["subject"][held_out].nunique()
        note = f"this is the run's own cohort: only its {people} held-out subjects are judged"
        return np.flatnonzero(held_out), (note,)
    known = cohort.manifest["subject"].drop_duplicates()
    shared = known.isin(roles.index[roles != "holdout"]).sum()
    notes: tuple[str, ...] = ()
    if shared:
        notes = (f"{shared} subject names also occur among the training subjects: if they are the same people, "
                 "these figures are too good",)  # fmt: skip
    return np.arange(len(cohort)), notes
