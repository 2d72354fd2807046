"""The held-out subjects and their predicted ages."""

from __future__ import annotations

import pandas as pd

from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

MOST_SITES = 8
LONGEST_NAME = 18
NO_SITE = "no site"


def held_out(record: RunRecord) -> pd.DataFrame:
    """One row per held-out subject: subject, age, site, predicted (mean over refits of the winner), least, most, gap.

    The gap is predicted - age. All numbers are in years.

    Raises:
        NothingToShow: the winner has no predictions of held-out subjects.
    """
    winner = record.predictions[record.predictions["method"] == WINNER].dropna(subset=["age", "predicted"])
    if winner.empty:
        raise NothingToShow("the winner has not been tried on the held-out subjects")
    subjects = winner.groupby("subject", as_index=False).agg(
        age=("age", "first"),
        site=("site", "first"),
        predicted=("predicted", "mean"),
        least=("predicted", "min"),
        most=("predicted", "max"),
    )
    return subjects.assign(site=site_names(subjects["site"]), gap=subjects["predicted"] - subjects["age"])


def site_names(sites: pd.Series) -> pd.Series:
    """The names of sites, at most MOST_SITES: the smallest sites become 'other sites'."""
    names = sites.fillna("").astype(str).replace("", NO_SITE).map(_shortened)
    largest = names.value_counts().index
    kept = largest if len(largest) <= MOST_SITES else largest[: MOST_SITES - 1]
    return names.where(names.isin(kept), "other sites")


def _shortened(name: str) -> str:
    """A long name keeps its end, because numbered sites differ there."""
    return name if len(name) <= LONGEST_NAME else f"{name[:9]}…{name[-6:]}"
