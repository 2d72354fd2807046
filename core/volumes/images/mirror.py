"""Left and right: the axis of an array along which they lie, the plane between them, and the mirror image."""

from __future__ import annotations

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


def left_right_axis(affine: Affine) -> int:
    """The spatial axis (0, 1 or 2) that runs left-right in the world, from the voxel-to-world affine."""
    return world_axis(affine, "left_right")


def mirror(volume: torch.Tensor, affine: Affine = RAS) -> torch.Tensor:
    """The volume with left and right exchanged.

    Args:
        volume: (..., X, Y, Z), any leading axes.
        affine: 4x4 voxel-to-world; the default is this project's own orientation, RAS, where X is left-right.
    """
    return volume.flip(volume.ndim - 3 + left_right_axis(affine))


def midline_offset(affine: Affine, shape: tuple[int, int, int]) -> float:
    """Distance in mm from the grid's middle plane, about which `mirror` works, to the world's x = 0.

    In a template space x = 0 is the mid-sagittal plane: more than about a voxel of offset means that
    left and right halves are not each other's mirror image.
    """
    middle = np.array([*(side - 1 for side in shape), 2.0]) / 2
    return float((affine @ middle)[0])


def midline_voxel(affine: Affine, shape: tuple[int, int, int]) -> float:
    """Where the world's x = 0 cuts the left-right axis, in voxels, on the line through the grid's middle.

    (side - 1) / 2 where the grid's middle plane is the mid-sagittal one.
    """
    axis = left_right_axis(affine)
    return (shape[axis] - 1) / 2 - midline_offset(affine, shape) / float(affine[0, axis])
