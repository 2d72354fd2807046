"""The tables of a run, made from its study and what its trials have left; and how its run.json is closed."""

from __future__ import annotations

import datetime
import math
import time
from typing import Any

import optuna
import pandas as pd

from core.evaluation.regression import regression_metrics
from core.evaluation.splits import Splits
from core.objectives import COST, OBJECTIVES
from core.report.answer.record import reported
from core.volumes.cohort.reader import Cohort
from distributed.run.access import read_access
from distributed.run.assignment import trial_name
from distributed.run.folder import RunFolder, _now, read_progress
from distributed.search.study import best_trial

METHODS = {"winner": "search winner", "published": "published", "l1": "L1 baseline"}
"""The folders under `refits/`, and what their rows are called in the tables."""
MEDIAN = "training median"


def write_tables(folder: RunFolder, study: optuna.Study) -> None:
    """(Re)make the tables of a run from its study and its trials' progress files."""
    trials = study.get_trials(deepcopy=False)
    progress = {trial.number: read_progress(folder.trial(trial_name(trial.number))) for trial in trials}
    table = pd.DataFrame([_trial_row(trial, progress[trial.number]) for trial in trials])
    table.to_csv(folder.path / "trials.csv", index=False)
    table.astype({"reason": str, "label": str}).to_parquet(folder.path / "trials.parquet", index=False)
    for name, key in (("cells", "cells"), ("history", "history")):
        rows = [{"number": number} | row for number, made in progress.items() for row in made[key]]
        pd.DataFrame(rows).to_csv(folder.path / f"{name}.csv", index=False)


def accelerator_seconds(folder: RunFolder, study: optuna.Study, devices: float) -> dict[str, float]:
    """What each trial of the run has used so far, by its name: as recorded at its end, else by its epochs."""
    used = {}
    for trial in study.get_trials(deepcopy=False):
        name = trial_name(trial.number)
        epochs = read_progress(folder.trial(name))["history"]
        so_far = sum(row.get("spent_seconds", 0.0) for row in epochs) * devices
        used[name] = trial.user_attrs.get(COST, so_far)
    return used


def write_access(folder: RunFolder, cohort: Cohort) -> None:
    """access.csv: when the voxels of each subject were first used, and for which fold (-1: a refit)."""
    first = read_access(folder.access)
    subjects = cohort.manifest["subject"].iloc[first["row"].astype(int)].to_numpy()
    when = pd.to_datetime(first["time"].astype(float), unit="s", utc=True)
    table = pd.DataFrame({"subject": subjects, "first_read": when, "fold": first["fold"]})
    table.to_csv(folder.path / "access.csv", index=False)


def write_confirmed(folder: RunFolder) -> None:
    """confirmed.csv: winner and published on the search's folds again, with seeds that it never used."""
    rows = [
        {"method": METHODS[method]} | cell
        for method in METHODS
        for cell in read_progress(folder.confirmed(method))["cells"]
    ]
    if rows:
        pd.DataFrame(rows).to_csv(folder.path / "confirmed.csv", index=False)


def write_holdout(folder: RunFolder, cohort: Cohort, splits: Splits) -> None:
    """holdout.csv and predictions.csv from the refits that are there, with the median predictor beside them."""
    made = {method: read_progress(folder.refit(method))["cells"] for method in METHODS}
    if not any(made.values()):
        return
    sizes = {"n_train": len(splits.development), "n_holdout": len(splits.holdout)}
    median = _median_predictions(cohort, splits)
    metrics = regression_metrics(median["predicted"].to_numpy(), median["age"].to_numpy())
    rows = [{"method": MEDIAN, "seed": 0, "mae": metrics["mae"], "r2": metrics["r2"], **sizes}]
    predictions = [median.assign(method=MEDIAN, seed=0)]
    for method, cells in made.items():
        for cell in cells:
            measured = {key: cell[key] for key in ("seed", "mae", "r2", "site_balanced_accuracy")}
            rows.append({"method": METHODS[method], **measured, **sizes})
            table = pd.read_csv(
                folder.refit(method) / f"predictions-{cell['seed']}.csv", dtype={"subject": str}
            )
            predictions.append(table.assign(method=METHODS[method], seed=cell["seed"]))
    pd.DataFrame(rows).to_csv(folder.path / "holdout.csv", index=False)
    pd.concat(predictions).to_csv(folder.path / "predictions.csv", index=False)


def _median_predictions(cohort: Cohort, splits: Splits) -> pd.DataFrame:
    """The held-out subjects, each predicted to be as old as the median development subject."""
    held_out = cohort.manifest.iloc[splits.holdout][["subject", "age", "site"]]
    return held_out.assign(predicted=cohort.manifest["age"].iloc[splits.development].median())


def finish(folder: RunFolder, study: optuna.Study | None = None, ended: str | None = None) -> None:
    """Close run.json: when, how long, which trial was best, and why the search `ended` before its last trial."""
    about = folder.about
    best = best_trial(study) if study else None
    started = datetime.datetime.fromisoformat(about["created"]).timestamp()
    folder.update(
        finished=_now(),
        seconds=time.time() - started,
        best={"number": best.number, "value": best.values[0]} if best else None,
        ended=ended,
    )


def _trial_row(trial: optuna.trial.FrozenTrial, progress: dict[str, Any]) -> dict[str, Any]:
    attributes = trial.user_attrs
    history = progress["history"]
    return {
        "number": trial.number,
        "label": attributes.get("label"),
        "state": trial.state.name,
        "value": trial.values[0] if trial.values else _last(reported(trial)),
        "sd": attributes.get("sd"),
        "n": attributes.get("n"),
        "epochs": len(history),
        "seconds": attributes.get("seconds"),
        "reason": attributes.get("reason"),
        "outside": "outside" in attributes,
        **{name: attributes.get(name, math.nan) for name in OBJECTIVES},
        **(trial.params or attributes.get("outside", {})),
    }


def _last(values: dict[int, float]) -> float:
    return values[max(values)] if values else math.nan
