"""A run as a sweep leaves it, made up: an Optuna study with every kind of trial, and all its tables.

Nothing is trained. Errors follow a smooth rule of the settings plus seeded noise, so that the report has
something to show. `tests/test_report.py` takes parts away from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter

FOLDS, SEEDS, EPOCHS = 3, (0, 1), 12
SITES = ("Leeds", "Lyon", "Oslo")
PUBLISHED = {
    "objective.name": "exponential",
    "objective.kernel": "rbf",
    "objective.width": 2.0,
    "objective.bin_width": None,
    "objective.temperature": 0.1,
    "objective.neighbours.shape": "staircase",
    "objective.neighbours.start": 1.0,
    "objective.neighbours.end": 0.4375,
    "objective.neighbours.step": 2,
    "objective.neighbours.metric": "manhattan",
    "model.readout": "projection",
    "views.crop": None,
    "views.noise": 0.0,
    "optimiser.learning_rate": 1e-4,
    "optimiser.weight_decay": 5e-5,
}


def make_run(
    folder: Path, trials: int = 24, all_failed: bool = False, subjects: int = 96, seed: int = 0
) -> Path:
    """Write a plausible finished run of `trials` trials to `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cohort = _cohort(rng, subjects)
    written = _write_cohort(folder / "cohort", cohort)
    cohort[["subject", "role"]].to_csv(folder / "splits.csv", index=False)
    cells, history = _write_study(folder, trials, all_failed, rng)
    pd.DataFrame(cells).to_csv(folder / "cells.csv", index=False)
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    table = _trials_table(folder)
    table.to_csv(folder / "trials.csv", index=False)
    best = table[table["state"] == "COMPLETE"].sort_values("value").head(1)
    _write_about(folder, best, written, trials)
    if not best.empty:
        _write_winner(folder, best.iloc[0])
        _write_holdout(folder, cohort, rng)
    return folder


def _write_cohort(folder: Path, cohort: pd.DataFrame) -> Cohort:
    """A cohort of these people, eight voxels each."""
    writer = CohortWriter(
        folder, name="phantom", channels=("t1w", "stiffness"), shape=(2, 2, 2), spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="phantom, seed 0", synthetic=True,
    )  # fmt: skip
    volume = np.linspace(1, 2, 16, dtype=np.float32).reshape(2, 2, 2, 2)
    with writer:
        for row in cohort.itertuples():
            writer.add(volume, subject=row.subject, age=row.age, site=row.site)
    return Cohort.open(folder)


def _cohort(rng: np.random.Generator, subjects: int) -> pd.DataFrame:
    old = rng.random(subjects) < 0.35
    age = np.where(old, rng.normal(68, 7, subjects), rng.normal(29, 7, subjects)).clip(18, 88)
    roles = ["holdout" if index % 5 == 0 else f"fold {index % FOLDS}" for index in range(subjects)]
    return pd.DataFrame(
        {
            "subject": [f"sub-{index:03d}" for index in range(subjects)],
            "age": age.round(1),
            "site": rng.choice(SITES, subjects, p=(0.5, 0.3, 0.2)),
            "role": roles,
        }
    )


def _suggest(trial: optuna.Trial) -> None:
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    name = trial.suggest_categorical("objective.name", ["supcon", "y_aware", "threshold", "exponential"])
    trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
    if name == "supcon":
        trial.suggest_float("objective.bin_width", 1.0, 10.0)
    else:
        trial.suggest_categorical("objective.kernel", ["rbf", "cauchy", "laplace"])
        trial.suggest_float("objective.width", 0.5, 20.0, log=True)
    shape = trial.suggest_categorical("objective.neighbours.shape", [None, "linear", "staircase"])
    if shape is not None:
        trial.suggest_float("objective.neighbours.start", 0.5, 1.0)
        trial.suggest_float("objective.neighbours.end", 0.1, 0.5)
        trial.suggest_categorical("objective.neighbours.metric", ["cosine", "manhattan"])
    if shape == "staircase":
        trial.suggest_int("objective.neighbours.step", 1, 4)
    trial.suggest_categorical("views.crop", [None, 0.9, 0.8])
    trial.suggest_categorical("views.noise", [0.0, 0.05, 0.2])


def _expected_mae(params: dict[str, Any]) -> float:
    mae = 5.0 + 2.2 * abs(np.log10(params["optimiser.learning_rate"] / 3e-4))
    mae += 2.5 * abs(np.log10(params["objective.temperature"] / 0.09))
    mae += {"supcon": 3.0, "threshold": 1.0}.get(params["objective.name"], 0.0)
    return mae + 0.8 * abs(np.log10(params.get("objective.width", 3.0) / 3.0))


def _write_study(
    folder: Path, trials: int, all_failed: bool, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="brainsweep",
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        sampler=optuna.samplers.RandomSampler(seed=3),
    )
    study.enqueue_trial(
        {name: value for name, value in PUBLISHED.items() if name != "objective.bin_width"},
        user_attrs={"label": "published"},
    )
    cells: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    curves: list[list[float]] = []
    for number in range(trials):
        trial = study.ask()
        _suggest(trial)
        if all_failed or number % 11 == 5:
            trial.set_user_attr("reason", f"loss became NaN in epoch {number % 7 + 1} of fold 0, seed 0")
            trial.set_user_attr("seconds", 3.0)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        done = _run_trial(trial, rng, curves)
        cells += done[0]
        history += done[1]
        values = [cell["mae"] for cell in done[0]]
        trial.set_user_attr("seconds", 1.1 * len(done[1]))
        trial.set_user_attr("n", len(values))
        if len(values) < FOLDS * len(SEEDS):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            trial.set_user_attr("sd", float(np.std(values, ddof=1)))
            study.tell(trial, float(np.mean(values)))
    return cells, history


def _run_trial(
    trial: optuna.Trial, rng: np.random.Generator, curves: list[list[float]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells and epochs of one trial, until it falls behind the median of the trials before it."""
    cells: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    curve: list[float] = []
    expected = _expected_mae(trial.params)
    for fold in range(FOLDS):
        for seed in SEEDS:
            final = expected + 0.5 * (fold - 1) + rng.normal(0, 0.4)
            for epoch in range(1, EPOCHS + 1):
                mae = final + (16 - final) * np.exp(-3.5 * epoch / EPOCHS) + rng.normal(0, 0.15)
                history.append(_epoch(trial, fold, seed, epoch, mae, expected, rng))
                curve.append(float(np.mean([*(cell["mae"] for cell in cells), mae])))
                trial.report(curve[-1], len(curve))
                at_same_step = [other[len(curve) - 1] for other in curves if len(other) >= len(curve)]
                if len(curve) in (4, 12) and len(at_same_step) > 2 and curve[-1] > np.median(at_same_step):
                    curves.append(curve)
                    return cells, history
            cells.append(
                {
                    "number": trial.number,
                    "fold": fold,
                    "seed": seed,
                    "mae": mae,
                    "r2": 1 - (mae / 20) ** 2,
                    "site_balanced_accuracy": 0.4 + 0.05 * rng.normal(),
                    "median_mae": 17.8 + 0.4 * fold,
                    "n": 25,
                }
            )
    curves.append(curve)
    return cells, history


def _epoch(
    trial: optuna.Trial,
    fold: int,
    seed: int,
    epoch: int,
    mae: float,
    expected: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    progress = epoch / EPOCHS
    start = trial.params.get("objective.neighbours.start")
    end = trial.params.get("objective.neighbours.end")
    return {
        "number": trial.number,
        "fold": fold,
        "seed": seed,
        "epoch": epoch,
        "progress": progress,
        "loss": 2 + expected / 10 + 2.5 * np.exp(-3 * progress) + rng.normal(0, 0.05),
        "mae": mae,
        "learning_rate": trial.params["optimiser.learning_rate"] * (1 + np.cos(np.pi * progress)) / 2,
        "temperature": trial.params["objective.temperature"],
        "width": trial.params.get("objective.width"),
        "neighbours": 63 if start is None else round(64 * (start + (end - start) * progress)) - 1,
        "seconds": 1.1,
    }


def _trials_table(folder: Path) -> pd.DataFrame:
    study = optuna.load_study(
        study_name="brainsweep", storage=JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    )
    rows = [
        {
            "number": trial.number,
            "label": trial.user_attrs.get("label"),
            "state": trial.state.name,
            "value": trial.value,
            "sd": trial.user_attrs.get("sd"),
            "n": trial.user_attrs.get("n"),
            "epochs": len(trial.intermediate_values),
            "seconds": trial.user_attrs.get("seconds"),
            "reason": trial.user_attrs.get("reason"),
        }
        for trial in study.trials
    ]
    params = [{name: trial.params.get(name) for name in PUBLISHED} for trial in study.trials]
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(params)], axis=1)


def _write_about(folder: Path, best: pd.DataFrame, cohort: Cohort, trials: int) -> None:
    about = {
        "command": f"brainsweep sweep cohort --space brain_age --trials {trials} --folds 3 --seeds 2",
        "created": "2026-11-20T09:14:05+00:00",
        "finished": "2026-11-20T09:17:41+00:00",
        "seconds": 216.4,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0", "optuna": "5.0.0"},
        "code": {"commit": "0123abcd", "dirty": True},
        "cohort": {
            "path": "cohort",
            "name": "phantom",
            "hash": cohort.description.hash,
            "n": len(cohort),
            "synthetic": True,
            "spacing": 8.0,
            "shape": [23, 28, 23],
            "channels": ["t1w", "stiffness"],
            "source": "phantom, seed 0",
        },
        "settings": {"task": "brain_age", "training": {"epochs": EPOCHS, "batch_size": 32}},
        "sweep": {
            "space": "brain_age",
            "trials": trials,
            "folds": FOLDS,
            "seeds": list(SEEDS),
            "slots": 2,
            "workers_per_slot": 1,
            "scheduler": "asha",
            "sampler": "tpe",
            "holdout": 0.2,
            "metric": "mae",
            "search_seed": 0,
            "time_budget": None,
        },
        "best": None
        if best.empty
        else {"number": int(best["number"].iloc[0]), "value": float(best["value"].iloc[0])},
    }
    (folder / "run.json").write_text(json.dumps(about))


def _write_winner(folder: Path, best: pd.Series) -> None:
    names = ("name", "kernel", "width", "bin_width", "temperature")
    blocks = {key: best[f"objective.{key}"] for key in names}
    around = {key: best[f"objective.neighbours.{key}"] for key in ("shape", "start", "end", "step", "metric")}
    settings = {
        "views": {"count": 2},
        "objective": {key: value for key, value in blocks.items() if pd.notna(value)}
        | {"neighbours": {key: value for key, value in around.items() if pd.notna(value)} or None},
        "optimiser": {
            "name": "adam",
            "learning_rate": best["optimiser.learning_rate"],
            "decay": {"shape": "cosine", "start": 1.0, "end": 0.0},
            "warmup": 0.0,
        },
        "training": {"epochs": EPOCHS, "batch_size": 32},
    }
    (folder / "best").mkdir()
    (folder / "best" / "settings.json").write_text(json.dumps(settings, default=float))


def _write_holdout(folder: Path, cohort: pd.DataFrame, rng: np.random.Generator) -> None:
    held = cohort[cohort["role"] == "holdout"]
    median = cohort.loc[cohort["role"] != "holdout", "age"].median()
    own = rng.normal(0, 1, len(held))  # what makes a subject hard for every method
    scales = {"training median": None, "L1 baseline": 9.5, "published": 7.4, "search winner": 6.6}
    scores, predictions = [], []
    for method, scale in scales.items():
        for seed in SEEDS if scale else (0,):
            noise = 0.9 * own + 0.45 * rng.normal(size=len(held))
            predicted = np.full(len(held), median) if scale is None else held["age"] + scale * noise
            error = (predicted - held["age"]).to_numpy()
            scores.append(
                {
                    "method": method,
                    "seed": seed,
                    "mae": np.abs(error).mean(),
                    "r2": 1 - (error**2).mean() / held["age"].var(ddof=0),
                    "site_balanced_accuracy": None if scale is None else 0.38 + 0.03 * rng.normal(),
                    "n_train": len(cohort) - len(held),
                    "n_holdout": len(held),
                }
            )
            predictions.append(
                held[["subject", "age", "site"]].assign(method=method, seed=seed, predicted=predicted)
            )
    pd.DataFrame(scores).to_csv(folder / "holdout.csv", index=False)
    columns = ["method", "seed", "subject", "age", "predicted", "site"]
    pd.concat(predictions)[columns].to_csv(folder / "predictions.csv", index=False)


if __name__ == "__main__":
    print(make_run(Path(sys.argv[1])))
