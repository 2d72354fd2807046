"""What is worth varying in symmetry-aware pre-training: which losses are on, and how much each of them counts.

Every parameter is named like the setting it sets; those of a loss exist only while it is on. Compare trials by probes,
best by several at once (`--set evaluation.probes=[disease,age]` with `--objectives disease_macro_auc,age_mae`): no
mixture is best for all tasks (FOMO25). The loss says nothing across mixtures.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-6, 1e-3, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-4, 0.3, log=True)
    trial.suggest_float("optimiser.warmup", 0.0, 0.2)
    trial.suggest_int("model.layers", 1, 4)
    trial.suggest_float("model.dropout", 0.0, 0.3)
    trial.suggest_float("patches.drop", 0.0, 0.6)
    trial.suggest_float("patches.largest", 0.1, 0.5)
    _mixture(trial)
    return dict(trial.params)


def _mixture(trial: optuna.Trial) -> None:
    """Which losses are on; rotation always is, so that there is one."""
    trial.suggest_float("objective.rotation.weight", 0.05, 2.0, log=True)
    if trial.suggest_categorical("objective.contrast.name", ["simclr", None]):
        trial.suggest_float("objective.contrast.weight", 0.05, 2.0, log=True)
        trial.suggest_float("objective.contrast.temperature", 0.05, 1.0, log=True)
    if trial.suggest_categorical("objective.inpainting.name", ["inpainting", None]):
        trial.suggest_float("objective.inpainting.weight", 0.05, 2.0, log=True)
    if trial.suggest_categorical("objective.symmetry.name", ["symmetry", None]):
        trial.suggest_float("objective.symmetry.weight", 0.05, 2.0, log=True)
        forms = ["cosine_nce", "siamese", "group", "margin"]
        form = trial.suggest_categorical("objective.symmetry.form", forms)
        if form == "group":
            trial.suggest_float("objective.symmetry.temperature", 0.03, 0.5, log=True)
        elif form == "margin":
            trial.suggest_float("objective.symmetry.margin", 0.5, 2.0)
    if trial.suggest_categorical("objective.masked.name", [None, "masked"]):
        trial.suggest_float("objective.masked.weight", 0.05, 2.0, log=True)
        trial.suggest_float("objective.masked.blocks.ratio", 0.4, 0.9)
