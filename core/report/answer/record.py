"""Read the folder of a run. A run may be unfinished or damaged: what is absent is empty here, and listed by name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from pydantic import ValidationError

from core.errors import UserError
from core.files.tables import read_table
from core.objectives import COST, Metric
from core.run_access import evaluations
from core.run_description import RunDescription, find_cohort
from core.run_names import (
    ACCESS,
    CELLS_DONE,
    JOURNAL,
    LABEL,
    OUTSIDE,
    PUBLISHED,
    REASON,
    RUN_JSON,
    SD,
    SECONDS,
    VALUE_AT,
)
from core.task_description import BEFORE_0_3, BRAIN_AGE, TaskDescription

TRIAL_COLUMNS = ("number", "label", "state", "value", "sd", "n", "epochs", "seconds", "reason")
# Every table of a run: the columns that it has for every task, and what is missing in a report without it.
TABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "trials": (TRIAL_COLUMNS, "the leaderboard"),
    "splits": (("subject", "role"), "who was in which fold and who was held out"),
    "cells": (("number", "fold", "seed", "n"), "the spread over folds and seeds"),
    "history": (
        ("number", "fold", "seed", "epoch", "progress", "loss", "learning_rate", "seconds"),
        "the epochs of every trial",
    ),
    "holdout": (("method", "seed", "n_train", "n_holdout"), "the result on the held-out subjects"),
    "predictions": (
        ("method", "seed", "subject", "truth", "predicted", "error", "site"),
        "the predictions for the held-out subjects",
    ),
}
# Tables that only some runs have.
OPTIONAL_TABLES: dict[str, tuple[str, ...]] = {
    "confirmed": ("method", "fold", "seed", "n"),
    "access": ("subject", "first_read", "fold"),
    "baseline": TRIAL_COLUMNS,
}


def columns_of(name: str, of_task: TaskDescription) -> tuple[str, ...]:
    """The columns of a table of a run: those that it has for every task, and those of this task."""
    columns = OPTIONAL_TABLES[name] if name in OPTIONAL_TABLES else TABLES[name][0]
    if name in ("cells", "holdout", "confirmed"):
        columns += of_task.shown
    if name == "cells" and of_task.floor is not None:
        columns += (of_task.floor.metric,)
    if name == "history":
        columns += (of_task.objectives[0], *of_task.course)
    return columns


def not_settings(of_task: TaskDescription) -> tuple[str, ...]:
    """The columns of a trials table that are no settings: means over cells and `outside` are among them."""
    return (*TRIAL_COLUMNS, "outside", *of_task.metrics, COST)


OF_SCANS = ("subject", "truth", "site")


class NothingToShow(Exception):
    """The run does not contain what a figure needs; the message tells the reader what is missing."""


def _empty(name: str, of_task: TaskDescription = BEFORE_0_3) -> pd.DataFrame:
    return pd.DataFrame(columns=list(columns_of(name, of_task)))


@dataclass(frozen=True)
class RunRecord:
    """The content of the folder of a sweep. A table that is absent is empty, with its columns.

    `about` is run.json, with defaults if it is absent. `winner` is best/settings.json. `cohort` is the manifest of the
    cohort of the run (subject, truth, site), with what the task predicts as `truth`. `missing` has one line for each
    part that is absent.
    """

    folder: Path
    about: RunDescription = field(default_factory=RunDescription)
    trials: pd.DataFrame = field(default_factory=lambda: _empty("trials"))
    splits: pd.DataFrame = field(default_factory=lambda: _empty("splits"))
    cells: pd.DataFrame = field(default_factory=lambda: _empty("cells"))
    history: pd.DataFrame = field(default_factory=lambda: _empty("history"))
    holdout: pd.DataFrame = field(default_factory=lambda: _empty("holdout"))
    predictions: pd.DataFrame = field(default_factory=lambda: _empty("predictions"))
    confirmed: pd.DataFrame = field(default_factory=lambda: _empty("confirmed"))
    access: pd.DataFrame = field(default_factory=lambda: _empty("access"))
    baseline: pd.DataFrame = field(default_factory=lambda: _empty("baseline"))
    """The trials of the tuned baseline, with the columns of `trials`."""
    cohort: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(OF_SCANS)))
    evaluations: tuple[float, ...] = ()
    """When `brainsweep evaluate` used the held-out subjects, in seconds since 1970."""
    study: optuna.Study | None = None
    winner: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    """The tables whose end is missing, and of which a part is shown; they are in `missing`, too."""

    @property
    def best(self) -> int | None:
        """The number of the best completed trial, or None when no trial was completed."""
        return self._best_of(self.trials)

    @property
    def best_baseline(self) -> dict[str, Any] | None:
        """The row of the best completed trial of the baseline, or None when there is none."""
        best = self._best_of(self.baseline)
        return None if best is None else _row(self.baseline, best)

    def _best_of(self, trials: pd.DataFrame) -> int | None:
        completed = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()]
        if "outside" in completed:
            completed = completed[~completed["outside"].fillna(False).astype(bool)]
        later = [name for name in self.objectives[1:] if name in completed]
        ascending = [self.metric(name).better == "low" for name in [self.objectives[0], *later]]
        ordered = completed.sort_values(["value", *later, "number"], ascending=[*ascending, True])
        return None if ordered.empty else int(ordered["number"].iloc[0])

    @property
    def is_synthetic(self) -> bool:
        """Whether the brains are synthetic."""
        return self.about.cohort is not None and self.about.cohort.synthetic

    @property
    def task(self) -> TaskDescription:
        """The task of the run in words."""
        return self.about.task

    @property
    def judged_by(self) -> Metric:
        """The metric of the results on held-out subjects."""
        return self.task.judged_by

    @property
    def held_out_values(self) -> pd.DataFrame:
        """method and value: that metric for every refit."""
        return self.holdout[["method"]].assign(value=self.holdout[self.task.shown[0]])

    @property
    def objectives(self) -> list[str]:
        """The objectives of the search; the first one is the value of a trial."""
        return self.about.objectives

    def metric(self, name: str) -> Metric:
        """An objective in words."""
        return self.task.objective(name)

    @property
    def published(self) -> int | None:
        """The number of the trial with the published configuration, or None when there is none."""
        labelled = self.trials.loc[self.trials["label"] == PUBLISHED, "number"]
        return None if labelled.empty else int(labelled.iloc[0])

    @property
    def objective(self) -> Metric:
        """The first objective, which is a trial's value."""
        return self.metric(self.objectives[0])

    @property
    def value_label(self) -> str:
        """The meaning of the value of a trial: `validation MAE (years)`."""
        return self.objective.label

    @property
    def value_title(self) -> str:
        """`value_label` for the beginning of a sentence or a heading."""
        return self.value_label[:1].upper() + self.value_label[1:]

    def trial(self, number: int) -> dict[str, Any]:
        """The row of one trial."""
        return _row(self.trials, number)

    def searched(self) -> list[str]:
        """The settings that the search varied (dotted names), as the trials table has them."""
        return [str(name) for name in self.trials.columns if name not in not_settings(self.task)]


