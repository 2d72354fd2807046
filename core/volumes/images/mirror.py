"""Left and right: the axis of an array along which they lie, the plane between them, and the mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import nibabel as nib
import numpy as np
import torch

from core.errors import UserError
from core.volumes.images.nifti import Affine

RAS = np.diag([1.0, 1.0, 1.0, 1.0])

Direction = Literal["left_right", "front_back", "up_down"]

DIRECTIONS: dict[Direction, str] = {"left_right": "LR", "front_back": "PA", "up_down": "IS"}
"""The world's three directions, and nibabel's letters for their ends."""


def world_axis(affine: Affine, direction: Direction) -> int:
    """The spatial axis (0, 1 or 2) that runs along `direction`, from the voxel-to-world affine.

    Raises:
        UserError: there is none, as in a singular affine.
    """
    codes = nib.orientations.aff2axcodes(affine)
    axes = [axis for axis, code in enumerate(codes) if code is not None and code in DIRECTIONS[direction]]
    if not axes:
        raise UserError(
            f"the affine has no {direction.replace('_', '-')} axis (axes are {codes}); is it singular?"
        )
    return axes[0]


def mirror_image(volumes_bcxyz: torch.Tensor, opposite_b: Sequence[int] | None = None) -> torch.Tensor:
    """The volumes with left and right exchanged about the middle of each head, which need not be that of the grid.

    Args:
        volumes_bcxyz: (B, C, X, Y, Z) in RAS order, 0 outside the head.
        opposite_b: of every volume the o for which voxel i of X lies opposite to voxel o - i; as `opposite_voxels`
            finds it if absent. What has no counterpart on the grid is 0.
    """
    found = opposite_voxels(volumes_bcxyz) if opposite_b is None else opposite_b
    flipped_bcxyz = volumes_bcxyz.flip(2)
    last = volumes_bcxyz.shape[2] - 1
    if all(opposite == last for opposite in found):
        return flipped_bcxyz
    mirrored_bcxyz = torch.zeros_like(flipped_bcxyz)
    for mirrored_cxyz, flipped_cxyz, opposite in zip(mirrored_bcxyz, flipped_bcxyz, found, strict=True):
        by = opposite - last
        into, of = slice(max(by, 0), last + 1 + min(by, 0)), slice(max(-by, 0), last + 1 - max(by, 0))
        mirrored_cxyz[:, into] = flipped_cxyz[:, of]
    return mirrored_bcxyz


def opposite_voxels(volumes_bcxyz: torch.Tensor) -> list[int]:
    """For every volume the o (B,) for which its head fits its mirror image best, in which voxel o - i of X is voxel i.

    The most voxels that lie in the head and opposite to a voxel of it, for all o at once by a Fourier transform along
    X: the middle of the head to half a voxel, where the head is upright. `ingest --midline` turns heads that are not.
    What is bright has no part in it: a lesion on one side must not move the middle.

    Args:
        volumes_bcxyz: (B, C, X, Y, Z) in RAS order, 0 outside the head; of a volume of zeros it is the grid's middle.
    """
    last = volumes_bcxyz.shape[2] - 1
    inside_bxyz = (volumes_bcxyz.detach() != 0).any(dim=1).float()
    spectrum = torch.fft.rfft(inside_bxyz, n=2 * (last + 1), dim=1)
    alike_bo = torch.fft.irfft(spectrum * spectrum, n=2 * (last + 1), dim=1).sum(dim=(2, 3))[
        :, : 2 * last + 1
    ]
    highest_b1 = alike_bo.amax(dim=1, keepdim=True)
    # Of equal ones the nearest to the middle of the grid.
    distance_o = (torch.arange(2 * last + 1, device=alike_bo.device) - last).abs()
    is_highest_bo = alike_bo >= highest_b1 - 1e-5 * highest_b1.abs()
    found: list[int] = torch.where(is_highest_bo, distance_o, 4 * last + 4).argmin(dim=1).tolist()
    return found
