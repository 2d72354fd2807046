"""Resampling to another grid in the same mm: images by linear weights, label maps by the nearest voxel."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from scipy import ndimage

from core.volumes.images.nifti import Affine, Volume

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int16]
Shape = tuple[int, int, int]

_TRUNCATE = 4.0  # SDs after which the Gaussian is cut off, as scipy does by default


class Resampled(NamedTuple):
    """An image on another grid, and where it is known there."""

    voxels: Volume
    """(X, Y, Z), exactly 0 outside."""
    inside: Mask
    """(X, Y, Z): at least half of a voxel's weight comes from inside the source's mask."""


def resample(
    voxels: Volume,
    affine: Affine,
    target: Affine,
    shape: Shape,
    mask: Mask | None = None,
    interpolation: Literal["linear", "bspline"] = "linear",
) -> Resampled:
    """Values of an image (X, Y, Z) at the voxels of another grid; `target` maps its voxels to the image's mm.

    Linear interpolation, after smoothing by the blur that coarser voxels add:
    a Gaussian of FWHM sqrt(new^2 - old^2) mm on each axis (Cardoso et al., "Scale factor point spread
    function matching", MICCAI 2015). Values and mask (by default the non-zero voxels) are treated alike and
    then divided (normalised convolution, Knutsson and Westin 1993), so the edge of the brain
    is not darkened by the background, and the background stays exactly 0. On its own grid a volume stays
    the same, bit by bit.

    With `bspline` values are those of a cubic spline through all voxels, background included (system B), of an image
    that was smoothed in the same way; outside the mask they are 0 again.
    """
    mask = voxels != 0 if mask is None else mask
    to_source = np.linalg.inv(affine) @ target
    old, new = voxel_sizes(affine), voxel_sizes(target)
    sigma = np.sqrt(np.maximum(new**2 - old**2, 0)) / math.sqrt(8 * math.log(2)) / old
    # only the box around the mask, with the reach of smoothing around it, affects the result
    box = bounding_box(mask, np.ceil(_TRUNCATE * sigma).astype(int) + 2)
    to_box = to_source.copy()
    to_box[:3, 3] -= [part.start for part in box]
    known = mask[box].astype(np.float32)
    weight = _interpolated(known, sigma, to_box, shape)
    inside = weight >= 0.5
    if interpolation == "bspline":
        smooth = ndimage.gaussian_filter(voxels, sigma, truncate=_TRUNCATE) if sigma.any() else voxels
        spline = ndimage.affine_transform(
            smooth, to_source, output_shape=shape, order=3, mode="constant", output=np.float32
        )
        return Resampled(np.where(inside, spline, np.float32(0)), inside)
    values = _interpolated(np.where(mask[box], voxels[box], np.float32(0)), sigma, to_box, shape)
    return Resampled(np.divide(values, weight, out=np.zeros(shape, dtype=np.float32), where=inside), inside)


def resample_labels(labels: Labels, affine: Affine, target: Affine, shape: Shape) -> Labels:
    """Class of the nearest voxel at each voxel of another grid, 0 beyond the map; no class is invented."""
    nearest: Labels = ndimage.affine_transform(
        labels, np.linalg.inv(affine) @ target, output_shape=shape, order=0, mode="grid-constant"
    )
    return nearest


def bounding_box(
    mask: Mask, margin: npt.NDArray[np.int64] | int = 0
) -> tuple[slice[int, int], slice[int, int], slice[int, int]]:
    """The box around the mask and `margin` voxels on each axis, within the volume; one voxel for an empty mask."""
    margins = np.broadcast_to(margin, 3)
    slices = []
    for axis in range(3):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = (occupied[0], occupied[-1] + 1) if occupied.size else (0, 1)
        slices.append(
            slice(int(max(0, low - margins[axis])), int(min(mask.shape[axis], high + margins[axis])))
        )
    return slices[0], slices[1], slices[2]


def _interpolated(voxels: Volume, sigma: npt.NDArray[np.float64], to_source: Affine, shape: Shape) -> Volume:
    """Values at another grid, smoothed by `sigma` (in voxels) before, 0 beyond the volume.

    Where the axes of both grids are parallel, smoothing and interpolation of an axis are one small matrix.
    """
    matrix, shift = to_source[:3, :3], to_source[:3, 3]
    if np.array_equal(matrix, np.diag(np.diag(matrix))):
        for axis in range(3):
            along = _weights(voxels.shape[axis], shape[axis], sigma[axis], matrix[axis, axis], shift[axis])
            voxels = np.moveaxis(np.tensordot(along, voxels, axes=(1, axis)), 0, axis)
        return voxels
    if sigma.any():
        voxels = ndimage.gaussian_filter(voxels, sigma, mode="constant", truncate=_TRUNCATE)
    interpolated: Volume = ndimage.affine_transform(
        voxels, to_source, output_shape=shape, order=1, mode="grid-constant", output=np.float32
    )
    return interpolated


def _weights(old: int, new: int, sigma: float, step: float, shift: float) -> npt.NDArray[np.float32]:
    """(new, old): how much each old voxel of a line gives to each new one, 0 beyond the ends."""
    places = step * np.arange(new) + shift
    below = np.floor(places).astype(np.int64)
    linear = np.zeros((new, old))
    for neighbour, weight in ((below, 1 - (places - below)), (below + 1, places - below)):
        rows = np.flatnonzero((neighbour >= 0) & (neighbour < old))
        linear[rows, neighbour[rows]] += weight[rows]
    if sigma > 0:
        smooth = ndimage.gaussian_filter1d(np.eye(old), sigma, axis=0, mode="constant", truncate=_TRUNCATE)
        linear = linear @ smooth
    return linear.astype(np.float32)
