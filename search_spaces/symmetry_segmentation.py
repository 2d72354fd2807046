"""What is worth varying when lesions or tumours are segmented by Swin UNETR, with its mirror image or without.

Every parameter is named like the setting it sets.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-3, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("objective.name", ["dice", "dice_cross_entropy"])
    if (
        trial.suggest_categorical("model.name", ["swin_unetr_symmetry", "swin_unetr"])
        == "swin_unetr_symmetry"
    ):
        trial.suggest_int("model.layers", 1, 4)
        trial.suggest_float("model.dropout", 0.0, 0.3)
    trial.suggest_categorical("model.width", [0.25, 0.5, 1.0])
    trial.suggest_float("evaluation.overlap", 0.25, 0.75)
    trial.suggest_categorical("views.crop_on_class", [0.0, 0.5, 1.0])
    return dict(trial.params)
