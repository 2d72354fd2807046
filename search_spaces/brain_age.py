"""What is worth varying in contrastive brain-age regression: the published ranges of system A, and beyond.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    _objective(trial)
    _neighbours(trial)
    _views(trial)
    return dict(trial.params)


def _objective(trial: optuna.Trial) -> None:
    """The method, and only the settings that can act with it."""
    method = trial.suggest_categorical("objective.name", ["supcon", "y_aware", "threshold", "exponential"])
    _value_or_schedule(trial, "objective.temperature", 0.03, 0.5)
    trial.suggest_categorical("objective.normalise", ["anchor", "total"])
    if method == "supcon":
        # Positives are ages in the same bin.
        trial.suggest_float("objective.bin_width", 1.0, 10.0)
    else:
        # Positives are weighted by a kernel of the age difference; its width is in years.
        trial.suggest_categorical("objective.kernel", ["rbf", "cauchy", "laplace"])
        _value_or_schedule(trial, "objective.width", 0.5, 20.0)


def _value_or_schedule(trial: optuna.Trial, name: str, low: float, high: float) -> None:
    """The setting `name`: one value throughout (shape None, as published), or from a to b."""
    shape = trial.suggest_categorical(f"{name}.shape", [None, "linear", "cosine", "exponential"])
    if shape is None:
        trial.suggest_float(name, low, high, log=True)
    else:
        trial.suggest_float(f"{name}.start", low, high, log=True)
        trial.suggest_float(f"{name}.end", low, high, log=True)


def _neighbours(trial: optuna.Trial) -> None:
    """Repulsion by all rows (None), or by the nearest, whose share of the batch follows a schedule."""
    shape = trial.suggest_categorical(
        "objective.neighbours.shape", [None, "linear", "cosine", "exponential", "staircase"]
    )
    if shape is None:
        return
    trial.suggest_float("objective.neighbours.start", 0.5, 1.0)
    trial.suggest_float("objective.neighbours.end", 0.1, 0.5)
    trial.suggest_categorical("objective.neighbours.metric", ["cosine", "manhattan", "chebyshev"])
    if shape == "staircase":
        trial.suggest_int("objective.neighbours.step", 1, 10)


def _views(trial: optuna.Trial) -> None:
    """Augmentation; the published configuration has none."""
    trial.suggest_categorical("views.crop", [None, 0.9, 0.8])
    trial.suggest_categorical("views.cutout", [0.0, 0.5])
    trial.suggest_categorical("views.noise", [0.0, 0.05, 0.2])
