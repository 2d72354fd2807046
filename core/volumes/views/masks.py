"""Blocks of a volume set to 0, which masked autoencoding has to fill (He et al. 2022, arXiv 2111.06377).

Suffixes: B subjects, C channels, X, Y, Z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from core.errors import UserError
from core.volumes.views.streams import Subjects, choices_of, stream_of


class MaskSettings(BaseModel):
    """How much of a volume is hidden, and in which pieces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of the blocks that are hidden")
    block: int = Field(default=4, ge=1, description="side of a block, in voxels")


def hide_blocks(
    volumes_bcxyz: torch.Tensor, subjects: Subjects, epoch: int, seed: int, settings: MaskSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The volumes with hidden voxels set to 0, new, and where these are (B, 1, X, Y, Z) bool.

    A function of (seed, subject, epoch) alone; every channel is hidden at the same places.

    Args:
        volumes_bcxyz: (B, C, X, Y, Z).
        subjects: (B,) whole numbers that identify the subjects.
        epoch: number of the epoch.
        seed: seed of the run.
        settings: how much, in which pieces.
    """
    grid = volumes_bcxyz.shape[2:]
    masks = [
        _mask(grid, choices_of(stream_of(seed, int(subject), epoch, 0, "mask")), settings)
        for subject in subjects
    ]
    hidden_b1xyz = torch.from_numpy(np.stack(masks)).to(volumes_bcxyz.device)[:, None]
    return volumes_bcxyz.masked_fill(hidden_b1xyz, 0), hidden_b1xyz


def _mask(grid: Sequence[int], choices: np.random.Generator, settings: MaskSettings) -> npt.NDArray[np.bool_]:
    """Where a volume (X, Y, Z) is hidden: a share of its blocks, at least one of them and never all."""
    blocks = [math.ceil(side / settings.block) for side in grid]
    count = math.prod(blocks)
    if count < 2:
        raise UserError(
            f"masks.block={settings.block} is as large as a volume of {' x '.join(map(str, grid))} voxels, so nothing "
            "of it would be left; use a smaller one"
        )
    hidden = np.zeros(count, dtype=bool)
    hidden[choices.permutation(count)[: min(max(1, round(settings.ratio * count)), count - 1)]] = True
    mask = hidden.reshape(blocks)
    for axis, side in enumerate(grid):
        mask = mask.repeat(settings.block, axis)
        mask = mask.take(np.arange(side), axis)
    return mask
