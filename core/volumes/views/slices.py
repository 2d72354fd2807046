"""Slices sampled by partition of the body, and 2D views of slices.

System D (spec.md C.3, D.3; Chaitanya et al., arXiv 2006.10511). Suffixes: B subjects, P partitions, V views,
C channels, H, W the two sides of a slice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.errors import UserError
from core.volumes.images.mirror import RAS, Direction, world_axis
from core.volumes.images.nifti import Affine
from core.volumes.views.intensity import recolour
from core.volumes.views.streams import Subjects, choices_of, stream_of


class SampledSlices(NamedTuple):
    """One slice of every partition of every volume."""

    slices_bpchw: torch.Tensor
    partition_bp: torch.Tensor
    """Number of the partition, int64, as the anatomical loss wants it (flattened)."""
    index_bp: torch.Tensor
    """Where on its axis the slice lies, int64."""


def partition_slices(
    volumes_bcxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    parts: int,
    *,
    along: Direction = "up_down",
    view: int = 0,
    affine: Affine = RAS,
) -> SampledSlices:
    """One random slice from each of `parts` runs of neighbouring slices, as equal as whole numbers allow.

    Args:
        volumes_bcxyz: volumes (B, C, X, Y, Z).
        subjects: (B,) whole numbers that identify the subjects.
        epoch: number of the epoch.
        seed: seed of the run.
        parts: how many partitions (P); the longer ones come first, as with `numpy.array_split`.
        along: the direction that is partitioned; H and W are the other two axes of the array, in order.
        view: number of the view.
        affine: 4x4 voxel-to-world, which says which axis lies along it.

    Returns:
        The slices, new, and for each its partition, counted along the axis from 0, and its index.

    Raises:
        UserError: there are fewer slices than partitions.
    """
    axis = world_axis(affine, along)
    side = volumes_bcxyz.shape[2 + axis]
    if not 1 <= parts <= side:
        raise UserError(f"{parts} partitions cannot be made of {side} slices; choose 1 to {side}")
    ends = np.cumsum([0, *(len(run) for run in np.array_split(np.arange(side), parts))])
    index_bp = np.stack(
        [
            ends[:-1]
            + (choices_of(stream_of(seed, subject, epoch, view, "slice")).random(parts) * np.diff(ends))
            for subject in subjects
        ]
    ).astype(np.int64)
    slices_bpchw = torch.stack(
        [
            volume_cxyz.movedim(1 + axis, 0)[torch.from_numpy(index_p).to(volume_cxyz.device)]
            for volume_cxyz, index_p in zip(volumes_bcxyz, index_bp, strict=True)
        ]
    )
    index = torch.from_numpy(index_bp).to(volumes_bcxyz.device)
    return SampledSlices(slices_bpchw, torch.arange(parts, device=index.device).expand_as(index), index)


class SliceViewSettings(BaseModel):
    """How 2D views differ from the slice; the defaults change nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=2, ge=1, le=16, description="views of each slice (V)")
    original: bool = Field(
        default=False, description="whether the slice itself comes first, before the views; published: yes"
    )
    window: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="side of a random window over the slice's, stretched to the full size; published 100 / 160",
    )
    corner: tuple[float, float] | None = Field(
        default=None,
        description="from where to where the window's near corner lies, over the slice's side; a window that "
        "would go beyond the slice ends there; none: wherever it fits; published 10 / 160 to 69 / 160",
    )
    brightness: float = Field(
        default=0.0, ge=0, description="largest amount added, in units of the volume; published 0.5"
    )
    contrast: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="largest relative change of the distance of intensities to their mean; published 0.3",
    )

    @model_validator(mode="after")
    def _corner_acts(self) -> SliceViewSettings:
        if self.corner is None:
            return self
        if self.window is None:
            raise ValueError("corner acts only with window, got none")
        if not 0 <= self.corner[0] <= self.corner[1] < 1:
            raise ValueError(f"corner must be two fractions in [0, 1) in ascending order, got {self.corner}")
        return self


def slice_views(
    slices_bpchw: torch.Tensor, subjects: Subjects, epoch: int, seed: int, settings: SliceViewSettings
) -> torch.Tensor:
    """Random views (B, P, V, C, H, W) of slices (B, P, C, H, W), new; V is one more with `settings.original`.

    A window is stretched linearly, so that background beside brain gets values between; brightness and
    contrast keep exact zeros (`recolour`). Windows come from the stream of (seed, subject, epoch, view,
    partition), drawn whether used or not.
    """
    side_h, side_w = slices_bpchw.shape[3:]
    rows = []
    for slices_pchw, subject in zip(slices_bpchw, subjects, strict=True):
        for part, slice_chw in enumerate(slices_pchw):
            views = [slice_chw] if settings.original else []
            for view in range(settings.count):
                draws = choices_of(stream_of(seed, subject, epoch, view, "slice_view", part)).random(4)
                seen_chw = slice_chw
                if settings.window is not None:
                    low_h, high_h = _window(side_h, draws[0], settings.window, settings.corner)
                    low_w, high_w = _window(side_w, draws[1], settings.window, settings.corner)
                    seen_chw = F.interpolate(
                        slice_chw[None, :, low_h:high_h, low_w:high_w].float(),
                        (side_h, side_w),
                        mode="bilinear",
                    )[0].to(slice_chw.dtype)
                if settings.brightness > 0 or settings.contrast > 0:
                    brightness, contrast = (2 * draws[2:] - 1) * (settings.brightness, settings.contrast)
                    seen_chw = recolour(seen_chw, shift=brightness, contrast=1 + contrast)
                views.append(seen_chw)
            rows.append(torch.stack(views))
    views_nvchw = torch.stack(rows)
    return views_nvchw.view(*slices_bpchw.shape[:2], *views_nvchw.shape[1:])


def _window(side: int, draw: float, share: float, corner: tuple[float, float] | None) -> tuple[int, int]:
    """First voxel and the one after the last of a window on a side."""
    length = max(1, round(share * side))
    low, high = (0, side - length) if corner is None else (math.floor(at * side + 0.5) for at in corner)
    start = min(low + int(draw * (high - low + 1)), side - 1)
    return start, min(start + length, side)
