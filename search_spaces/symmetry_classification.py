"""What is worth varying when classes are told from a head and its mirror image, after symmetry-aware pre-training.

Every parameter is named like the setting it sets; those of the pre-training begin with `pretraining.` and are given
(pinned) unless you ask for several first stages (`--stages K`).
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-6, 1e-3, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-4, 0.3, log=True)
    trial.suggest_float("optimiser.warmup", 0.0, 0.2)
    trial.suggest_categorical("objective.class_weights", ["none", "balanced"])
    trial.suggest_int("model.layers", 1, 4)
    trial.suggest_float("model.dropout", 0.0, 0.3)
    trial.suggest_float("begin.layer_decay", 0.5, 1.0)
    # Frozen for ever, for a part of the training, or never.
    if trial.suggest_categorical("begin.freeze", ["none", "encoder"]) == "encoder":
        trial.suggest_categorical("begin.thaw", [None, 0.2, 0.5])
    return dict(trial.params)
