"""What is worth varying in classification: the loss, how classes are weighed, and augmentation.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    method = trial.suggest_categorical("objective.name", ["cross_entropy", "focal", "supcon"])
    if method == "supcon":
        # Scans of one class attract each other, and a logistic probe reads the classes.
        trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
        trial.suggest_categorical("model.readout", ["projection", "encoder"])
        trial.suggest_int("views.count", 2, 2)
    else:
        trial.suggest_categorical("objective.class_weights", ["none", "balanced"])
        trial.suggest_float("objective.label_smoothing", 0.0, 0.2)
    if method == "focal":
        trial.suggest_float("objective.gamma", 0.5, 5.0)
    trial.suggest_categorical("views.crop", [None, 0.9, 0.8])
    trial.suggest_categorical("views.noise", [0.0, 0.05, 0.2])
    trial.suggest_categorical("views.flip", [0.0, 0.5])
    return dict(trial.params)
