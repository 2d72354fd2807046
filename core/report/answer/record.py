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
from core.evaluation.regression import median_age
from core.files.tables import read_table
from core.objectives import OBJECTIVES, Objective
from core.run_access import evaluations
from core.run_description import RunDescription, find_cohort
from core.run_names import (
    ACCESS,
    CELLS_DONE,
    JOURNAL,
    LABEL,
    MEDIAN,
    OUTSIDE,
    PUBLISHED,
    REASON,
    RUN_JSON,
    SD,
    SECONDS,
    VALUE_AT,
)

TRIAL_COLUMNS = ("number", "label", "state", "value", "sd", "n", "epochs", "seconds", "reason")
MEASURED_COLUMNS = ("outside", *OBJECTIVES)
"""More columns of a trials table: whether the trial lies outside the space now, and means over the cells."""
NO_SETTINGS = (*TRIAL_COLUMNS, *MEASURED_COLUMNS)

# Every table of a run: its columns, and what is missing in a report without it.
TABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "trials": (TRIAL_COLUMNS, "the leaderboard"),
    "splits": (("subject", "role"), "who was in which fold and who was held out"),
    "cells": (
        ("number", "fold", "seed", "mae", "r2", "site_balanced_accuracy", "median_mae", "n"),
        "the spread over folds and seeds",
    ),
    "history": (
        (
            "number",
            "fold",
            "seed",
            "epoch",
            "progress",
            "loss",
            "mae",
            "learning_rate",
            "temperature",
            "width",
            "neighbours",
            "seconds",
        ),
        "the epochs of every trial",
    ),
    "holdout": (
        ("method", "seed", "mae", "r2", "site_balanced_accuracy", "n_train", "n_holdout"),
        "the result on the held-out subjects",
    ),
    "predictions": (
        ("method", "seed", "subject", "age", "predicted", "site"),
        "the predicted ages of the held-out subjects",
    ),
}
# Tables that only some runs have.
OPTIONAL_TABLES: dict[str, tuple[str, ...]] = {
    "confirmed": ("method", "fold", "seed", "mae", "site_balanced_accuracy", "n"),
    "access": ("subject", "first_read", "fold"),
    "baseline": TRIAL_COLUMNS,
}


class NothingToShow(Exception):
    """The run does not contain what a figure needs; the message tells the reader what is missing."""


def _empty(name: str) -> pd.DataFrame:
    columns = OPTIONAL_TABLES[name] if name in OPTIONAL_TABLES else TABLES[name][0]
    return pd.DataFrame(columns=list(columns))


@dataclass(frozen=True)
class RunRecord:
    """The content of the folder of a sweep. A table that is absent is empty, with its columns.

    `about` is run.json, with defaults if it is absent. `winner` is best/settings.json. `cohort` is the manifest of the
    cohort of the run (subject, age in years, site). `missing` has one line for each part that is absent.
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
    """The trials of the L1 baseline, with the columns of `trials`."""
    cohort: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["subject", "age", "site"]))
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
        """The row of the best completed trial of the L1 baseline, or None when there is none."""
        best = self._best_of(self.baseline)
        return None if best is None else _row(self.baseline, best)

    def _best_of(self, trials: pd.DataFrame) -> int | None:
        completed = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()]
        if "outside" in completed:
            completed = completed[~completed["outside"].fillna(False).astype(bool)]
        later = [name for name in self.objectives[1:] if name in completed]
        ordered = completed.sort_values(["value", *later, "number"])
        return None if ordered.empty else int(ordered["number"].iloc[0])

    @property
    def is_synthetic(self) -> bool:
        """Whether the brains are synthetic."""
        return self.about.cohort is not None and self.about.cohort.synthetic

    @property
    def objectives(self) -> list[str]:
        """The objectives, which the search minimised; the first one is the value of a trial."""
        return self.about.objectives

    @property
    def published(self) -> int | None:
        """The number of the trial with the published configuration, or None when there is none."""
        labelled = self.trials.loc[self.trials["label"] == PUBLISHED, "number"]
        return None if labelled.empty else int(labelled.iloc[0])

    @property
    def objective(self) -> Objective:
        """The first objective, which is a trial's value."""
        return OBJECTIVES[self.objectives[0]]

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
        return [str(name) for name in self.trials.columns if name not in NO_SETTINGS]


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
    tables = {name: _read_table(run, name, missing) for name in TABLES}
    tables |= {name: _read_optional(run / f"{name}.csv", name, missing) for name in OPTIONAL_TABLES}
    if tables["trials"].empty and study is not None:
        tables["trials"] = _trials_of(study)
    cut = [
        f"{name} has {len(tables[name])} of {rows} lines: it was cut off; put it back from a backup"
        for name, rows in about.rows.items()
        if name in tables and len(tables[name]) < rows and not any(line.startswith(name) for line in missing)
    ]
    cohort = _read_cohort(run, about, missing)
    tables["predictions"] = _with_median(tables["predictions"], tables["splits"], cohort)
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


