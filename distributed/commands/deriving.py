"""`derive`: columns of a cohort that a model computes once, as an overlay; in parallel, and resumable."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from core.config import task_of
from core.errors import UserError
from core.evaluation.label_sets import LabelSets
from core.files.fingerprint import fingerprint
from core.files.writing import replacing, write_text, writing_to
from core.inference import Predicted, Predictor, load_predictor, mean_answer
from core.report.quality.derived import write_derived_page
from core.tasks import find_task
from core.volumes.cohort.overlay import (
    DERIVED,
    OverlayDescription,
    check_new,
    describe_overlay,
    write_overlay,
)
from core.volumes.cohort.reader import Cohort
from distributed.commands.evaluating import check_alike, segmented_rows
from distributed.commands.models import Models, batches_of, single_run
from distributed.commands.options import Ensemble
from distributed.commands.predicting import OnProgress

VOLUMES = "volumes"
"""The overlay whose columns have no beginning: csf_ml and not volumes_csf_ml."""
TOGETHER = 4
"""Scans of a task."""
REQUEST = "request.json"


@dataclass(frozen=True)
class VolumesTask:
    """Some rows of a cohort, and the models that predict them. It can be pickled."""

    part: Path
    """The file that the result is kept in."""
    cohort: str
    rows: tuple[int, ...]
    models: tuple[Path, ...]
    """Their folders; what they say is averaged."""
    task: str


Runner = Callable[[Sequence[VolumesTask], int], Iterator[str]]
"""Runs `measure_volumes` for each task, in any order and any process, and yields what it returns. It is told how many
bytes a task needs beside its process."""


def one_after_another(tasks: Sequence[VolumesTask], memory: int) -> Iterator[str]:
    """Run the tasks in this process."""
    return map(measure_volumes, tasks)


def measure_volumes(task: VolumesTask) -> str:
    """Segment the rows of a task, and keep the volume of every class in mL; returns the name of the file."""
    cohort, predictors = _opened(task.cohort), [_loaded(folder, task.task) for folder in task.models]
    rows = np.array(task.rows)
    volumes = [
        {"row": int(rows[number]), **{f"{name}_ml": ml for name, ml in placed.milliliters.items()}}
        for number, _, placed, _ in segmented_rows(cohort, rows, _said(cohort, rows, predictors))
    ]
    with writing_to(task.part.parent), replacing(task.part) as path:
        pd.DataFrame(volumes).to_parquet(path, index=False)
    return task.part.name


def derive_volumes(
    run: Path,
    cohort: Path,
    name: str = VOLUMES,
    *,
    ensemble: Ensemble = "best",
    console: Console | None = None,
    is_trusted: bool = False,
    runner: Runner = one_after_another,
    on_progress: OnProgress | None = None,
) -> tuple[OverlayDescription, Path]:
    """Add the volume of every class of a segmentation to a cohort, in mL and as a share of their sum.

    Every scan is segmented by models of the run that were not trained on it: the best one, or those of the folds that
    do not know it. Where all know it, the best one is taken, and the overlay says so: a run that judges these people on
    these columns is refused. Volumes are those on the scan's own voxels where the manifest knows them. What is done is
    kept, so that the same call after an interruption goes on.

    Args:
        run: folder of the run.
        cohort: folder of the cohort.
        name: of the overlay; but for `volumes` the names of its columns begin with it.
        ensemble: which models predict the scans that none of them knows.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.
        runner: runs the tasks.
        on_progress: hears of the scans.

    Returns:
        What was written, and its quality page.

    Raises:
        UserError: the run gives no segmentation, the cohort is of another kind, or the overlay is there.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise UserError(
            f"--name must begin with a letter, and have letters, digits, - and _ only, got {name!r}"
        )
    folder, opened = single_run(run), Cohort.open(cohort)
    models = Models.of(folder, console, is_trusted)
    best = models.best.predictor
    check_alike(folder, best, opened)
    of_maps = _classes_of(best)
    classes = list(of_maps.sets)
    beginning = "" if name == VOLUMES else f"{name}_"
    # Regions that overlap are no shares of a whole.
    kinds = ["ml"] if of_maps.overlap else ["ml", "share"]
    columns = [f"{beginning}{each}_{kind}" for kind in kinds for each in classes]
    check_new(opened.folder, name, columns, map(str, opened.manifest.columns))
    group, groups = models.unseen(opened, ensemble)
    seen = group < 0
    group = np.where(seen, len(groups), group)
    groups.append([models.best])
    place = opened.folder.resolve() / DERIVED / f".{name}-unfinished"
    start_or_go_on(place, {
        "cohort": opened.description.hash, "ensemble": ensemble,
        "models": [str(model.folder.resolve()) for several in groups for model in several],
        "times": [(model.folder / "model.safetensors").stat().st_mtime_ns for several in groups for model in several],
    })  # fmt: skip
    tasks = [
        VolumesTask(
            place / f"{rows[0]:06d}.parquet", opened.address, tuple(map(int, rows)),
            tuple(model.folder.resolve() for model in groups[number]), task_of(folder.about.settings),
        )
        for number, rows in batches_of(group, TOGETHER)
    ]  # fmt: skip
    left = [task for task in tasks if not task.part.exists()]
    sizes = {task.part.name: len(task.rows) for task in tasks}
    done = len(opened) - sum(len(task.rows) for task in left)
    for finished in runner(left, bytes_of_a_task(opened, 1 + len(classes))):
        done += sizes[finished]
        if on_progress is not None:
            on_progress(done, len(opened))
    table = pd.concat([pd.read_parquet(task.part) for task in tasks]).set_index("row").sort_index()
    milliliters = table[[f"{each}_ml" for each in classes]].reindex(opened.manifest.index)
    shares = milliliters.div(milliliters.sum(axis=1).replace(0, np.nan), axis=0)
    parts = [milliliters] if of_maps.overlap else [milliliters, shares]
    values = pd.concat(parts, axis=1).set_axis(columns, axis=1)
    made_by = f"the models of {folder.path.resolve().name}"
    if alike := models.best.alike(opened):
        made_by += f" (which know the ids of {alike} people from another data set)"
    description, content = describe_overlay(
        name,
        values,
        seen,
        opened.description.hash,
        made_by=made_by,
        command=" ".join(["brainsweep", *sys.argv[1:]]),
    )

    def classes_of(row: int) -> npt.NDArray[np.int16]:
        chosen = [model.predictor for model in groups[int(group[row])]]
        rows = np.array([row])
        _, _, placed, _ = next(segmented_rows(opened, rows, _said(opened, rows, chosen), stored_only=True))
        return placed.classes_xyz

    page = opened.folder / DERIVED / name / "quality.html"
    with writing_to(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
    write_derived_page(opened, description, values, seen, classes_of, page)
    write_overlay(opened.folder, description, content)
    shutil.rmtree(place)
    return description, page


def _said(cohort: Cohort, rows: npt.NDArray[np.int64], predictors: Sequence[Predictor]) -> Predicted:
    channels = [cohort.description.channels.index(channel) for channel in predictors[0].channels]
    return mean_answer(predictors, cohort.read(rows)[:, channels])


def _classes_of(predictor: Predictor) -> LabelSets:
    """The classes of a segmentation.

    Raises:
        UserError: the task gives none.
    """
    classes = find_task(predictor.settings.task).segmented_classes(predictor.settings)
    if classes is None:
        raise UserError(
            f"--volumes needs a run that segments (--task segmentation), and this one is of {predictor.settings.task}"
        )
    return classes


def start_or_go_on(place: Path, request: dict[str, object]) -> None:
    """Keep what an interrupted call of the same request has done; remove that of another one."""
    digest = fingerprint(request)
    with writing_to(place):
        try:
            before = json.loads((place / REQUEST).read_text())
        except (OSError, ValueError):
            before = None
        if before != digest:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / REQUEST, json.dumps(digest))


def bytes_of_a_task(cohort: Cohort, classes: int) -> int:
    """An upper estimate of the memory that a task needs beside its process."""
    grid, own = math.prod(cohort.description.shape), 0
    if "source_shape" in cohort.manifest:
        shapes = [shape[:3] for shape in cohort.manifest["source_shape"] if shape is not None]
        own = max((math.prod(int(side) for side in shape) for shape in shapes), default=0)
    # Float32 of all classes three times on the own voxels; on the grid the network's features, about 64 of them.
    return 4 * (3 * classes * own + 64 * TOGETHER * grid)


@functools.lru_cache(maxsize=8)
def _loaded(folder: Path, task: str) -> Predictor:
    return load_predictor(folder, task)


@functools.lru_cache(maxsize=2)
def _opened(cohort: str) -> Cohort:
    return Cohort.open(cohort)
