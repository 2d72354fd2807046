"""The held-out subjects and their predictions; what is known of the people of a cohort, in words."""

from __future__ import annotations

import pandas as pd

from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

MOST_SITES = 8
LONGEST_NAME = 18
NO_SITE = "no site"


def held_out(record: RunRecord) -> pd.DataFrame:
    """One row per held-out subject: subject, truth, site, predicted (mean over refits of the winner), least, most, gap.

    For tasks that predict a number; the gap is predicted - truth, in the unit of the truth.

    Raises:
        NothingToShow: the winner has no predictions of held-out subjects.
    """
    winner = record.predictions[record.predictions["method"] == WINNER].dropna(subset=["truth", "predicted"])
    if winner.empty:
        raise NothingToShow("the winner has not been tried on the held-out subjects")
    subjects = winner.groupby("subject", as_index=False).agg(
        truth=("truth", "first"),
        site=("site", "first"),
        predicted=("predicted", "mean"),
        least=("predicted", "min"),
        most=("predicted", "max"),
    )
    return subjects.assign(site=site_names(subjects["site"]), gap=subjects["predicted"] - subjects["truth"])


def are_numbers(truths: pd.Series) -> bool:
    """Whether the truths of a cohort are numbers, such as ages; otherwise they are names of classes."""
    return pd.api.types.is_numeric_dtype(truths)


def truths_in_words(truths: pd.Series, unit: str, digits: int = 0) -> str:
    """`20 to 80 years` of numbers, `F 19, M 15` of names; empty if none is known."""
    known = truths[truths.notna() & (truths.astype(str) != "")]
    if known.empty:
        return ""
    if are_numbers(truths):
        return f"{known.min():.{digits}f} to {known.max():.{digits}f} {unit}".strip()
    return ", ".join(
        f"{name} {number}" for name, number in known.astype(str).value_counts().sort_index().items()
    )


def site_names(sites: pd.Series) -> pd.Series:
    """The names of sites, at most MOST_SITES: the smallest sites become 'other sites'."""
    names = sites.fillna("").astype(str).replace("", NO_SITE).map(_shortened)
    largest = names.value_counts().index
    kept = largest if len(largest) <= MOST_SITES else largest[: MOST_SITES - 1]
    return names.where(names.isin(kept), "other sites")


def _shortened(name: str) -> str:
    """A long name keeps its end, because numbered sites differ there."""
    return name if len(name) <= LONGEST_NAME else f"{name[:9]}…{name[-6:]}"
