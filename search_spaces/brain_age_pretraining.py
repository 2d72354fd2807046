"""What is worth varying in pre-training on many brains of many sites: how much of age the encoder is told, and views.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-3, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    method = trial.suggest_categorical("objective.name", ["simclr", "supcon", "y_aware", "exponential"])
    trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
    if method == "supcon":
        # Positives are ages in the same bin.
        trial.suggest_float("objective.bin_width", 1.0, 10.0)
    elif method != "simclr":
        # Positives are weighted by a kernel of the age difference; its width is in years.
        trial.suggest_categorical("objective.kernel", ["rbf", "cauchy", "laplace"])
        trial.suggest_float("objective.width", 0.5, 20.0, log=True)
    # Without augmentation both views of a scan are the same, and SimCLR has nothing to learn.
    trial.suggest_categorical("views.crop", [None, 0.9, 0.8])
    trial.suggest_categorical("views.cutout", [0.0, 0.5])
    trial.suggest_categorical("views.noise", [0.0, 0.05, 0.2])
    return dict(trial.params)
