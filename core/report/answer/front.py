"""Several objectives at once: the trials that no other trial beats in all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from core.report.answer.describe import describe
from core.report.answer.record import RunRecord
from core.report.answer.tables import mean_and_sd


def completed_with_objectives(record: RunRecord) -> pd.DataFrame:
    """The completed trials inside the space, with one column per objective of the search, all finite."""
    trials = record.trials[record.trials["state"] == "COMPLETE"]
    if "outside" in trials:
        trials = trials[~trials["outside"].fillna(False).astype(bool)]
    first, *others = record.objectives
    named = trials.assign(**{first: trials["value"]})
    absent = [name for name in others if name not in named]
    return named.assign(**dict.fromkeys(absent, np.nan)).dropna(subset=record.objectives)


def pareto_front(record: RunRecord) -> pd.DataFrame:
    """The completed trials that no other trial beats, by being at least as good in every objective and better in one.

    In the order of the first objective. Empty if the search had one objective.
    """
    trials = completed_with_objectives(record)
    if len(record.objectives) < 2 or trials.empty:
        return trials.head(0)
    metrics = [record.metric(name) for name in record.objectives]
    values_nk = trials[record.objectives].to_numpy(float) * [metric.sign for metric in metrics]
    no_worse_nn = (values_nk[:, None] <= values_nk[None]).all(axis=2)
    better_nn = (values_nk[:, None] < values_nk[None]).any(axis=2)
    is_beaten_n = (no_worse_nn & better_nn).any(axis=0)
    return trials[pd.Series(~is_beaten_n, trials.index)].sort_values(
        by=[*record.objectives, "number"], ascending=[*(metric.better == "low" for metric in metrics), True]
    )


def front_table(record: RunRecord) -> pd.DataFrame:
    """The front as a table: trial, one column per objective with its label, what (the configuration in a few words)."""
    settings = record.searched()
    rows: list[dict[str, Any]] = [
        {
            "trial": int(row["number"]),
            **{_heading(record, name): mean_and_sd(row[name], float("nan")) for name in record.objectives},
            "what": describe({name: row[name] for name in settings}, most=7),
        }
        for _, row in pareto_front(record).iterrows()
    ]
    return pd.DataFrame(rows)


def _heading(record: RunRecord, name: str) -> str:
    metric = record.metric(name)
    return f"{metric.label}{', high is better' if metric.better == 'high' else ''}"


def front_in_words(record: RunRecord) -> str:
    """The front in words, for people who cannot see the figure."""
    front = pareto_front(record)
    named = "; ".join(
        f"trial {int(row['number'])}: "
        + ", ".join(f"{record.metric(name).label} {row[name]:.3g}" for name in record.objectives)
        for _, row in front.iterrows()
    )
    return (
        f"{len(front)} of {len(completed_with_objectives(record))} completed trials are not beaten. {named}."
    )
