"""Reading NIfTI files: voxels and geometry together, in one orientation, and an error that names the file."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from core.errors import UserError

Volume = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

MAX_VOXELS = 2**29  # 2 GB of float32; a whole head at 0.4 mm has a tenth of it
VOXEL_EDGES = (0.05, 50.0)  # mm: outside, the unit is wrong or the header damaged
_DEFLATE_LIMIT = 1032  # no deflate stream expands more than this (zlib's technical notes)
_SLACK = 2**20  # bytes that may follow the voxels
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, ArithmeticError, TypeError,
    MemoryError,
)  # fmt: skip


def read_volume(path: str | Path) -> tuple[Volume, Affine]:
    """Voxels (X, Y, Z) float32, slope and intercept applied, and the affine (4, 4) from voxel to mm.

    The axes are flipped and swapped, never interpolated, so that X runs as nearly as possible from left
    to right, Y to the front and Z up (canonical RAS); an oblique affine stays oblique. Raises UserError,
    naming the file, for anything that is not one finite, non-constant 3D volume with a usable affine.
    """
    path = Path(path)
    image = _open(path)
    shape = _checked_shape(path, image)
    _check_affine(path, image.affine)
    voxels = _voxels(path, image).reshape(shape)
    _check_values(path, voxels)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, image.affine))
    return np.ascontiguousarray(canonical.dataobj, dtype=np.float32), np.asarray(canonical.affine, np.float64)


def read_geometry(path: str | Path) -> tuple[tuple[int, int, int], Affine]:
    """Shape and affine as stored, from the header alone; the same UserErrors for them as `read_volume`."""
    path = Path(path)
    image = _open(path)
    shape = _checked_shape(path, image)
    _check_affine(path, image.affine)
    return shape, np.asarray(image.affine, np.float64)


def _open(path: Path) -> nib.Nifti1Image:
    """The image with its header read and its voxels still on disk."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a file; a NIfTI file (.nii or .nii.gz) is needed")
    try:
        image = nib.load(path, mmap=False)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not isinstance(image, nib.Nifti1Image):
        raise UserError(f"{path} is {type(image).__name__}, not NIfTI; convert it to .nii or .nii.gz")
    return image


def _checked_shape(path: Path, image: nib.Nifti1Image) -> tuple[int, int, int]:
    """The three spatial sizes, once it is plausible that the file holds what its header claims."""
    shape = tuple(int(size) for size in image.shape)
    if len(shape) > 3 and any(size != 1 for size in shape[3:]):
        raise UserError(f"{path} is {len(shape)}D with shape {shape}; one 3D volume is needed: extract one")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise UserError(f"{path} has shape {shape}; a 3D volume of at least 2 voxels a side is needed")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise UserError(f"{path} holds {dtype} voxels; integer or floating-point grey values are needed")
    # before anything is allocated: a forged header must not cost memory
    if math.prod(shape) > MAX_VOXELS:
        raise UserError(
            f"{path} claims shape {shape}, more than {MAX_VOXELS:,} voxels; is the header damaged?"
        )
    size = path.stat().st_size
    room = size * _DEFLATE_LIMIT if path.suffix == ".gz" else size
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > room:
        raise UserError(
            f"{path} claims {claimed:,} bytes of voxels (shape {shape}, {dtype}), but has only {size:,}; "
            "it is truncated or its header is damaged"
        )
    return shape[0], shape[1], shape[2]


def _check_affine(path: Path, affine: npt.NDArray[np.float64] | None) -> None:
    if affine is None or not np.isfinite(affine).all():
        raise UserError(f"{path} has an affine with values that are not numbers; mend its header")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    # volume of the voxel over that of a box with its edges: 1 for right angles, 0 for a flat voxel
    if edges.min() == 0 or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-3:
        raise UserError(f"{path} has a singular affine {affine[:3].tolist()}; its axes must span space")
    if edges.min() < VOXEL_EDGES[0] or edges.max() > VOXEL_EDGES[1]:
        raise UserError(
            f"{path} has voxels of {' x '.join(f'{edge:g}' for edge in edges)} mm; edges must be "
            f"{VOXEL_EDGES[0]:g} to {VOXEL_EDGES[1]:g} mm (is the unit of length wrong?)"
        )


def _voxels(path: Path, image: nib.Nifti1Image) -> Volume:
    try:
        if path.suffix == ".gz":
            image = _decompressed(path, image)
        return image.get_fdata(dtype=np.float32, caching="unchanged")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _decompressed(path: Path, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The image in memory, read to the end of the stream: only there gzip checks its CRC."""
    offset = cast(ArrayProxy, image.dataobj).offset
    claimed = offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    with gzip.open(path) as stream:
        content = stream.read(claimed + _SLACK + 1)
    if len(content) > claimed + _SLACK:  # a damaged stream, or one made to fill the memory
        raise UserError(f"{path} goes on after the {claimed:,} bytes that its header claims; it is damaged")
    return type(image).from_bytes(content)


def _check_values(path: Path, voxels: Volume) -> None:
    finite = np.isfinite(voxels)
    if not finite.all():
        raise UserError(
            f"{path} has {voxels.size - np.count_nonzero(finite)} NaN or infinite voxels; mend them"
        )
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        what = "is empty: every voxel is 0" if low == 0 else f"is constant: every voxel is {low:g}"
        raise UserError(f"{path} {what}")


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(
        f"{path} cannot be read as NIfTI ({reason}); it is truncated, damaged or of another kind"
    )
