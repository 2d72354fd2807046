"""Small affine movements of volumes, on their device. Suffixes: N volumes, C channels, X, Y, Z."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation


def movement(
    degrees: npt.NDArray[np.float64], size: float, voxels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The affine (3, 4) that says, for a voxel of the view, where in the volume its value comes from.

    Args:
        degrees: (3,) rotations about the axes X, Y, Z of the array, one after another.
        size: 1.1 shows the brain larger by 10 %.
        voxels: (3,) how far the brain moves along X, Y, Z.
    """
    back = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix().T / size
    return np.hstack([back, -(back @ voxels)[:, None]])


def move(volumes_ncxyz: torch.Tensor, source_n34: npt.NDArray[np.float64]) -> torch.Tensor:
    """Volumes read at other places, linearly interpolated, 0 from beyond the grid: (N, C, X, Y, Z), new.

    Args:
        volumes_ncxyz: floating point; half precision is computed in float32.
        source_n34: affines from voxels of the result to voxels of the volumes, both counted from the
            middle of the grid. Voxels are taken for cubes, as a cohort's are.
    """
    dtype = volumes_ncxyz.dtype
    wide = volumes_ncxyz if dtype in (torch.float32, torch.float64) else volumes_ncxyz.float()
    return F.grid_sample(wide, _places(wide, source_n34), align_corners=False).to(dtype)


def move_maps(maps_nmxyz: torch.Tensor, source_n34: npt.NDArray[np.float64]) -> torch.Tensor:
    """Maps of classes (N, M, X, Y, Z) read at the same places as by `move`: the class of the nearest voxel, or 0."""
    wide = maps_nmxyz.float()
    read = F.grid_sample(wide, _places(wide, source_n34), mode="nearest", align_corners=False)
    return read.to(maps_nmxyz.dtype)


def _places(volumes_ncxyz: torch.Tensor, source_n34: npt.NDArray[np.float64]) -> torch.Tensor:
    """`source_n34` for every voxel, as torch's grid_sample wants it: (N, X, Y, Z, 3), z first, in [-1, 1].

    `F.affine_grid` gives the same to rounding by a matrix product, which takes several times as long and
    whose last bit may depend on how many volumes come together. Sums of what each axis contributes do not.
    """
    grid = volumes_ncxyz.shape[2:]
    halves = np.array(grid) / 2
    relative_n34 = (source_n34 / halves[:, None])[:, ::-1]
    x_n3i, y_n3i, z_n3i = (
        torch.from_numpy(relative_n34[:, :, axis, None] * (np.arange(side) - (side - 1) / 2)).transpose(1, 2)
        for axis, side in enumerate(grid)
    )
    x_n3i = x_n3i + torch.from_numpy(relative_n34[:, None, :, 3].copy())
    x_n3i, y_n3i, z_n3i = (part.to(volumes_ncxyz) for part in (x_n3i, y_n3i, z_n3i))
    plane = x_n3i[:, :, None] + y_n3i[:, None]
    places = torch.empty(*plane.shape[:3], grid[2], 3, dtype=plane.dtype, device=plane.device)
    return torch.add(plane[:, :, :, None], z_n3i[:, None, None], out=places)
