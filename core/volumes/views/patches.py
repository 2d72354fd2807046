"""Blocks of a volume replaced by noise, then by another brain, which an inpainting task has to restore.

System C (spec.md C.1). Suffixes: B subjects, S sides (a patch and its mirror image), C channels, X, Y, Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.errors import UserError
from core.volumes.views.streams import Subjects, choices_of, standard_normal, stream_of


class PatchSettings(BaseModel):
    """How much is replaced, and by what; the defaults are the published ones but for `noise` and `overlaps`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="largest share of a volume that becomes noise; the share is uniform",
    )
    swap: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="largest share that is then taken from another volume of the batch",
    )
    smallest: float = Field(
        default=0.05, gt=0, le=1, description="shortest side of a block over the volume's"
    )
    largest: float = Field(default=0.25, gt=0, le=1, description="longest side of a block over the volume's")
    noise: Literal["matched", "unit"] = Field(
        default="matched",
        description="matched: Gaussian with mean and SD of the volume's non-zero voxels; unit: Gaussian "
        "stretched from 0 to 1, as published, for intensities from 0 to 1",
    )
    overlaps: Literal["once", "published"] = Field(
        default="once",
        description="once: voxels under several blocks count once; published: once for each block, so that "
        "less than the drawn share is replaced",
    )
    mirrors: bool = Field(
        default=False,
        description="whether mirror images are corrupted too; published: no, so that a network can copy from them",
    )

    @model_validator(mode="after")
    def _sides_in_order(self) -> PatchSettings:
        if self.smallest > self.largest:
            raise ValueError(f"smallest must not exceed largest, got {self.smallest:g} and {self.largest:g}")
        return self


