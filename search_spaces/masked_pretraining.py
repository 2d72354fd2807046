"""What is worth varying in masked autoencoding: how much is hidden, in which pieces, and what is asked back.

Every parameter is named like the setting it sets, so a space returns its trial's parameters as they are. Compare trials
by probes (`evaluation.probes`): a larger mask makes a larger loss, and not a worse encoder.
"""

from __future__ import annotations

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-3, log=True)
    trial.suggest_float("optimiser.weight_decay", 1e-4, 1e-1, log=True)
    trial.suggest_float("masks.ratio", 0.4, 0.9)
    trial.suggest_categorical("masks.block", [2, 4, 8])
    trial.suggest_categorical("objective.voxels", ["hidden", "brain"])
    trial.suggest_categorical("objective.norm", ["l1", "l2"])
    trial.suggest_categorical("decoder.kind", ["transposed", "large_kernel"])
    return dict(trial.params)
