"""What is worth varying when few people are labelled: how fast, and how strongly held back, a network learns from them.

Give it budgets and starts: `sweep COHORT --space label_budget --labelled 16,32,64,all --start none --start RUN`. With
two starts or more the search varies how a start is trained further, too (`begin.rate`, `begin.freeze`).

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    trial.suggest_categorical("views.noise", [0.0, 0.05])
    return dict(trial.params)
