"""`evaluate`: the models of a run on a whole cohort, with its truth, site by site."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from core.config import needed_maps
from core.errors import UserError
from core.files.tables import read_table, write_table
from core.files.writing import writing_to
from core.inference import Predicted, Predictor, mean_answer
from core.own_grid import OwnGrid, Placed, as_affine, as_stored, place
from core.run_access import EVALUATION
from core.run_names import SPLITS, WINNER
from core.tasks import find_task
from core.tasks.task import ClassProbabilities, is_known, truth_of
from core.volumes.cohort.description import map_source, spacing_in_words, stored_voxel_ml
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.shards import checksum
from core.volumes.images.resample import resample_labels
from core.volumes.sources.images import read_image
from core.volumes.sources.listing import ImageFile
from distributed.commands.known_scans import roles_of
from distributed.commands.models import Models, batches_of, single_run
from distributed.commands.options import Ensemble
from distributed.commands.predicting import OnProgress, cohort_of_run
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell
from distributed.run.folder import RunFolder
from distributed.sweeps.looks import count_looks, looks_beside

TOGETHER = 4
"""Scans that are read and predicted at a time."""
OWN, STORED = "own", "stored"
"""The grid on which a map was compared."""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a cohort, and their metrics."""

    predictions: pd.DataFrame
    metrics: dict[str, float | str]
    of_sites: dict[str, dict[str, float | str]]
    """The same of the people of every site, if there are several."""
    notes: tuple[str, ...]
    table: Path


class Reference(NamedTuple):
    """The true map of a scan, and the voxels on which it is known."""

    classes_xyz: npt.NDArray[np.int16]
    own: OwnGrid | None
    """None: on the grid of the cohort."""


