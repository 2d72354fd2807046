"""`explain`: which parts of a volume the best model of a run uses, on people whom it does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from rich.console import Console

from core.errors import UserError
from core.explaining import Explained, explain
from core.files.pictures import write_pictures
from core.files.writing import replacing, writing_to
from core.run_names import EXPLAINED
from core.volumes.cohort.reader import Cohort
from distributed.commands.evaluating import check_alike
from distributed.commands.models import Models, single_run


def explain_run(
    run: Path,
    cohort: str | Path,
    people: int,
    cube_mm: float,
    *,
    console: Console | None = None,
    is_trusted: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Explained, Path]:
    """Make mean occlusion maps and write them into RUN/explained: maps.npz for the report, and NIfTI files.

    Args:
        run: folder of the run.
        cohort: folder or URL of a cohort; people whom the model was trained on are left out.
        people: how many at most, evenly over the rows.
        cube_mm: side of what is hidden.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.
        on_progress: hears of the scans.

    Raises:
        UserError: no model, a cohort that it cannot see, or nobody whom it does not know.
    """
    folder = single_run(run)
    best = Models.of(folder, console, is_trusted).best
    opened = Cohort.open(cohort)
    check_alike(folder, best.predictor, opened)
    new = np.flatnonzero(~best.knows(opened))
    if not new.size:
        raise UserError(
            f"the model was trained on everyone in {opened.location}; give a cohort with other people"
        )
    rows = new[np.unique(np.linspace(0, len(new) - 1, min(people, len(new))).round().astype(int))]
    channels = [opened.description.channels.index(channel) for channel in best.predictor.channels]
    volumes = [opened.read([int(row)])[0, channels] for row in rows]
    side = max(1, math.floor(cube_mm / min(opened.description.edges) + 0.5))
    found = explain(best.predictor, volumes, side, on_progress)
    place = folder.path / EXPLAINED
    with writing_to(place):
        place.mkdir(exist_ok=True)
        write_pictures(
            place / "maps.npz",
            {
                "brain": found.brain, "trained": found.trained, "random": found.random, "difference": found.difference,
                "what": np.array(found.what), "likeness": np.array(found.likeness), "scans": np.array(found.scans),
                "cube_mm": np.array(side * min(opened.description.edges)),
            },
        )  # fmt: skip
        affine = np.asarray(opened.description.affine)
        for name in ("brain", "trained", "random", "difference"):
            _write_nifti(place / f"{name}.nii.gz", getattr(found, name), affine)
    return found, place


def _write_nifti(path: Path, values: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]) -> None:
    with replacing(path) as temporary:
        # nibabel looks at the ending.
        whole = temporary.with_name(f"{temporary.name}.nii.gz")
        nib.save(nib.Nifti1Image(values, affine), whole)
        whole.rename(temporary)
