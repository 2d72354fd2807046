"""What is worth varying when a 2D U-Net segments with few labels, from scratch or from a contrast-guided pre-training.

Every parameter is named like the setting it sets.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-4, 3e-3, log=True)
    # Of false positives; false negatives have the rest.
    trial.suggest_float("objective.alpha", 0.1, 0.9)
    trial.suggest_categorical("begin.freeze", ["none", "encoder"])
    trial.suggest_categorical("views.rotate", [0.0, 15.0])
    trial.suggest_categorical("views.zoom", [0.0, 0.05])
    trial.suggest_categorical("views.flip", [0.0, 1.0])
    return dict(trial.params)
