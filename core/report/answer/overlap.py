"""The held-out people of a segmentation: overlap and volumes class by class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.files.pictures import pictures_of, read_pictures
from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import REFITS, WINNER, WINNER_FOLDER

DICE, PREDICTED, REFERENCE = "dice_", "ml_", "reference_ml_"
"""What columns of predictions begin with; behind it stands the name of a class."""
PLANES = ("sagittal", "coronal", "axial")
RANKS = ("best", "median", "worst")


class Case(NamedTuple):
    """A held-out case in three planes, each (3, …): the image, the predicted and the true places of classes."""

    rank: str
    """Empty if there are fewer than three cases."""
    subject: str
    dice: float
    planes: tuple[npt.NDArray[np.generic], ...]


def typical_cases(record: RunRecord) -> list[Case]:
    """The best, the median and the worst held-out case of the winner's first refit that kept them."""
    files = sorted(
        (record.folder / REFITS / WINNER_FOLDER).glob(pictures_of(Path(), 0).name.replace("0", "*"))
    )
    if not files:
        raise NothingToShow("the winner's refit has kept no pictures of held-out people")
    try:
        kept = read_pictures(files[0])
        subjects, values = kept["subject"].astype(str), kept["dice"].astype(float)
        ranks = RANKS if len(subjects) == len(RANKS) else [""] * len(subjects)
        return [
            Case(rank, str(subject), float(value), tuple(kept[name][number] for name in PLANES))
            for number, (rank, subject, value) in enumerate(zip(ranks, subjects, values, strict=True))
        ]
    except (OSError, ValueError, LookupError):
        raise NothingToShow(f"{files[0].name} is damaged") from None


def cases_in_words(record: RunRecord) -> str:
    """What the figure of the cases shows."""
    try:
        cases = typical_cases(record)
    except NothingToShow as reason:
        return str(reason)
    said = [f"{case.rank} {case.subject} {case.dice:.2f}".strip() for case in cases]
    return f"Held-out cases and their Dice: {', '.join(said)}."


def cases_of(record: RunRecord) -> pd.DataFrame:
    """One row per held-out person: the mean over scans and refits of the winner."""
    table = record.predictions[record.predictions["method"] == WINNER]
    if table.empty or not any(str(name).startswith(DICE) for name in table):
        raise NothingToShow("there are no predictions of the winner for held-out people")
    return table.groupby("subject").mean(numeric_only=True)


def classes_of(cases: pd.DataFrame) -> list[str]:
    """The names of the classes."""
    return [str(name).removeprefix(DICE) for name in cases if str(name).startswith(DICE)]


def overlap_in_words(record: RunRecord) -> str:
    """What the figure of the overlap shows."""
    try:
        cases = cases_of(record)
    except NothingToShow as reason:
        return str(reason)
    said = []
    for name in classes_of(cases):
        values = cases[f"{DICE}{name}"].dropna()
        middle = (
            "in neither map of anybody" if values.empty else f"median {values.median():.2f} of {len(values)}"
        )
        said.append(f"{name} {middle}")
    return f"Dice of held-out people: {', '.join(said)}."


def agreement_in_words(record: RunRecord) -> str:
    """What the figure of the volumes shows."""
    try:
        cases = cases_of(record)
    except NothingToShow as reason:
        return str(reason)
    said = [
        f"{name} {(cases[f'{PREDICTED}{name}'] - cases[f'{REFERENCE}{name}']).mean():+.1f} mL"
        for name in classes_of(cases)
    ]
    return f"Mean difference of volumes, predicted minus reference: {', '.join(said)}."
