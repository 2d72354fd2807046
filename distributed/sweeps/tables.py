"""The tables of a run, made from its study and the files of its trials; and the last entries of its run.json."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from core.errors import UserError
from core.evaluation.calibration import calibrate
from core.evaluation.regression import median_age, regression_metrics
from core.evaluation.splits import Splits
from core.files.tables import read_table, write_table
from core.inference import save_calibration
from core.objectives import COST
from core.report.answer.record import OPTIONAL_TABLES, TABLES, TRIAL_COLUMNS, trial_row
from core.run_access import read_access
from core.run_description import BestTrial
from core.run_names import MEDIAN, REFITTED
from core.volumes.cohort.reader import Cohort
from distributed.run.assignment import read_progress, trial_name
from distributed.run.folder import RunFolder, now
from distributed.search.study import ReadProgress, best_trial


def write_tables(folder: RunFolder, study: optuna.Study, read: ReadProgress) -> None:
    """Write the tables of the trials of a run, from its study and from the progress.json of each trial."""
    trials = study.get_trials(deepcopy=False)
    progress = {trial.number: read(trial) for trial in trials}
    rows = [trial_row(trial, len(progress[trial.number]["history"])) for trial in trials]
    table = pd.DataFrame(rows, columns=None if rows else TRIAL_COLUMNS)
    write_table(table, folder.path / "trials.csv")
    text = {name: table[name].astype(object).where(table[name].notna(), None) for name in ("reason", "label")}
    table.assign(**text).to_parquet(folder.path / "trials.parquet", index=False)
    cells = [{"number": number, **row} for number, made in progress.items() for row in made["cells"]]
    write_table(_with_header(cells, "cells"), folder.path / "cells.csv")
    history = [{"number": number, **row} for number, made in progress.items() for row in made["history"]]
    write_table(_with_header(history, "history"), folder.path / "history.csv")


def _with_header(rows: list[dict[str, Any]], name: str) -> pd.DataFrame:
    """The table of `rows`; without rows it has its columns all the same."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(TABLES[name][0]))


def write_baseline(folder: RunFolder, study: optuna.Study, read: ReadProgress) -> None:
    """Write baseline.csv: the trials of the L1 baseline, with the columns of trials.csv."""
    rows = [trial_row(trial, len(read(trial)["history"])) for trial in study.get_trials(deepcopy=False)]
    write_table(pd.DataFrame(rows, columns=None if rows else TRIAL_COLUMNS), folder.path / "baseline.csv")


def accelerator_seconds(
    study: optuna.Study,
    devices: float,
    read: ReadProgress,
    named: Callable[[int], str] = trial_name,
) -> dict[str, float]:
    """The accelerator-seconds of each trial so far, by its name: as recorded at its end, or the sum of its epochs.

    Args:
        study: of the trials.
        devices: of a slot.
        read: see `progress_reader`.
        named: the name of a trial, by its number.
    """
    used = {}
    for trial in study.get_trials(deepcopy=False):
        epochs = read(trial)["history"]
        so_far = sum(row.get("spent_seconds", 0.0) for row in epochs) * devices
        used[named(trial.number)] = trial.user_attrs.get(COST, so_far)
    return used


def write_access(folder: RunFolder, cohort: Cohort) -> None:
    """Write access.csv: when the voxels of each scan were first and last used, for every fold (-1: refits)."""
    used = read_access(folder.access)
    subjects = cohort.manifest["subject"].iloc[used["row"].astype(int)].to_numpy()
    first, last = (pd.to_datetime(used[name].astype(float), unit="s", utc=True) for name in ("first", "last"))
    table = pd.DataFrame(
        {
            "subject": subjects,
            "first_read": first,
            "fold": used["fold"],
            "last_read": last,
            "uses": used["uses"],
        }
    )
    write_table(table, folder.path / "access.csv")


