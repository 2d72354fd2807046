"""What is worth varying in the segmentation of tissues: the loss, the network, and whether it sees brains or patches.

Every parameter is named like the setting it sets; a patch brings settings of its own.
"""

from __future__ import annotations

import optuna

SYMMETRY = "swin_unetr_symmetry"
NETWORKS = ["res_unet", "groupnorm_unet", "dynunet", "swin_unetr", SYMMETRY]


def space(trial: optuna.Trial) -> dict[str, object]:
    """One configuration as {dotted name of a setting: value}."""
    settings: dict[str, object] = {}
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    loss = trial.suggest_categorical("objective.name", ["cross_entropy", "dice", "dice_cross_entropy"])
    if loss == "dice_cross_entropy":
        # Only a sum has a weight.
        trial.suggest_float("objective.dice_weight", 0.25, 4.0, log=True)
    network = trial.suggest_categorical("model.name", NETWORKS)
    trial.suggest_categorical("model.width", [0.25, 0.5, 1.0])
    trial.suggest_categorical("training.batch_size", [2, 4, 8])
    # Whole brains as published, or two patches of every scan; a brain is compared with its mirror image as a whole.
    if network != SYMMETRY:
        patch = trial.suggest_categorical("views.crop_size", [None, 32])
        if patch is not None:
            settings |= {"views.pad_to": patch, "views.count": 2, "views.crop_on_class": 0.5}
    return settings | trial.params