def evaluate_run(
    run: Path,
    cohort: str | Path,
    *,
    ensemble: Ensemble = "best",
    out_of_fold: bool = False,
    console: Console | None = None,
    is_trusted: bool = False,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Predict a cohort, and measure it. In the cohort of the run itself only the held-out subjects are judged.

    Maps are compared on the own voxels of a scan where the file of its true map is still what the cohort was made
    from, else on the grid of the cohort; the column `grid` of the table says which.

    Args:
        run: folder of the run.
        cohort: folder or URL of the cohort.
        ensemble: which models to ask.
        out_of_fold: whether to judge the people of the folds, too, each by the models that were not trained on them.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.
        on_progress: hears of the scans.

    Raises:
        UserError: no model, or a cohort with another spacing, without the channels of the model, or of which nothing is
            known that could be compared with the predictions.
    """
    folder = single_run(run)
    models = Models.of(folder, console, is_trusted)
    predictor = models.best.predictor
    task, opened = find_task(predictor.settings.task), Cohort.open(cohort)
    check_alike(folder, predictor, opened)
    labels = task.labels(predictor.settings, opened.manifest)
    labelled = np.flatnonzero(is_known(labels))
    if out_of_fold:
        models.of_kind("folds")
        rows, notes = _rows_out_of_fold(folder, opened, labelled)
        group, groups = models.unseen(opened, ensemble)
        rows = rows[group[rows] >= 0]
    else:
        rows, notes = _rows_to_judge(folder, opened, labelled)
        group, groups = np.zeros(len(opened), dtype=np.int64), [models.of_kind(ensemble)]
    if rows.size == 0:
        raise UserError(
            f"the {task.describe(predictor.settings).truth} of no scan to judge in {opened.location} is known"
        )
    parts, rows_in_order = [], list[int]()
    channels = [opened.description.channels.index(channel) for channel in predictor.channels]
    unfamiliar = set[str]()
    for number, places in batches_of(group[rows], TOGETHER):
        several = rows[places]
        volumes = opened.read(several)[:, channels]
        said = mean_answer([model.predictor for model in groups[number]], volumes)
        parts.append(_compared(opened, several, said, predictor))
        rows_in_order.extend(several.tolist())
        if note := predictor.unfamiliar(volumes):
            unfamiliar.add(note)
        if on_progress is not None:
            on_progress(len(rows_in_order), len(rows))
    order = np.argsort(rows_in_order)
    rows = np.array(rows_in_order)[order]
    predictions = pd.concat(parts, ignore_index=True).iloc[order].reset_index(drop=True)
    presented = predictor.present(predictions, labels[rows])
    notes += tuple(sorted(unfamiliar)[:1]) + _of_grids(presented.table)
    of_scan = opened.manifest.iloc[rows][["subject", "site"]].reset_index(drop=True)
    table = pd.concat([of_scan, presented.table], axis=1)
    kind = ("-folds" if ensemble == "folds" else "") + ("-out-of-fold" if out_of_fold else "")
    path = evaluation_table(folder.path, opened.description.name, opened.description.hash, kind)
    with writing_to(path.parent):
        path.parent.mkdir(exist_ok=True)
        write_table(table, path)
    is_own = opened.description.hash == cohort_of_run(folder).hash
    internal = {} if is_own else _internal(folder)

    def measured(chosen: Rows) -> dict[str, float | str]:
        known = truth_of(opened.manifest, labels, rows[chosen])
        return task.measure(presented.table.iloc[chosen].reset_index(drop=True), known, internal)

    sites = of_scan["site"].to_numpy(str)
    named = sorted(set(sites)) if len(set(sites)) > 1 else []
    return Evaluation(
        table,
        measured(np.arange(len(rows))),
        {site or "unknown": measured(np.flatnonzero(sites == site)) for site in named},
        notes + presented.lacks,
        path,
    )


def segmented_rows(
    cohort: Cohort, rows: Rows, said: Predicted, *, stored_only: bool = False
) -> Iterator[tuple[int, str, Placed, OwnGrid | None]]:
    """Every segmentation of these rows, on the own voxels of its scan, or on the grid of the cohort.

    Yields the place in `rows`, the name of the map, the segmentation, and its grid (None: that of the cohort).
    """
    for name, every in said.probabilities.items():
        for number, row in enumerate(rows):
            mine = ClassProbabilities(every.values[number : number + 1], every.classes)
            scan = cohort.manifest.iloc[row]
            own = None if stored_only else OwnGrid.of_manifest(scan)
            if own is None:
                (voxel_ml,) = stored_voxel_ml(cohort.manifest.iloc[[row]], cohort.description.edges)
                yield number, name, as_stored(mine, float(voxel_ml)), None
            else:
                yield number, name, place(mine, as_affine(scan["affine"]), own), own


def check_alike(folder: RunFolder, predictor: Predictor, cohort: Cohort) -> None:
    """Refuse a cohort that the models of a run cannot see.

    Raises:
        UserError: it has voxels of another size, or lacks a channel.
    """
    trained = cohort_of_run(folder)
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


def evaluation_table(run: Path, name: str, digest: str, kind: str = "") -> Path:
    """Where the table of a cohort is written, for every `kind` of evaluation.

    Others may have written the cohort: its `name` leads nowhere else.
    """
    plain = re.sub(r"[^\w.-]", "_", name).lstrip(".")[:80] or "cohort"
    return run / "evaluations" / f"{plain}-{re.sub('[^0-9a-f]', '_', digest[:8])}{kind}.csv"


def _compared(cohort: Cohort, rows: Rows, said: Predicted, predictor: Predictor) -> pd.DataFrame:
    """What was said, with columns of how its maps agree with the true ones."""
    wanted = needed_maps(predictor.settings)
    if not set(wanted) & said.probabilities.keys():
        return said.table
    task, columns = find_task(predictor.settings.task), list[Mapping[str, float | str]]()
    references = [_reference(cohort, int(row), wanted[0]) for row in rows]
    for number, row in enumerate(rows):
        reference = references[number]
        mine = Predicted(
            said.table.iloc[[number]],
            {},
            {
                wanted[0]: said.probabilities[wanted[0]]._replace(
                    values=said.probabilities[wanted[0]].values[[number]]
                )
            },
        )
        _, _, placed, own = next(
            segmented_rows(cohort, np.array([row]), mine, stored_only=reference.own is None)
        )
        edges = cohort.description.edges if own is None else own.edges
        (stored_ml,) = stored_voxel_ml(cohort.manifest.iloc[[row]], cohort.description.edges)
        voxel_ml = float(stored_ml) if own is None else own.voxel_ml
        found = task.judge_map(predictor.settings, placed.classes_xyz, reference.classes_xyz, edges, voxel_ml)
        columns.append({**found, "grid": STORED if own is None else OWN})
    return pd.concat([said.table.reset_index(drop=True), pd.DataFrame(columns)], axis=1)


def _reference(cohort: Cohort, row: int, name: str) -> Reference:
    """The true map of a scan: of its file if that is still what the cohort was made from, else as it is stored."""
    stored = cohort.read_map(name, np.array([row]))[0]
    scan = cohort.manifest.iloc[row]
    own, source = OwnGrid.of_manifest(scan), scan.get(map_source(name))
    if own is None or not isinstance(source, str) or not source or "[" in source:
        return Reference(stored, None)
    path = Path(cohort.description.source)
    file = (path if path.is_dir() else path.parent) / source
    try:
        voxels, affine = read_image(ImageFile(file), may_be_constant=True)
    except UserError:
        return Reference(stored, None)
    classes_xyz = voxels.astype(np.int16)
    again = resample_labels(classes_xyz, affine, as_affine(scan["affine"]), cohort.description.shape)
    if checksum(again) != checksum(stored):
        # Another file is there now.
        return Reference(stored, None)
    # The file is read in canonical orientation, and the own grid is as it is stored.
    return Reference(resample_labels(classes_xyz, affine, own.affine, own.shape), own)


def _of_grids(table: pd.DataFrame) -> tuple[str, ...]:
    """A note on the grid of the comparisons."""
    if "grid" not in table:
        return ()
    own, scans = int((table["grid"] == OWN).sum()), len(table)
    if own == scans:
        return ("maps were compared on the scans' own grids",)
    if own == 0:
        return (
            "maps were compared on the stored grid: the files of the true maps are not there, or have changed",
        )
    return (
        f"maps of {own} of {scans} scans were compared on their own grids, the others on the stored grid",
    )


def _internal(folder: RunFolder) -> dict[str, float]:
    """The mean of every metric over the refits of the winner, on the held-out people of the run; {} without them."""
    try:
        table = read_table(folder.path / "holdout.csv")
    except (FileNotFoundError, UserError):
        return {}
    of_winner = table[table["method"] == WINNER].drop(columns="method").select_dtypes("number")
    return {} if of_winner.empty else {str(name): float(value) for name, value in of_winner.mean().items()}


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


def _roles(folder: RunFolder, cohort: Cohort) -> pd.Series:
    """The role of every scan of the run's own cohort."""
    role = cohort.manifest["subject"].map(pd.Series(roles_of(folder), dtype=str))
    if role.isna().any():
        unknown = cohort.manifest["subject"][role.isna()].iloc[0]
        raise UserError(
            f"{folder.path / SPLITS} is damaged: it does not say whether {unknown} was held out; put it back from "
            "a backup"
        )
    return role


def _rows_out_of_fold(folder: RunFolder, cohort: Cohort, labelled: Rows) -> tuple[Rows, tuple[str, ...]]:
    """All `labelled` rows of the run's own cohort."""
    if cohort.description.hash != cohort_of_run(folder).hash:
        raise UserError(
            f"--out-of-fold is for the cohort of the run itself, whose people the models know; all of "
            f"{cohort.location} are judged without it"
        )
    role = _roles(folder, cohort)
    held_out = np.intersect1d(np.flatnonzero(role.eq("holdout")), labelled)
    people = set(cohort.manifest["subject"].iloc[held_out])
    note = (
        f"this is the run's own cohort: its {len(people)} held-out subjects are judged, and those of the folds, each "
        "by models that were not trained on them"
    )
    return labelled, (note, _look(folder, held_out, people))


def _rows_to_judge(folder: RunFolder, cohort: Cohort, labelled: Rows) -> tuple[Rows, tuple[str, ...]]:
    """All `labelled` rows of another cohort; of the run's own cohort those on which the model was not trained."""
    roles = pd.Series(roles_of(folder), dtype=str)
    if cohort.description.hash == cohort_of_run(folder).hash:
        role = _roles(folder, cohort)
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
