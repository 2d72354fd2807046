"""Random views of volumes: crop, cutout, noise. Shape suffixes: B subjects, V views, C channels, X, Y, Z.

Every view is a function of (seed, subject, epoch, view) alone, so it does not matter in which batch, in which
order or on which of several workers a subject is met.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field


class ViewSettings(BaseModel):
    """How views differ from the volume; the defaults change nothing, as in the published configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=2, ge=1, le=16, description="views of each volume (V)")
    crop: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of each side kept by a random crop, which is then centred in zeros on the full "
        "grid; the reference keeps about 0.9; none: no crop",
    )
    cutout: float = Field(
        default=0.0, ge=0, le=1, description="probability of zeroing one block; reference 0.5"
    )
    cutout_size: float = Field(
        default=0.35,
        gt=0,
        le=1,
        description="side of the cutout cube as a fraction of the grid's shortest side; reference 32 of 91",
    )
    noise: float = Field(
        default=0.0, ge=0, description="SD of additive Gaussian noise, in units of the volume; reference 0.05"
    )

    @property
    def change_nothing(self) -> bool:
        """Whether every view is the volume itself."""
        return self.crop in (None, 1.0) and self.cutout == 0 and self.noise == 0


def make_views(
    volumes_bcxyz: torch.Tensor,
    subjects: Sequence[int] | np.ndarray | torch.Tensor,
    epoch: int,
    seed: int,
    settings: ViewSettings,
) -> torch.Tensor:
    """`settings.count` random views of each volume, on the volumes' device.

    Args:
        volumes_bcxyz: volumes (B, C, X, Y, Z), floating point, 0 outside the brain.
        subjects: (B,) whole numbers that identify the subjects, such as rows of the cohort; not negative.
        epoch: number of the epoch, not negative; a subject gets new views in each.
        seed: seed of the run, not negative.
        settings: what is done, in the order noise, cutout, crop, so that cut and padded voxels are exactly 0.

    Returns:
        (B, V, C, X, Y, Z), a new tensor of the volumes' dtype. Crops and cutouts are the same on all devices;
        noise is the same on every device of one type.
    """
    views = settings.count
    if settings.change_nothing:
        return volumes_bcxyz.unsqueeze(1).repeat(1, views, 1, 1, 1, 1)
    out_bvcxyz = torch.zeros(
        (volumes_bcxyz.shape[0], views, *volumes_bcxyz.shape[1:]),
        dtype=volumes_bcxyz.dtype,
        device=volumes_bcxyz.device,
    )
    for row, (volume_cxyz, subject) in enumerate(zip(volumes_bcxyz, subjects, strict=True)):
        for view in range(views):
            stream = np.random.SeedSequence((seed, int(subject), epoch, view))
            _write_view(out_bvcxyz[row, view], volume_cxyz, stream, settings)
    return out_bvcxyz


def _write_view(
    out_cxyz: torch.Tensor, volume_cxyz: torch.Tensor, stream: np.random.SeedSequence, settings: ViewSettings
) -> None:
    """Fill `out_cxyz`, which holds zeros, with one view of `volume_cxyz`."""
    # Every choice is drawn whether used or not: switching the crop on leaves the cutouts where they were.
    corner, cut_corner, chance = np.split(np.random.default_rng(stream).random(7), [3, 6])
    grid = volume_cxyz.shape[1:]
    source = _block(grid, [max(1, round((settings.crop or 1.0) * side)) for side in grid], corner)
    offsets = [(side - (kept.stop - kept.start)) // 2 for side, kept in zip(grid, source, strict=True)]
    target = [
        slice(offset, offset + kept.stop - kept.start) for offset, kept in zip(offsets, source, strict=True)
    ]
    kept_cxyz = out_cxyz[:, target[0], target[1], target[2]]
    kept_cxyz.copy_(volume_cxyz[:, source[0], source[1], source[2]])
    if settings.noise > 0:
        kept_cxyz.add_(_standard_normal(kept_cxyz, stream), alpha=settings.noise)
    if chance[0] < settings.cutout:
        cube = max(1, round(settings.cutout_size * min(grid)))
        cut = _block(grid, [cube, cube, cube], cut_corner)
        inside = [
            slice(max(block.start - kept.start, 0), max(block.stop - kept.start, 0))
            for block, kept in zip(cut, source, strict=True)
        ]
        kept_cxyz[:, inside[0], inside[1], inside[2]] = 0


def _block(grid: Sequence[int], sides: Sequence[int], corner: np.ndarray) -> list[slice]:
    """The block of `sides` voxels whose corner lies at the fraction `corner`, in [0, 1), of the free room."""
    starts = [int(at * (side - kept + 1)) for side, kept, at in zip(grid, sides, corner, strict=True)]
    return [slice(start, start + kept) for start, kept in zip(starts, sides, strict=True)]


def _standard_normal(like: torch.Tensor, stream: np.random.SeedSequence) -> torch.Tensor:
    generator = torch.Generator(device=like.device)
    generator.manual_seed(
        int(stream.generate_state(5, np.uint64)[4])
    )  # the first four seed the choices above
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
