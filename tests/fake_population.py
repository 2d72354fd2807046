"""A finished run of a population, made up: five members whose values, exchanges and changes are written by hand.

Member 2 ends best. Its weights were member 0's up to epoch 2, member 1's up to epoch 4 (it took member 0's), and
then its own (it took member 1's); so the schedule is that of member 0 with two changes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from fake_run import make_run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from core.config import merge, resolve
from core.run_names import EXCHANGED, FOUND, FOUND_BY, LINEAGE, MEMBER
from search_spaces import published

EPOCHS = 6
RATES = (1e-3, 2e-3, 5e-4, 3e-3, 1e-4)
TEMPERATURES = (0.1, 0.2, 0.3, 0.05, 0.4)
VALUES = (
    (12.0, 9.0, 8.0, 7.4, 7.0, 6.9),
    (13.0, 11.0, 7.6, 6.6, 6.4, 6.3),
    (14.0, 10.5, 9.9, 9.5, 6.0, 5.6),
    (12.5, 10.0, 9.0, 8.6, 8.4, 8.3),
    (60.0, 14.0, 8.5, 8.0, 6.7, 6.5),
)
# Both changes that member 2's weights went through, and what the other members did besides.
FIRST = {"epoch": 2, "donor": "0000", "changed": {"objective.temperature": 0.07}}
SECOND = {
    "epoch": 4,
    "donor": "0001",
    "changed": {"objective.temperature": 0.05, "optimiser.learning_rate": 5e-4},
}
GIVEN_UP = {"epoch": 2, "donor": "0003", "changed": {}}
LAST = {"epoch": 4, "donor": "0001", "changed": {"optimiser.learning_rate": 8e-4}}
LINEAGES: dict[int, list[dict[str, Any]]] = {1: [FIRST], 2: [FIRST, SECOND], 4: [FIRST, LAST]}
EXCHANGES: dict[int, list[dict[str, Any]]] = {1: [FIRST], 2: [SECOND], 4: [GIVEN_UP, LAST]}
CELLS = {5: (6.4, 7.4), 6: (5.6, 7.2)}
PIECES = {
    "objective.temperature": {"shape": "piecewise", "values": [0.1, 0.07, 0.05], "until": [2 / 6, 4 / 6]},
    "optimiser.learning_rate": {"shape": "piecewise", "values": [1e-3, 5e-4], "until": [4 / 6]},
}


def make_population_run(folder: Path) -> Path:
    """Write the run to `folder`; return it. Who was held out, and how well they were predicted, is of another run."""
    make_run(folder, trials=2)
    for name in ("study.journal", "trials.csv", "cells.csv", "history.csv"):
        (folder / name).unlink()
    shutil.rmtree(folder / "best")
    study = optuna.create_study(
        study_name="brainsweep",
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for number in range(len(VALUES)):
        _add_member(study, number)
    _add_trial(study, 5, {"label": "published"}, _settings(1e-4, 0.1), _parameters(1e-4, 0.1))
    found = resolve(merge(_settings(RATES[0], TEMPERATURES[0]), PIECES)).model_dump(mode="json")
    _add_trial(study, 6, {"label": FOUND, FOUND_BY: 2, LINEAGE: LINEAGES[2]}, found, {})
    _write_tables(folder, study)
    (folder / "best").mkdir()
    (folder / "best" / "settings.json").write_text(json.dumps(found))
    about = json.loads((folder / "run.json").read_text())
    about["sweep"] |= {"scheduler": "pbt", "trials": 7, "folds": 2}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def _settings(rate: float, temperature: float) -> dict[str, Any]:
    changes = {
        "optimiser.learning_rate": rate, "objective.temperature": temperature, "training.epochs": EPOCHS,
    }  # fmt: skip
    return resolve(merge(published("brain_age"), changes)).model_dump(mode="json")


def _parameters(rate: float, temperature: float) -> dict[str, float]:
    return {"optimiser.learning_rate": rate, "objective.temperature": temperature}


def _ask(study: optuna.Study, parameters: dict[str, float], attributes: dict[str, Any]) -> optuna.Trial:
    study.enqueue_trial(parameters)
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    if parameters:
        trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
        trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
    return trial


def _add_member(study: optuna.Study, number: int) -> None:
    attributes = {"label": MEMBER, "reason": "its cell was for finding a schedule", "n": 1, "seconds": 6.0}
    attributes |= {LINEAGE: LINEAGES.get(number, []), EXCHANGED: EXCHANGES.get(number, [])}
    trial = _ask(study, _parameters(RATES[number], TEMPERATURES[number]), attributes)
    for epoch, value in enumerate(VALUES[number], start=1):
        trial.report(value, epoch)
    study.tell(trial, state=TrialState.PRUNED)


def _add_trial(
    study: optuna.Study, number: int, attributes: dict[str, Any], settings: dict[str, Any], parameters: dict[str, float]
) -> None:  # fmt: skip
    values = pd.Series(CELLS[number])
    measured = {
        "settings": json.dumps(settings),
        "n": len(values),
        "sd": float(values.std()),
        "seconds": 12.0,
    }
    trial = _ask(study, parameters, attributes | measured)
    followed = (*VALUES[0][:2], *VALUES[1][2:4], *VALUES[2][4:])
    for epoch in range(1, EPOCHS + 1):
        trial.report(followed[epoch - 1] if number == 6 else 15.0 - epoch, epoch)
    study.tell(trial, float(values.mean()))


def _write_tables(folder: Path, study: optuna.Study) -> None:
    rows = [
        {
            "number": trial.number,
            "label": trial.user_attrs["label"],
            "state": trial.state.name,
            "value": trial.value if trial.values else trial.intermediate_values[EPOCHS],
            "epochs": EPOCHS if trial.number < len(VALUES) else 2 * EPOCHS,
            **{name: trial.user_attrs.get(name) for name in ("sd", "n", "seconds", "reason")},
            **trial.params,
        }
        for trial in study.get_trials()
    ]
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    scored = {number: values[-1:] for number, values in enumerate(VALUES)} | CELLS
    cells = [
        {
            "number": number, "fold": fold, "seed": 0, "mae": mae, "r2": 0.5, "site_balanced_accuracy": 0.4,
            "median_mae": 17.0, "n": 25,
        }
        for number, values in scored.items()
        for fold, mae in enumerate(values)
    ]  # fmt: skip
    pd.DataFrame(cells).to_csv(folder / "cells.csv", index=False)
    epochs = [
        {
            "number": 6, "fold": fold, "seed": 0, "epoch": epoch, "progress": epoch / EPOCHS, "loss": 4.0 - epoch / 3,
            "mae": 9.0, "learning_rate": 1e-3 if epoch <= 4 else 5e-4,
            "temperature": 0.1 if epoch <= 2 else 0.07 if epoch <= 4 else 0.05, "width": 2.0, "neighbours": 63,
            "seconds": 1.0,
        }
        for fold in range(2)
        for epoch in range(1, EPOCHS + 1)
    ]  # fmt: skip
    pd.DataFrame(epochs).to_csv(folder / "history.csv", index=False)
