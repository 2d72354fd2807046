"""The held-out people of a segmentation: overlap and volumes class by class."""

from __future__ import annotations

import pandas as pd

from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

DICE, PREDICTED, REFERENCE = "dice_", "ml_", "reference_ml_"
"""What columns of predictions begin with; behind it stands the name of a class."""


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