def corrupt(
    volumes_bscxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    settings: PatchSettings,
    *,
    view: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`drop_patches`, then `swap_patches` with blocks of the uncorrupted volumes.

    Args:
        volumes_bscxyz: (B, S, C, X, Y, Z), S = 1, or 2 for patches with their counterparts
            (`mirror_image`). A mirror image has blocks of its own, and is left alone unless
            `settings.mirrors`.
        subjects: (B,) whole numbers that identify the subjects.
        epoch: number of the epoch.
        seed: seed of the run.
        settings: how much, and by what.
        view: number of the view.

    Returns:
        The corrupted volumes, new, and where they are: (B, S, X, Y, Z) bool.

    Raises:
        UserError: blocks are to be taken from others, and the batch holds one volume.
    """
    result_bscxyz = volumes_bscxyz.clone()
    sides, grid = volumes_bscxyz.shape[1], volumes_bscxyz.shape[3:]
    where_bsxyz = torch.zeros(
        (len(volumes_bscxyz), sides, *grid), dtype=torch.bool, device=volumes_bscxyz.device
    )
    for side in range(sides if settings.mirrors else 1):
        original_bcxyz = volumes_bscxyz[:, side]
        dropped_bcxyz, noisy_bxyz = drop_patches(
            original_bcxyz, subjects, epoch, seed, settings, view=view, side=side
        )
        swapped_bcxyz, foreign_bxyz = swap_patches(
            dropped_bcxyz, subjects, epoch, seed, settings, donors_bcxyz=original_bcxyz, view=view, side=side
        )
        result_bscxyz[:, side] = swapped_bcxyz
        where_bsxyz[:, side] = noisy_bxyz | foreign_bxyz
    return result_bscxyz, where_bsxyz


def drop_patches(
    volumes_bcxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    settings: PatchSettings,
    *,
    view: int = 0,
    side: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes in which blocks are noise, background included, and where: new, and (B, X, Y, Z) bool.

    Blocks are added until they cover a share of the volume drawn from uniform(0, `settings.drop`); the last
    one may go beyond it. `side` numbers several volumes of one subject.
    """
    streams = [stream_of(seed, subject, epoch, view, "drop", side) for subject in subjects]
    where_bxyz = _blocks(volumes_bcxyz, streams, settings.drop, settings)
    dropped_bcxyz = volumes_bcxyz.clone()
    for dropped_cxyz, where_xyz, stream in zip(dropped_bcxyz, where_bxyz, streams, strict=True):
        dropped_cxyz.masked_scatter_(where_xyz, _noise(dropped_cxyz, where_xyz, stream, settings))
    return dropped_bcxyz, where_bxyz


def swap_patches(
    volumes_bcxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    settings: PatchSettings,
    *,
    donors_bcxyz: torch.Tensor | None = None,
    view: int = 0,
    side: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes in which blocks come from the same place of another volume, and where: new, (B, X, Y, Z) bool.

    The one view that depends on the batch: each subject draws a number in [0, 1) from its own stream, and
    its donor stands at this fraction of the batch's *other* subjects in ascending order. So the order of the batch
    does not matter, but its subjects do; with several workers, those of the worker's share.

    Args:
        volumes_bcxyz: the volumes (B, C, X, Y, Z) to change; they stay as they are.
        subjects: (B,) different whole numbers.
        epoch: number of the epoch.
        seed: seed of the run.
        settings: how much.
        donors_bcxyz: where blocks are taken from; None: `volumes_bcxyz` themselves.
        view: number of the view.
        side: numbers several volumes of one subject.

    Raises:
        UserError: the batch holds no other subject.
    """
    streams = [stream_of(seed, subject, epoch, view, "swap", side) for subject in subjects]
    where_bxyz = _blocks(volumes_bcxyz, streams, settings.swap, settings)
    if settings.swap == 0:
        return volumes_bcxyz.clone(), where_bxyz
    known = [int(subject) for subject in subjects]
    if len(known) < 2:
        raise UserError(
            f"blocks cannot be taken from another volume in a batch of {len(known)}; use batches of 2 or more "
            "for each worker, or set swap to 0"
        )
    draws = [choices_of(stream_of(seed, subject, epoch, view, "donor", side)).random() for subject in known]
    donors = [_donor(known, row, draw) for row, draw in enumerate(draws)]
    taken_bcxyz = (volumes_bcxyz if donors_bcxyz is None else donors_bcxyz)[donors]
    return torch.where(where_bxyz[:, None], taken_bcxyz, volumes_bcxyz), where_bxyz


def _donor(subjects: Sequence[int], row: int, draw: float) -> int:
    """The row of the subject from which `row` takes."""
    others = sorted((subject, other) for other, subject in enumerate(subjects) if other != row)
    return others[int(draw * len(others))][1]


def _blocks(
    volumes_bcxyz: torch.Tensor,
    streams: Sequence[np.random.SeedSequence],
    share: float,
    settings: PatchSettings,
) -> torch.Tensor:
    """Where blocks lie, (B, X, Y, Z) bool: drawn on the CPU, so that they are the same on every device."""
    grid = volumes_bcxyz.shape[2:]
    masks = [block_mask(grid, share, choices_of(stream), settings) for stream in streams]
    return torch.from_numpy(np.stack(masks)).to(volumes_bcxyz.device)


def block_mask(
    grid: Sequence[int], share: float, choices: np.random.Generator, settings: PatchSettings
) -> npt.NDArray[np.bool_]:
    """Blocks of random place and sides, (X, Y, Z) bool, until a share uniform in (0, `share`) is covered."""
    mask = np.zeros(grid, dtype=bool)
    room = np.array(grid)
    wanted, covered = choices.uniform(0, share) * mask.size, 0
    while covered < wanted:
        sides = np.maximum(
            1, np.round(choices.uniform(settings.smallest, settings.largest, 3) * room).astype(int)
        )
        x, y, z = choices.integers(room - sides + 1)
        block = mask[x : x + sides[0], y : y + sides[1], z : z + sides[2]]
        covered += block.size - (int(np.count_nonzero(block)) if settings.overlaps == "once" else 0)
        block[...] = True
    return mask


def _noise(
    volume_cxyz: torch.Tensor,
    where_xyz: torch.Tensor,
    stream: np.random.SeedSequence,
    settings: PatchSettings,
) -> torch.Tensor:
    """Noise for the voxels of a volume that are replaced, (C, voxels), on the scale that `settings.noise` says."""
    noise_cn = standard_normal(volume_cxyz.new_empty(len(volume_cxyz), int(where_xyz.sum())), stream)
    if settings.noise == "unit":
        if noise_cn.numel() > 1:
            low, high = noise_cn.aminmax()
            noise_cn = (noise_cn - low) / (high - low)
        return noise_cn
    wide_cn = volume_cxyz.flatten(1).to(torch.promote_types(volume_cxyz.dtype, torch.float32))
    brain_cn = wide_cn.sign().abs_()
    voxels_c = brain_cn.sum(1, keepdim=True).clamp(min=1)
    mean_c = wide_cn.sum(1, keepdim=True) / voxels_c
    spread_c = ((wide_cn - mean_c).square_().mul_(brain_cn).sum(1, keepdim=True) / voxels_c).sqrt()
    # a channel of zeros has no scale of its own
    spread_c = torch.where(spread_c > 0, spread_c, 1)
    return noise_cn * spread_c.to(noise_cn.dtype) + mean_c.to(noise_cn.dtype)
