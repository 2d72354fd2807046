"""Views that keep left and right in their places: quarter turns.

System C (spec.md C.1). Suffixes: B subjects, C channels, X, Y, Z.
"""

from __future__ import annotations

import torch

from core.errors import UserError
from core.volumes.images.mirror import DIRECTIONS, RAS, Direction, world_axis
from core.volumes.images.nifti import Affine
from core.volumes.views.streams import Subjects, choices_of, stream_of


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
        volumes: (B, …, X, Y, Z), any axes between, such as the two sides of a head, which turn together.
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
