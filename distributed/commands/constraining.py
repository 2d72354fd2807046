"""`derive --constraint`: maps of clusters of like contrast, as overlays of a cohort; in parallel, and resumable."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError
from core.files.writing import replacing, writing_to
from core.lookup import did_you_mean
from core.report.quality.constraint import write_constraint_page
from core.volumes.cohort.overlay import (
    DERIVED,
    MAPS,
    OverlayDescription,
    check_new,
    describe_overlay,
    write_overlay,
)
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.shards import checksum, map_column
from core.volumes.cohort.writer import CohortWriter
from core.volumes.derive.constraint import ConstraintSettings, constraint_map
from distributed.commands.deriving import TOGETHER, start_or_go_on
from distributed.commands.predicting import OnProgress


@dataclass(frozen=True)
class ConstraintTask:
    """Some rows of a cohort. It can be pickled."""

    part: Path
    """The file that the maps are kept in."""
    cohort: str
    rows: tuple[int, ...]
    settings: ConstraintSettings


Runner = Callable[[Sequence[ConstraintTask], int], Iterator[str]]
"""Runs `make_maps` for each task, in any order and any process, and yields what it returns. It is told how many bytes a
task needs beside its process."""


def one_after_another(tasks: Sequence[ConstraintTask], memory: int) -> Iterator[str]:
    """Run the tasks in this process."""
    return map(make_maps, tasks)


def make_maps(task: ConstraintTask) -> str:
    """Make the maps of the rows of a task, and keep them; returns the name of the file."""
    cohort, rows = _opened(task.cohort), list(task.rows)
    channels = [cohort.description.channels.index(name) for name in task.settings.contrasts]
    made = []
    for row in rows:
        try:
            made.append(constraint_map(cohort.read([row])[0][channels], task.settings))
        except UserError as error:
            raise UserError(f"{cohort.manifest['subject'].iloc[row]}: {error}") from None
    with writing_to(task.part.parent), replacing(task.part) as path, path.open("wb") as file:
        np.savez_compressed(file, maps=np.stack(made))
    return task.part.name


def derive_constraint(
    cohort: Path,
    name: str,
    settings: ConstraintSettings,
    *,
    runner: Runner = one_after_another,
    on_progress: OnProgress | None = None,
) -> tuple[OverlayDescription, Path]:
    """Add a constraint map to every scan of a cohort, each from its own contrasts alone.

    What is done is kept, so that the same call after an interruption goes on.

    Args:
        cohort: its folder.
        name: of the overlay, and of the map.
        settings: how.
        runner: runs the tasks.
        on_progress: hears of the scans.

    Returns:
        What was written, and its quality page.

    Raises:
        UserError: a contrast that the cohort does not have, a scan without enough brain, or a name that is taken.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise UserError(
            f"--constraint must begin with a letter, and have letters, digits, - and _ only, got {name!r}"
        )
    opened = Cohort.open(cohort)
    known = opened.description.channels
    for contrast in settings.contrasts:
        if contrast not in known:
            raise UserError(
                f"--contrasts: the cohort has no channel '{contrast}'; {did_you_mean(contrast, known)}"
            )
    settings = settings.model_copy(update={"contrasts": settings.contrasts or known})
    if name in opened.description.map_names:
        raise UserError(f"the cohort has a map {name} already; give --constraint another name")
    column = f"{map_column(name)}_checksum"
    made_by = (
        f"total variation ({settings.tv:g}) and k-means ({settings.clusters} clusters, seed {settings.seed}) of "
        f"{min(settings.components, len(settings.contrasts))} principal components of {', '.join(settings.contrasts)}"
    )
    there = opened.overlays.get(name)
    if there is not None and there.description.made_by == made_by:
        # Several maps of one command are made one after another, and a stop may lie between them.
        return there.description, opened.folder / DERIVED / name / "quality.html"
    if there is not None:
        raise UserError(
            f"{opened.folder / DERIVED / name} is there already, made by {there.description.made_by}; give "
            "--constraint another name, or delete it"
        )
    check_new(opened.folder, name, [column], map(str, opened.manifest.columns))
    place = opened.folder.resolve() / DERIVED / f".{name}-unfinished"
    start_or_go_on(place, {"cohort": opened.description.hash, "settings": settings.model_dump(mode="json")})
    rows = np.arange(len(opened))
    tasks = [
        ConstraintTask(place / f"{several[0]:06d}.npz", opened.address, tuple(map(int, several)), settings)
        for several in np.split(rows, np.arange(TOGETHER, len(rows), TOGETHER))
    ]
    left = [task for task in tasks if not task.part.exists()]
    sizes, done = (
        {task.part.name: len(task.rows) for task in tasks},
        len(rows) - sum(len(task.rows) for task in left),
    )
    # Components in double precision, and what total variation keeps of one of them.
    voxels = int(np.prod(opened.description.shape))
    for finished in runner(left, voxels * 8 * (4 * settings.components + 16)):
        done += sizes[finished]
        if on_progress is not None:
            on_progress(done, len(rows))
    checksums = _write_maps(opened, name, tasks)
    page = opened.folder / DERIVED / name / "quality.html"
    description, content = describe_overlay(
        name, pd.DataFrame({column: checksums}), np.zeros(len(rows), dtype=bool), opened.description.hash,
        made_by=made_by, command=" ".join(["brainsweep", *sys.argv[1:]]), maps=(name,),
    )  # fmt: skip
    write_overlay(opened.folder, description, content)
    write_constraint_page(Cohort.open(cohort), description, settings, page)
    shutil.rmtree(place)
    return description, page


def _write_maps(cohort: Cohort, name: str, tasks: Sequence[ConstraintTask]) -> list[str]:
    """The maps of all rows as a cohort of their own, a part at a time; their checksums."""
    place = cohort.folder / DERIVED / name / MAPS
    # What a stop left there is made again from the parts.
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    about, checksums = cohort.description, list[str]()
    writer = CohortWriter(
        place, name=name, channels=(name,), shape=about.shape, spacing=about.spacing, affine=np.asarray(about.affine),
        dtype="int16", storage=about.storage, compression=about.compression, source=about.name,
        synthetic=about.synthetic,
    )  # fmt: skip
    with writer:
        for task in tasks:
            for row, classes in zip(task.rows, _read_part(task.part), strict=True):
                scan = cohort.manifest.iloc[row]
                checksums.append(checksum(classes))
                writer.add(
                    classes[None].astype(np.float32),
                    subject=str(scan["subject"]),
                    session=str(scan["session"]),
                )
    return checksums


def _read_part(path: Path) -> npt.NDArray[np.int16]:
    with np.load(path, allow_pickle=False) as kept:
        maps: npt.NDArray[np.int16] = kept["maps"]
        return maps


@functools.lru_cache(maxsize=2)
def _opened(address: str) -> Cohort:
    return Cohort.open(address)
