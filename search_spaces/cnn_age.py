"""What is worth varying in a CNN that predicts age itself: depth, groups, shortcuts, and the scale of its target.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-3, log=True)
    trial.suggest_categorical("model.name", ["resnext50", "resnext101", "resnext152", "resnext200"])
    trial.suggest_categorical("model.cardinality", [8, 16, 32])
    trial.suggest_categorical("model.shortcut", ["A", "B"])
    trial.suggest_categorical("objective.name", ["mse", "l1"])
    trial.suggest_categorical("objective.target_scaling", ["none", "standard"])
    trial.suggest_categorical("training.batch_size", [4, 8])
    return dict(trial.params)
