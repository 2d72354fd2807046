"""The losses by name, and the field type with which a run configuration embeds any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from core.losses.dense import ConstrainedContrast
from core.losses.members import (
    L1,
    MSE,
    Exponential,
    LossSettings,
    RankNContrast,
    SimCLR,
    SupCon,
    Threshold,
    YAware,
)
from core.losses.pretext import Anatomical, Inpainting, Rotation, Symmetry

# Called as loss(embeddings (B, V, D), labels (B,) or None, progress). To add one, add its line.
LOSSES: dict[str, type[LossSettings]] = {
    "simclr": SimCLR,
    "supcon": SupCon,
    "y_aware": YAware,
    "threshold": Threshold,
    "exponential": Exponential,
    "rank_n_contrast": RankNContrast,
}

# Called the same way, on predictions (B, V, 1).
REGRESSION_LOSSES: dict[str, type[LossSettings]] = {"l1": L1, "mse": MSE}

# What these are called with differs; each says so in its `build`.
TASK_LOSSES: dict[str, type[LossSettings]] = {
    "constrained_contrast": ConstrainedContrast,
    "anatomical": Anatomical,
    "symmetry": Symmetry,
    "rotation": Rotation,
    "inpainting": Inpainting,
}

if TYPE_CHECKING:
    ObjectiveSettings = LossSettings
else:
    ObjectiveSettings = Annotated[
        Union[tuple((LOSSES | REGRESSION_LOSSES).values())],  # noqa: UP007 - a union of what the dictionaries hold
        Field(discriminator="name"),
    ]
"""A pydantic field type: the settings of any objective, chosen by `name`."""