def write_confirmed(folder: RunFolder) -> None:
    """Write confirmed.csv: winner and published again on the folds of the search, with seeds that it never used."""
    rows = [
        {"method": method, **cell}
        for name, method in REFITTED.items()
        for cell in read_progress(folder.confirmed(name))["cells"]
    ]
    if rows:
        write_table(pd.DataFrame(rows), folder.path / "confirmed.csv")


def write_holdout(folder: RunFolder, cohort: Cohort, splits: Splits) -> None:
    """Write holdout.csv and predictions.csv from the finished refits, and add the median predictor."""
    made = {name: read_progress(folder.refit(name))["cells"] for name in REFITTED}
    if not any(made.values()):
        return
    subjects = cohort.manifest["subject"]
    sizes = {
        "n_train": subjects.iloc[splits.development].nunique(),
        "n_holdout": subjects.iloc[splits.holdout].nunique(),
    }
    median = _median_predictions(cohort, splits)
    metrics = regression_metrics(
        median["predicted"].to_numpy(), median["age"].to_numpy(), median["subject"].to_numpy(str)
    )
    rows: list[dict[str, object]] = [
        {"method": MEDIAN, "seed": 0, "mae": metrics["mae"], "r2": metrics["r2"], **sizes}
    ]
    predictions = [median.assign(method=MEDIAN, seed=0)]
    for name, cells in made.items():
        for cell in cells:
            measured = {key: cell[key] for key in ("seed", "mae", "r2", "site_balanced_accuracy")}
            rows.append({"method": REFITTED[name], **measured, **sizes})
            table = read_table(folder.refit(name) / f"predictions-{int(cell['seed'])}.csv")
            predictions.append(table.assign(method=REFITTED[name], seed=cell["seed"]))
    write_table(pd.DataFrame(rows), folder.path / "holdout.csv")
    write_table(pd.concat(predictions), folder.path / "predictions.csv")


def _median_predictions(cohort: Cohort, splits: Splits) -> pd.DataFrame:
    """The held-out subjects; the predicted age is the median age of the development subjects."""
    held_out = cohort.manifest.iloc[splits.holdout][["subject", "age", "site"]]
    trained = cohort.manifest.iloc[splits.development]
    return held_out.assign(
        predicted=median_age(trained["age"].to_numpy(float), trained["subject"].to_numpy(str))
    )


def calibrate_best(folder: RunFolder, trial: Path, source: str) -> None:
    """Write best/calibration.json from the out-of-fold predictions of `trial`, which has the settings of the model.

    They are predictions for development subjects only, so the hold-out has no part in it. A trial of version 0.2 has
    kept no predictions; then there is no calibration.
    """
    tables = [read_table(path) for path in sorted(trial.glob("predictions-*-*.csv"))]
    if tables:
        together = pd.concat(tables, ignore_index=True)
        predicted, ages = (together[name].to_numpy(float) for name in ("predicted", "age"))
        cells = f"{len(tables)} cell{'' if len(tables) == 1 else 's'}"
        found = calibrate(predicted, ages, together["subject"].to_numpy(str), f"{source}, {cells}")
        save_calibration(folder.path / "best", found)


def count_rows(folder: RunFolder) -> dict[str, int]:
    """The lines of every table of a run that can be read, by name."""
    rows = {}
    for name in (*TABLES, *OPTIONAL_TABLES):
        # A damaged table of an earlier session does not hold up the end of this one; the page names it.
        with contextlib.suppress(FileNotFoundError, UserError):
            rows[name] = len(read_table(folder.path / f"{name}.csv"))
    return rows


def finish(folder: RunFolder, study: optuna.Study | None = None, ended: str | None = None) -> None:
    """Record in run.json the end, the duration (seconds), the best trial, and why the search `ended` early."""
    best = best_trial(study) if study else None
    started = datetime.datetime.fromisoformat(folder.about.created).timestamp()
    folder.update(
        finished=now(),
        # A training run has no page.
        concluded=study is None,
        seconds=time.time() - started,
        best=BestTrial(number=best.number, value=best.values[0]) if best else None,
        ended=ended,
    )
