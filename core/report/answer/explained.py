"""Which parts of a volume the winner uses, as `explain` has written it into the run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.files.pictures import read_pictures
from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import EXPLAINED

ALIKE = 0.5
"""The correlation of the maps of trained and random weights from which on they are called alike."""


class Maps(NamedTuple):
    """Mean maps over people, (X, Y, Z) each; see `core.explaining.Explained`."""

    brain: npt.NDArray[np.generic]
    trained: npt.NDArray[np.generic]
    random: npt.NDArray[np.generic]
    difference: npt.NDArray[np.generic]
    what: str
    likeness: float
    scans: int
    cube_mm: float


def has_maps(record: RunRecord) -> bool:
    """Whether `explain` was run."""
    return (record.folder / EXPLAINED / "maps.npz").exists()


def explained_maps(record: RunRecord) -> Maps:
    """The maps of the run."""
    path = record.folder / EXPLAINED / "maps.npz"
    try:
        kept = read_pictures(path)
        return Maps(
            kept["brain"], kept["trained"], kept["random"], kept["difference"], str(kept["what"]),
            float(kept["likeness"]), int(kept["scans"]), float(kept["cube_mm"]),
        )  # fmt: skip
    except (OSError, ValueError, LookupError):
        raise NothingToShow(f"{path.name} is damaged; run explain again") from None


def explained_in_words(record: RunRecord) -> str:
    """What the figure shows, and whether to believe it."""
    try:
        maps = explained_maps(record)
    except NothingToShow as reason:
        return str(reason)
    place = np.unravel_index(int(np.argmax(maps.trained)), maps.trained.shape)
    sure = (
        "Random weights give nearly the same map, so it says little about what was learnt."
        if maps.likeness >= ALIKE
        else "Random weights give another map."
    )
    return (
        f"Mean {maps.what} over {maps.scans} scans when a cube of {maps.cube_mm:g} mm is hidden; most at voxel "
        f"{', '.join(str(int(at)) for at in place)}. Correlation with random weights {maps.likeness:+.2f}. {sure}"
    )