def _row(trials: pd.DataFrame, number: int) -> dict[str, Any]:
    row = trials[trials["number"] == number].iloc[0]
    return {str(name): value for name, value in row.items()}


def read_run(run: Path) -> RunRecord:
    """The record of the sweep in folder `run`; UserError if `run` is not the folder of a sweep."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(
            f"no run at '{run}': there is no such folder; give the folder that a sweep has written"
        )
    if not any((run / name).exists() for name in (RUN_JSON, JOURNAL, "trials.csv", "trials.parquet")):
        raise UserError(f"'{run}' is not a run: it has none of run.json, study.journal, trials.csv")
    missing: list[str] = []
    about = _read_description(run, missing)
    if about.kind != "sweep":
        raise UserError(f"'{run}' is a '{about.kind}' run; a report is made of sweeps")
    study = _read_study(run / JOURNAL, about.study, missing)
    of_task = about.task
    tables = {name: _read_table(run, name, of_task, missing) for name in TABLES}
    tables |= {name: _read_optional(run / f"{name}.csv", name, of_task, missing) for name in OPTIONAL_TABLES}
    if tables["trials"].empty and study is not None:
        tables["trials"] = _trials_of(study, of_task)
    cut = [
        f"{name} has {len(tables[name])} of {rows} lines: it was cut off; put it back from a backup"
        for name, rows in about.rows.items()
        if name in tables and len(tables[name]) < rows and not any(line.startswith(name) for line in missing)
    ]
    if "stage" in tables["history"]:
        # A first stage has losses and a schedule of its own, which say nothing beside those of what is judged.
        tables["history"] = tables["history"][tables["history"]["stage"].isna()]
    cohort = _read_cohort(run, about, missing)
    tables["predictions"] = _with_floor(tables["predictions"], tables["splits"], cohort, of_task)
    return RunRecord(
        folder=run,
        about=about,
        cohort=cohort,
        evaluations=tuple(evaluations(run / ACCESS)),
        study=study,
        winner=_read_json(run / "best" / "settings.json", "the winner's settings", missing),
        missing=(*cut, *missing),
        cut=tuple(cut),
        **tables,
    )


def _read_description(run: Path, missing: list[str]) -> RunDescription:
    content = _read_json(run / RUN_JSON, "how the run was made", missing)
    try:
        return RunDescription.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        missing.append(f"{RUN_JSON} cannot be read ({where}: {first['msg']}): how the run was made")
        return RunDescription()


def _read_json(path: Path, what: str, missing: list[str]) -> dict[str, Any]:
    name = "/".join(path.parts[-2:]) if path.parent.name == "best" else path.name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{name} is absent: {what}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{name} cannot be read ({_first_line(error)}): {what}")
        return {}
    if isinstance(content, dict):
        return content
    missing.append(f"{name} is not a JSON object: {what}")
    return {}


def _read_table(run: Path, name: str, of_task: TaskDescription, missing: list[str]) -> pd.DataFrame:
    columns, what = columns_of(name, of_task), TABLES[name][1]
    parquet, csv = run / f"{name}.parquet", run / f"{name}.csv"
    try:
        # Parquet keeps the types of columns.
        if parquet.exists():
            table = pd.read_parquet(parquet)
        elif csv.exists():
            table = read_predictions(csv) if name == "predictions" else read_table(csv)
        else:
            missing.append(f"{csv.name} is absent: {what}")
            return _empty(name, of_task)
    # The errors of the parsers are ValueErrors, too.
    except (OSError, ValueError, UserError) as error:
        missing.append(f"{name} cannot be read ({_first_line(error)}): {what}")
        return _empty(name, of_task)
    return _with_columns(table, columns, csv.name, what, missing)


def _with_columns(
    table: pd.DataFrame, columns: Sequence[str], file: str, what: str, missing: list[str]
) -> pd.DataFrame:
    """`table` with all `columns`; those that it lacks are NaN, and are noted in `missing`."""
    absent = [column for column in columns if column not in table]
    if absent:
        missing.append(f"{file} has no column {', '.join(absent)}: {what} may be incomplete")
    return table.assign(**dict.fromkeys(absent, float("nan")))


def read_predictions(path: Path) -> pd.DataFrame:
    """A table of predictions. Before version 0.3 it had ages in years, and no column of errors."""
    table = read_table(path)
    if "truth" in table or not {"age", "predicted"} <= set(table.columns):
        return table
    error = (table["predicted"].astype(float) - table["age"].astype(float)).abs()
    return table.rename(columns={"age": "truth"}).assign(error=error)


def _read_optional(path: Path, name: str, of_task: TaskDescription, missing: list[str]) -> pd.DataFrame:
    try:
        return _with_columns(read_table(path), columns_of(name, of_task), path.name, name, missing)
    except FileNotFoundError:
        return _empty(name, of_task)
    except (OSError, UserError) as error:
        missing.append(f"{path.name} cannot be read ({_first_line(error)})")
        return _empty(name, of_task)


def _read_study(path: Path, name: str, missing: list[str]) -> optuna.Study | None:
    # Check this first, because opening a journal creates it.
    if not path.exists():
        missing.append(f"{path.name} is absent: parameter importance and learning curves")
        return None
    backend = JournalFileBackend(str(path))
    try:
        return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    # A flipped byte in a journal makes Optuna raise nearly anything.
    except Exception as error:
        missing.append(
            f"{path.name} cannot be read ({_first_line(error)}): parameter importance and learning curves"
        )
        return None


def reported(trial: FrozenTrial) -> dict[int, float]:
    """The reported values of a trial, by the epochs done in all cells; of several objectives those of the first."""
    several = {
        int(name.removeprefix(VALUE_AT)): float(value)
        for name, value in trial.user_attrs.items()
        if name.startswith(VALUE_AT)
    }
    return several or trial.intermediate_values


def trial_row(
    trial: FrozenTrial, epochs: int | None, of_task: TaskDescription = BEFORE_0_3
) -> dict[str, Any]:
    """One row of the trials table: `TRIAL_COLUMNS`; whether the trial lies outside the space now; the means over the
    cells of what the task can optimise, and the cost; then the searched settings of the trial.

    Args:
        trial: a trial of the study.
        epochs: the epochs that it has done in all cells.
        of_task: the task of the run.
    """
    attributes, values = trial.user_attrs, reported(trial)
    last = values[max(values)] if values else math.nan
    return {
        "number": trial.number,
        "label": attributes.get(LABEL),
        "state": trial.state.name,
        "value": trial.values[0] if trial.values else last,
        "sd": attributes.get(SD),
        "n": attributes.get(CELLS_DONE),
        "epochs": epochs,
        "seconds": attributes.get(SECONDS),
        "reason": attributes.get(REASON),
        "outside": OUTSIDE in attributes,
        **{name: attributes.get(name, math.nan) for name in (*of_task.objectives, COST)},
        **(trial.params or attributes.get(OUTSIDE, {})),
    }


def _trials_of(study: optuna.Study, of_task: TaskDescription) -> pd.DataFrame:
    """The trials table from the study only, for a sweep that was killed before it wrote the table."""
    trials = study.get_trials(deepcopy=False)
    rows = [trial_row(trial, max(reported(trial), default=None), of_task) for trial in trials]
    return pd.DataFrame(rows) if rows else _empty("trials")


def _read_cohort(run: Path, about: RunDescription, missing: list[str]) -> pd.DataFrame:
    """Subject, truth and site of every scan of the run's cohort."""
    try:
        manifest = find_cohort(run, about.cohort).manifest
    except UserError as error:
        missing.append(f"{_first_line(error)}: what is known of its people")
        return pd.DataFrame(columns=list(OF_SCANS))
    if about.task.column not in manifest:
        return manifest[["subject", "site"]].assign(truth=None)[list(OF_SCANS)]
    # Without a truth the column in which the folds are alike is the site.
    return manifest.assign(truth=manifest[about.task.column])[list(OF_SCANS)]


def _with_floor(
    predictions: pd.DataFrame, splits: pd.DataFrame, cohort: pd.DataFrame, of_task: TaskDescription
) -> pd.DataFrame:
    """The predictions, with those of the training median if a sweep of age was stopped before it has written them."""
    trained = cohort["subject"].isin(splits.loc[splits["role"] != "holdout", "subject"])
    floor = BRAIN_AGE.floor
    if of_task.name != BRAIN_AGE.name or floor is None or predictions.empty or not trained.any():
        return predictions
    if (predictions["method"] == floor.method).any():
        return predictions
    first = predictions.iloc[0]
    held_out = predictions[
        (predictions["method"] == first["method"]) & (predictions["seed"] == first["seed"])
    ]
    median = float(cohort[trained].groupby("subject")["truth"].mean().median())
    of_median = held_out.assign(
        method=floor.method, seed=0, predicted=median, error=(median - held_out["truth"]).abs()
    )
    together: pd.DataFrame = pd.concat([predictions, of_median], ignore_index=True)
    return together


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