def _read_table(run: Path, name: str, missing: list[str]) -> pd.DataFrame:
    columns, what = TABLES[name]
    parquet, csv = run / f"{name}.parquet", run / f"{name}.csv"
    try:
        # Parquet keeps the types of columns.
        if parquet.exists():
            table = pd.read_parquet(parquet)
        elif csv.exists():
            table = read_table(csv)
        else:
            missing.append(f"{csv.name} is absent: {what}")
            return _empty(name)
    # The errors of the parsers are ValueErrors, too.
    except (OSError, ValueError, UserError) as error:
        missing.append(f"{name} cannot be read ({_first_line(error)}): {what}")
        return _empty(name)
    return _with_columns(table, columns, csv.name, what, missing)


def _with_columns(
    table: pd.DataFrame, columns: Sequence[str], file: str, what: str, missing: list[str]
) -> pd.DataFrame:
    """`table` with all `columns`; those that it lacks are NaN, and are noted in `missing`."""
    absent = [column for column in columns if column not in table]
    if absent:
        missing.append(f"{file} has no column {', '.join(absent)}: {what} may be incomplete")
    return table.assign(**dict.fromkeys(absent, float("nan")))


def _read_optional(path: Path, name: str, missing: list[str]) -> pd.DataFrame:
    try:
        return _with_columns(read_table(path), OPTIONAL_TABLES[name], path.name, name, missing)
    except FileNotFoundError:
        return _empty(name)
    except (OSError, UserError) as error:
        missing.append(f"{path.name} cannot be read ({_first_line(error)})")
        return _empty(name)


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


def trial_row(trial: FrozenTrial, epochs: int | None) -> dict[str, Any]:
    """One row of the trials table: `TRIAL_COLUMNS`, `MEASURED_COLUMNS`, then the searched settings of the trial.

    Args:
        trial: a trial of the study.
        epochs: the epochs that it has done in all cells.
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
        **{name: attributes.get(name, math.nan) for name in OBJECTIVES},
        **(trial.params or attributes.get(OUTSIDE, {})),
    }


def _trials_of(study: optuna.Study) -> pd.DataFrame:
    """The trials table from the study only, for a sweep that was killed before it wrote the table."""
    trials = study.get_trials(deepcopy=False)
    rows = [trial_row(trial, max(reported(trial), default=None)) for trial in trials]
    return pd.DataFrame(rows) if rows else _empty("trials")


def _read_cohort(run: Path, about: RunDescription, missing: list[str]) -> pd.DataFrame:
    """Subject, age and site of every scan of the run's cohort."""
    columns = ["subject", "age", "site"]
    try:
        return find_cohort(run, about.cohort).manifest[columns]
    except UserError as error:
        missing.append(f"{_first_line(error)}: its ages and sites")
        return pd.DataFrame(columns=columns)


def _with_median(predictions: pd.DataFrame, splits: pd.DataFrame, cohort: pd.DataFrame) -> pd.DataFrame:
    """The predictions, with those of the training median if the sweep has not written them."""
    trained = cohort["subject"].isin(splits.loc[splits["role"] != "holdout", "subject"])
    if predictions.empty or not trained.any() or (predictions["method"] == MEDIAN).any():
        return predictions
    first = predictions.iloc[0]
    held_out = predictions[
        (predictions["method"] == first["method"]) & (predictions["seed"] == first["seed"])
    ]
    known = cohort[trained]
    median = median_age(known["age"].to_numpy(float), known["subject"].to_numpy(str))
    of_median = held_out.assign(method=MEDIAN, seed=0, predicted=median)
    together: pd.DataFrame = pd.concat([predictions, of_median], ignore_index=True)
    return together


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
