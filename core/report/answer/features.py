"""The features of a pre-training as colours, beside the clusters that guided it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.files.pictures import pictures_of, read_pictures
from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import REFITS, WINNER_FOLDER


class Picture(NamedTuple):
    """A slice of a held-out person: image and clusters (X, Y), and features as colours (X, Y, 3)."""

    subject: str
    image: npt.NDArray[np.generic]
    clusters: npt.NDArray[np.generic]
    colours: npt.NDArray[np.generic]


def feature_pictures(record: RunRecord) -> list[Picture]:
    """Those that the winner's first refit has kept."""
    folder = record.folder / REFITS / WINNER_FOLDER
    files = sorted(folder.glob(pictures_of(Path(), 0).name.replace("0", "*")))
    if not files:
        raise NothingToShow("the winner's refit has kept no pictures of held-out people")
    try:
        kept = read_pictures(files[0])
        rows = zip(kept["subject"].astype(str), kept["image"], kept["clusters"], kept["colours"], strict=True)
        return [Picture(str(subject), image, clusters, colours) for subject, image, clusters, colours in rows]
    except (OSError, ValueError, LookupError):
        raise NothingToShow(f"{files[0].name} is damaged") from None


def features_in_words(record: RunRecord) -> str:
    """What the figure shows."""
    try:
        pictures = feature_pictures(record)
    except NothingToShow as reason:
        return str(reason)
    return f"Image, clusters and features as colours of {', '.join(each.subject for each in pictures)}."
