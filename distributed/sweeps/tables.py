"""The tables of a run, made from its study and the files of its trials; and the last entries of its run.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from core.config import resolve
from core.errors import UserError
from core.evaluation.splits import Rows, Splits
from core.files.tables import read_table, write_table
from core.inference import save_calibration
from core.objectives import COST
from core.report.answer.record import (
    OPTIONAL_TABLES,
    TABLES,
    TRIAL_COLUMNS,
    columns_of,
    read_predictions,
    trial_row,
)
from core.run_access import read_access
from core.run_description import BestTrial
from core.run_names import WEIGHTS, WINNER
from core.task_description import TaskDescription
from core.tasks import find_task
from core.tasks.task import Task, is_known, truth_of
from core.volumes.cohort.reader import Cohort
from distributed.run.assignment import HOLDOUT, Cell, read_progress, trial_name
from distributed.run.folder import RunFolder, now
from distributed.search.study import ReadProgress, best_trial
from distributed.training.subjects import with_truth, within_budget


def write_tables(folder: RunFolder, study: optuna.Study, read: ReadProgress) -> None:
    """Write the tables of the trials of a run, from its study and from the progress.json of each trial."""
    trials, of_task = study.get_trials(deepcopy=False), folder.about.task
    progress = {trial.number: read(trial) for trial in trials}
    rows = [trial_row(trial, len(progress[trial.number]["history"]), of_task) for trial in trials]
    table = pd.DataFrame(rows, columns=None if rows else TRIAL_COLUMNS)
    write_table(table, folder.path / "trials.csv")
    text = {name: table[name].astype(object).where(table[name].notna(), None) for name in ("reason", "label")}
    table.assign(**text).to_parquet(folder.path / "trials.parquet", index=False)
    cells = [{"number": number, **row} for number, made in progress.items() for row in made["cells"]]
    write_table(_with_header(cells, "cells", of_task), folder.path / "cells.csv")
    history = [{"number": number, **row} for number, made in progress.items() for row in made["history"]]
    write_table(_with_header(history, "history", of_task), folder.path / "history.csv")


def _with_header(rows: list[dict[str, Any]], name: str, of_task: TaskDescription) -> pd.DataFrame:
    """The table of `rows`; without rows it has its columns all the same."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns_of(name, of_task)))


def write_baseline(folder: RunFolder, study: optuna.Study, read: ReadProgress) -> None:
    """Write baseline.csv: the trials of the baseline, with the columns of trials.csv."""
    of_task = folder.about.task
    rows = [
        trial_row(trial, len(read(trial)["history"]), of_task) for trial in study.get_trials(deepcopy=False)
    ]
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
        for name, method in folder.about.task.refitted.items()
        for cell in read_progress(folder.confirmed(name))["cells"]
    ]
    if rows:
        write_table(pd.DataFrame(rows), folder.path / "confirmed.csv")


def write_holdout(folder: RunFolder, cohort: Cohort, splits: Splits) -> None:
    """Write holdout.csv and predictions.csv from the finished refits, and add what predicts without images."""
    settings = resolve(folder.about.settings)
    task = find_task(settings.task)
    about = folder.about.task
    made = {name: read_progress(folder.refit(name))["cells"] for name in about.refitted}
    if not any(made.values()):
        return
    manifest, labels = cohort.manifest, task.labels(settings, cohort.manifest)
    known = is_known(labels)
    development, held_out = (rows[known[rows]] for rows in (splits.development, splits.holdout))
    subjects, of_task = manifest["subject"], task.describe(settings)
    shown, rows, predictions = of_task.shown, list[dict[str, object]](), list[pd.DataFrame]()
    more, labelled, floor = task.more_labels(settings, manifest), dict[int, Rows](), of_task.floor
    for seed in sorted({int(cell["seed"]) for cells in made.values() for cell in cells}):
        labelled[seed] = within_budget(settings, manifest, development, Cell(HOLDOUT, seed))

    def sizes(seed: int) -> dict[str, object]:
        return {
            "n_train": subjects.iloc[labelled[seed]].nunique(),
            "n_holdout": subjects.iloc[held_out].nunique(),
        }

    # Without a budget all seeds have the same people to learn from.
    for seed in labelled if settings.data.labelled is not None else list(labelled)[:1]:
        both = (truth_of(manifest, labels, rows_, more) for rows_ in (labelled[seed], held_out))
        found = task.floor(settings, *both)
        if found is None or floor is None:
            break
        shown_as = seed if settings.data.labelled is not None else 0
        measured = {name: found.metrics[name] for name in shown if name in found.metrics}
        rows.append({"method": floor.method, "seed": shown_as, **measured, **sizes(seed)})
        scans = {name: manifest[name].to_numpy(str)[held_out] for name in ("subject", "site")}
        table = with_truth(scans, labels[held_out], found.predictions)
        predictions.append(table.assign(method=floor.method, seed=shown_as))
    for name, cells in made.items():
        method = about.refitted[name]
        for cell in cells:
            rows.append(
                {
                    "method": method,
                    "seed": cell["seed"],
                    **{key: cell.get(key, math.nan) for key in shown},
                    **sizes(int(cell["seed"])),
                }
            )
            table = read_predictions(folder.refit(name) / f"predictions-{int(cell['seed'])}.csv")
            predictions.append(table.assign(method=method, seed=cell["seed"]))
    # The best of a start that is the winner itself is not refitted a second time.
    for method in _methods_of_winner(folder, made):
        rows += [row | {"method": method} for row in rows if row["method"] == WINNER]
        predictions += [
            table.assign(method=method) for table in predictions if (table["method"] == WINNER).all()
        ]
    write_table(pd.DataFrame(rows), folder.path / "holdout.csv")
    write_table(pd.concat(predictions), folder.path / "predictions.csv")


def _methods_of_winner(folder: RunFolder, made: Mapping[str, Sequence[object]]) -> list[str]:
    """The best of the start from which the winner begins, if it has no refit of its own."""
    files = sorted(folder.refit("winner").glob("model-*/settings.json"))
    if not files or not made["winner"]:
        return []
    start = json.loads(files[0].read_text())["begin"]["weights"]
    return [
        rival.method
        for rival in folder.about.task.starts
        if rival.changes[WEIGHTS] == start and not made[rival.folder]
    ]


def calibrate_best(folder: RunFolder, task: Task[Any], trial: Path, source: str) -> None:
    """Add to best/ what the out-of-fold predictions of `trial`, which has its settings, say of further ones.

    They are predictions for development subjects only, so the hold-out has no part in it. A trial of version 0.2 has
    kept no predictions; then there is no calibration.
    """
    tables = [read_predictions(path) for path in sorted(trial.glob("predictions-*-*.csv"))]
    if tables:
        cells = f"{len(tables)} cell{'' if len(tables) == 1 else 's'}"
        found = task.calibrate(pd.concat(tables, ignore_index=True), f"{source}, {cells}")
        if found is not None:
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
