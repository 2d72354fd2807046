"""What is worth varying in a regression of age on tissue volumes: the regressor, and what makes each of them stiff.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_categorical("data.relative", [True, False])
    kinds = ["linear", "bayesian_ridge", "ridge", "svr", "gradient_boosting"]
    kind = trial.suggest_categorical("regressor.name", kinds)
    if kind == "svr":
        trial.suggest_float("regressor.penalty", 0.1, 1000.0, log=True)
        trial.suggest_float("regressor.tube", 0.1, 10.0, log=True)
    elif kind == "gradient_boosting":
        trial.suggest_int("regressor.trees", 20, 500, log=True)
        trial.suggest_int("regressor.depth", 1, 4)
        trial.suggest_float("regressor.rate", 0.01, 0.3, log=True)
    else:
        trial.suggest_int("regressor.degree", 1, 4)
    return dict(trial.params)
