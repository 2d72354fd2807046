"""The held-out people of age by tissue volumes: what their volumes and ages are."""

from __future__ import annotations

import pandas as pd

from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

VOLUME = "volume_"
"""What the columns of predictions with volumes begin with."""
FEWEST = 5


def people_with_volumes(record: RunRecord) -> pd.DataFrame:
    """One row per held-out person: truth, predicted, and the volumes by name; the mean over scans and refits."""
    table = record.predictions[record.predictions["method"] == WINNER]
    names = [str(name) for name in table if str(name).startswith(VOLUME)]
    people = table.groupby("subject")[["truth", "predicted", *names]].mean(numeric_only=True).dropna()
    if not names or len(people) < FEWEST:
        raise NothingToShow("there are too few held-out people with volumes")
    return people.rename(columns={name: name.removeprefix(VOLUME).replace("_", " ") for name in names})


def volumes_in_words(record: RunRecord) -> str:
    """What the figure of volumes and ages shows."""
    try:
        people = people_with_volumes(record)
    except NothingToShow as reason:
        return str(reason)
    said = [f"{name} {people[name].corr(people['truth']):+.2f}" for name in people.columns[2:]]
    return f"Correlation with true age over {len(people)} held-out people: {', '.join(said)}."
