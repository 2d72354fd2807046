"""Views that keep left and right in their places: patches with their counterparts, and quarter turns.

System C (spec.md C.1). Suffixes: B subjects, S sides (a patch, then its counterpart), C channels, X, Y, Z.
Both functions take label maps like images: the same subjects, epoch and seed give the same places.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from core.errors import UserError
from core.volumes.images.mirror import DIRECTIONS, RAS, Direction, left_right_axis, world_axis
from core.volumes.images.nifti import Affine
from core.volumes.views.settings import Sides
from core.volumes.views.streams import Subjects, choices_of, stream_of


def mirrored_crops(
    volumes_bcxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    size: Sides,
    *,
    view: int = 0,
    affine: Affine = RAS,
    midline: float | None = None,
) -> torch.Tensor:
    """A random patch of each volume and its left-right counterpart, flipped: (B, 2, C, x, y, z), new.

    The patch is [a, b) on the left-right axis of X voxels, the counterpart [X - b, X - a) in reverse, so that
    one voxel of both lies at mirrored places; the same on the other axes.

    Args:
        volumes_bcxyz: volumes (B, C, X, Y, Z) of any dtype.
        subjects: (B,) whole numbers that identify the subjects.
        epoch: number of the epoch.
        seed: seed of the run.
        size: voxels of a patch along each axis, or of a cube.
        view: number of the view; each has places of its own.
        affine: 4x4 voxel-to-world, which says where left and right are.
        midline: the mid-sagittal plane in voxels along the left-right axis, such as `mirror.midline_voxel`
            finds; taken to the nearest half voxel, so that no value is interpolated. None: the grid's middle.

    Raises:
        UserError: a patch is larger than the grid, or than the part of it that has a counterpart.
    """
    grid = volumes_bcxyz.shape[2:]
    axis = left_right_axis(affine)
    sides = (size, size, size) if isinstance(size, int) else size
    # a voxel i lies opposite to `opposite` - i, and both must be on the grid
    opposite = grid[axis] - 1 if midline is None else math.floor(2 * midline + 0.5)
    first = np.zeros(3, int)
    room = np.array(grid)
    first[axis] = max(0, opposite + 1 - grid[axis])
    room[axis] = min(grid[axis], opposite + 1) - first[axis]
    if any(side > free for side, free in zip(sides, room, strict=True)):
        raise UserError(
            f"a patch of {' x '.join(map(str, sides))} voxels does not fit into the {' x '.join(map(str, room))} "
            f"that have a counterpart on a grid of {' x '.join(map(str, grid))}; make it smaller"
        )
    pairs = []
    for volume_cxyz, subject in zip(volumes_bcxyz, subjects, strict=True):
        at = choices_of(stream_of(seed, subject, epoch, view, "mirrored_crop")).random(3)
        near = first + (at * (room - sides + 1)).astype(int)
        far = near.copy()
        far[axis] = opposite + 1 - near[axis] - sides[axis]
        patch, counterpart = (
            volume_cxyz[:, *(slice(a, a + side) for a, side in zip(start, sides, strict=True))]
            for start in (near.tolist(), far.tolist())
        )
        pairs.append(torch.stack([patch, counterpart.flip(1 + axis)]))
    return torch.stack(pairs)


def quarter_turns(
    volumes: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    *,
    view: int = 0,
    about: Direction = "left_right",
    affine: Affine = RAS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each volume turned by 0 to 3 quarters, and by how many: the volumes, new, and labels (B,) int64.

    About the left-right direction the turn is in the plane of the other two, so left and right stay where
    they are, and a patch and its counterpart, turned alike, still mirror each other.

    Args:
        volumes: (B, …, X, Y, Z), any axes between, such as those of `mirrored_crops`, which turn together.
        subjects: (B,) whole numbers that identify the subjects.
        epoch: number of the epoch.
        seed: seed of the run.
        view: number of the view.
        about: the direction of the axis of rotation.
        affine: 4x4 voxel-to-world, which says which axis that is.

    Raises:
        UserError: the two sides in the plane of the turn differ.
    """
    plane = _plane_of(volumes, about, affine)
    turns = [
        int(choices_of(stream_of(seed, subject, epoch, view, "quarter_turn")).integers(4))
        for subject in subjects
    ]
    if len(turns) != len(volumes):
        raise ValueError(f"{len(volumes)} volumes for {len(turns)} subjects")
    label_b = torch.tensor(turns, dtype=torch.int64, device=volumes.device)
    turned = torch.stack(
        [torch.rot90(volume, turn, plane) for volume, turn in zip(volumes, turns, strict=True)]
    )
    return turned, label_b


def _plane_of(volumes: torch.Tensor, about: Direction, affine: Affine) -> list[int]:
    """The two array axes, counted from the end, in which a turn about `about` goes."""
    others: list[Direction] = [direction for direction in DIRECTIONS if direction != about]
    plane = [world_axis(affine, other) - 3 for other in others]
    first, second = (volumes.shape[axis] for axis in plane)
    if first != second:
        sides = " and ".join(other.replace("_", "-") for other in others)
        raise UserError(
            f"quarter turns about {about.replace('_', '-')} need equal {sides} sides, got {first} and {second} "
            "voxels; crop to patches of equal sides first"
        )
    return sorted(plane)
