"""What is worth varying in contrast-guided pre-training: which patches are contrasted, with how many others, and how.

Every parameter is named like the setting it sets. The map that guides is a choice of the user: `derive --clusters
10,20,30 --constraint NAME` makes three, and `--choose data.constraint=NAME-10,NAME-20,NAME-30` searches them. Compare
trials by a probe (`--set evaluation.target=dseg`): a loss of other neighbours or temperatures is another loss.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-4, 3e-3, log=True)
    trial.suggest_categorical("features.dimension", [16, 32, 64, 128])
    trial.suggest_int("features.levels", 1, 5)
    trial.suggest_float("objective.temperature", 0.03, 1.0, log=True)
    trial.suggest_categorical("objective.form", ["pairwise", "setwise"])
    trial.suggest_int("objective.anchors", 5, 100, log=True)
    # A number, or a neighbourhood that narrows: dynamic localised repulsion among patches.
    trial.suggest_categorical("objective.neighbours.shape", ["linear", "cosine"])
    trial.suggest_int("objective.neighbours.start", 20, 400, log=True)
    trial.suggest_int("objective.neighbours.end", 20, 400, log=True)
    return dict(trial.params)
