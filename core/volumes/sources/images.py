"""Reading one image of a scan, NIfTI file or row of an array, with the same checks and in the same orientation."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np

from core.errors import UserError
from core.volumes.images import nifti
from core.volumes.images.nifti import (
    MAX_VOXELS,
    Affine,
    Volume,
    check_values,
    read_geometry,
    read_volume,
)
from core.volumes.sources.arrays import map_array, read_header
from core.volumes.sources.files import checked_file
from core.volumes.sources.listing import ImageFile


def read_image(file: ImageFile, *, may_be_constant: bool = False) -> tuple[Volume, Affine]:
    """Voxels (X, Y, Z) float32 in canonical RAS and the affine (4, 4) from voxel to mm.

    Raises UserError, naming file and row, for anything that is not one finite 3D volume with a usable affine,
    nor constant unless it `may_be_constant`. See `core.volumes.images.nifti.read_volume`.
    """
    if file.path.suffix != ".npy":
        return read_volume(checked_file(file.path), may_be_constant=may_be_constant, frame=file.row)
    shape, affine = read_image_geometry(file)
    array = map_array(file.path)
    stored = array if file.row is None else array[file.row]
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is named as such below
        voxels = np.asarray(stored, dtype=np.float32).reshape(shape)
    check_values(_name(file), voxels, may_be_constant)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    return np.ascontiguousarray(canonical.dataobj, dtype=np.float32), np.asarray(canonical.affine, np.float64)


def read_image_geometry(file: ImageFile) -> tuple[tuple[int, int, int], Affine]:
    """Shape and affine as stored, from the header alone; the same UserErrors for them as `read_image`."""
    if file.path.suffix != ".npy":
        return read_geometry(checked_file(file.path), file.row)
    shape = read_header(file.path).shape
    if file.row is not None:
        if not 0 <= file.row < shape[0]:
            raise UserError(f"{file.path} has rows 0 to {shape[0] - 1}, but row {file.row} is asked for")
        shape = shape[1:]
    if len(shape) < 3 or any(size != 1 for size in shape[:-3]) or min(shape[-3:]) < 2:
        raise UserError(f"{_name(file)} has shape {shape}; one 3D volume is needed")
    if math.prod(shape) > MAX_VOXELS:
        raise UserError(f"{_name(file)} has shape {shape}, more than {MAX_VOXELS:,} voxels")
    return (shape[-3], shape[-2], shape[-1]), _checked_affine(file)


def trailing_axes(file: ImageFile) -> tuple[int, ...]:
    """The axes behind the third, each of length 1, that some NIfTI files have."""
    if file.path.suffix == ".npy" or file.row is not None:
        return ()
    return tuple(nifti.read_header(file.path).get_data_shape()[3:])


def _checked_affine(file: ImageFile) -> Affine:
    affine = np.asarray(file.affine if file.affine is not None else np.nan, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{_name(file)} needs an affine of 4 x 4 numbers whose axes span space")
    return affine


def _name(file: ImageFile) -> str:
    return f"{file.path}" if file.row is None else f"{file.path} row {file.row}"
