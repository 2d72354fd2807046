"""Trilinear resampling and brain placement, voxel by voxel, from the definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np


def trilinear(
    voxels: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Value at each target voxel's place in mm, 0 beyond the source; zero voxels count as "no data".

    The weighted mean of the non-zero corners among the eight around the place, where they hold at least
    half of the weight; else 0.
    """
    result = np.zeros(shape)
    to_source = np.linalg.inv(affine)
    for index in itertools.product(*(range(size) for size in shape)):
        place = to_source @ (target @ np.array([*index, 1.0]))
        corner = [math.floor(coordinate) for coordinate in place[:3]]
        total = weight = 0.0
        for step in itertools.product((0, 1), repeat=3):
            at = tuple(c + s for c, s in zip(corner, step, strict=True))
            if any(a < 0 or a >= size for a, size in zip(at, voxels.shape, strict=True)) or voxels[at] == 0:
                continue
            share = math.prod(1 - abs(place[axis] - at[axis]) for axis in range(3))
            total += share * float(voxels[at])
            weight += share
        if weight >= 0.5:
            result[index] = total / weight
    return result


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rotation matrix (3, 3) by angles in radians about X, then Y, then Z."""
    cos, sin = math.cos, math.sin
    about_x = np.array([[1, 0, 0], [0, cos(x), -sin(x)], [0, sin(x), cos(x)]])
    about_y = np.array([[cos(y), 0, sin(y)], [0, 1, 0], [-sin(y), 0, cos(y)]])
    about_z = np.array([[cos(z), -sin(z), 0], [sin(z), cos(z), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def affine_of(edges: list[float], origin: list[float], turn: np.ndarray | None = None) -> np.ndarray:
    """Affine (4, 4): `turn` after scaling by `edges` (mm, negative for a flipped axis), then `origin`."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag(edges)
    affine[:3, 3] = origin
    return affine
