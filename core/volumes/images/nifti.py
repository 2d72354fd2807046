"""Reading NIfTI files: voxels and geometry together, in one orientation, and an error that names the file.

The first bytes of a file decide its kind, not its name, and what a header claims is first compared with the
size of the file: a damaged or forged header must cost neither memory nor time. Extensions of headers are not
read.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import os
import stat
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from core.errors import UserError

Volume = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

MAX_VOXELS = 2**29  # 2 GB of float32; a whole head at 0.4 mm has a tenth of it
VOXEL_EDGES = (0.05, 50.0)  # mm: outside, the unit is wrong or the header damaged
DECLARED_EDGES = (0.001, 50.0)
"""The same where the header itself declares metres or micrometres."""
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
"""What a header's unit of length is in mm; most tools that write none mean mm."""
# nibabel's own logger would print small faults of headers without naming the file
_LOGGER = logging.getLogger(__name__)
_LOGGER.addHandler(logging.NullHandler())
_HEADERS: tuple[type[nib.Nifti1Header], ...] = (nib.Nifti1Header, nib.Nifti2Header)
_HEADER_ERROR = 40  # level of nibabel: faults that it can only correct by guessing
_LONGEST_HEADER = 540  # bytes; NIfTI-2
_DEFLATE_LIMIT = 1032  # no deflate stream expands more than this (zlib's technical notes)
UNPACKED_RATIO = "BRAINSWEEP_UNPACKED_RATIO"
"""How many times its size a packed file may take in memory; 1,000 if it is not set."""
SMALL_ENOUGH = 2**28
"""Bytes of float32 voxels that a file of any size may have: 400 voxels a side. A map of one class packs well."""
_SLACK = 2**20  # bytes that may follow the voxels
_PIECE = 2**20  # bytes of a stream unpacked at a time
_UNREADABLE = (
    HeaderDataError,
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    ArithmeticError,
    TypeError,
    MemoryError,
)


class _Stored(NamedTuple):
    """The header of a file, after the check that the file can hold what it claims."""

    header: nib.Nifti1Header
    shape: tuple[int, int, int]
    affine: Affine
    is_packed: bool
    claimed: int
    """Bytes up to the last voxel, uncompressed."""
    frame: int | None
    """The volume that is read of a 4-D file."""


def read_volume(
    path: str | Path, *, may_be_constant: bool = False, frame: int | None = None
) -> tuple[Volume, Affine]:
    """Voxels (X, Y, Z) float32, slope and intercept applied, and the affine (4, 4) from voxel to mm.

    A header may declare metres or micrometres; without a unit its numbers are mm.

    The axes are flipped and swapped, never interpolated, so that X runs as nearly as possible from left
    to right, Y to the front and Z up (canonical RAS); an oblique affine stays oblique. Raises UserError,
    naming the file, for anything that is not one finite 3D volume with a usable affine, nor constant unless
    it `may_be_constant`: the label map of a healthy brain is all 0. Of a 4D file the volume number `frame`, from 0.
    """
    path = Path(path)
    stored = _open(path, frame)
    voxels = _voxels(path, stored)
    check_values(str(path), voxels, may_be_constant)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, stored.affine))
    return np.ascontiguousarray(canonical.dataobj, dtype=np.float32), np.asarray(canonical.affine, np.float64)


def read_geometry(path: str | Path, frame: int | None = None) -> tuple[tuple[int, int, int], Affine]:
    """Shape as stored and the affine in mm, from the header alone; the same UserErrors as `read_volume`."""
    stored = _open(Path(path), frame)
    return stored.shape, stored.affine


def frames_of(path: str | Path) -> int:
    """How many volumes a file has: the length of its fourth axis. The same UserErrors as `read_volume`."""
    shape = read_header(path).get_data_shape()
    return int(shape[3]) if len(shape) == 4 else 1


def read_header(path: str | Path) -> nib.Nifti1Header:
    """The header as stored, whatever the ending of the name is; the same UserErrors as `read_volume`."""
    path = Path(path)
    try:
        return _header(path, _beginning(path)[0])
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _beginning(path: Path) -> tuple[bytes, bool]:
    """The first bytes of a file, unpacked, and whether they were packed."""
    with path.open("rb") as stream:
        beginning = stream.read(_LONGEST_HEADER)
    is_packed = beginning[:2] == b"\x1f\x8b"
    if is_packed:
        with gzip.open(path) as stream:
            beginning = stream.read(_LONGEST_HEADER)
    return beginning, is_packed


def _open(path: Path, frame: int | None) -> _Stored:
    """What the header says, read and checked; the voxels are still on disk."""
    size = _size(path)
    try:
        beginning, is_packed = _beginning(path)
        header = _header(path, beginning)
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        affine = np.asarray(header.get_best_affine(), np.float64)
        unit = _unit_of(header)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    affine[:3] *= MILLIMETRES[unit]
    if offset < header.single_vox_offset:
        raise UserError(f"{path} places its voxels at byte {offset}, inside its header; correct vox_offset")
    sides = _checked_shape(path, tuple(int(side) for side in shape), dtype, frame)
    claimed = offset + math.prod(shape) * dtype.itemsize
    if claimed > (size * _DEFLATE_LIMIT if is_packed else size):
        raise UserError(
            f"{path} claims {claimed:,} bytes (shape {sides if frame is None else shape}, {dtype}, from byte "
            f"{offset:,}), but has only "
            f"{size:,}; it is truncated or its header is damaged"
        )
    _check_ratio(path, size, 4 * math.prod(sides))
    _check_affine(path, affine, unit)
    return _Stored(header, sides, affine, is_packed, claimed, frame)


def _size(path: Path) -> int:
    """Bytes of the file; UserError if the path is not a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, links in a circle, a name that no file can have
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file; a NIfTI file (.nii or .nii.gz) is needed")
    return status.st_size


def _header(path: Path, beginning: bytes) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header at the beginning of a file, uncompressed."""
    if not beginning:
        raise ValueError("the file is empty")
    for kind in _HEADERS:
        if kind.may_contain_header(beginning):
            header = kind(beginning[: kind.sizeof_hdr], check=False)
            header.check_fix(_LOGGER, error_level=_HEADER_ERROR)
            if header["magic"].item() != kind.single_magic:
                raise UserError(
                    f"{path} is half of a pair of header and image files; convert the pair to one .nii or .nii.gz"
                )
            return header
    raise ValueError("it does not begin with a NIfTI header")


def _checked_shape(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic[object]], frame: int | None
) -> tuple[int, int, int]:
    """The three spatial sizes, if there are no more and no fewer, of voxels that are numbers."""
    if frame is not None and not (len(shape) == 4 and 0 <= frame < shape[3]):
        raise UserError(f"{path} has shape {shape}, and volume {frame} (from 0) of a 4D image is asked for")
    if frame is None and len(shape) > 3 and any(size != 1 for size in shape[3:]):
        hint = "; --split-4d NAME makes channels of its volumes" if len(shape) == 4 else ""
        raise UserError(
            f"{path} is {len(shape)}D with shape {shape}; one 3D volume is needed: extract one{hint}"
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise UserError(f"{path} has shape {shape}; a 3D volume of at least 2 voxels a side is needed")
    if dtype.kind not in "iuf":
        raise UserError(f"{path} holds {dtype} voxels; integer or floating-point grey values are needed")
    if math.prod(shape) > MAX_VOXELS:
        raise UserError(
            f"{path} claims shape {shape}, more than {MAX_VOXELS:,} voxels; is the header damaged?"
        )
    return shape[0], shape[1], shape[2]


def _check_ratio(path: Path, size: int, unpacked: int) -> None:
    """UserError for a small file that would fill the memory."""
    given = os.environ.get(UNPACKED_RATIO) or "1000"
    try:
        limit = float(given)
    except ValueError:
        raise UserError(f"{UNPACKED_RATIO} must be a number, such as 1000, got {given!r}") from None
    if unpacked > max(SMALL_ENOUGH, limit * size):
        raise UserError(
            f"{path} has {size / 1e6:.1f} MB and would take {unpacked / 1e6:,.0f} MB of memory, {unpacked / size:,.0f} "
            f"times as much, and the limit is {limit:,.0f}; if the file is right, set "
            f"{UNPACKED_RATIO}={math.ceil(unpacked / size)}"
        )


def _unit_of(header: nib.Nifti1Header) -> str:
    """The unit of length that a header declares: unknown if its code is none of the format's."""
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:
        return "unknown"
    return unit if unit in MILLIMETRES else "unknown"


def _check_affine(path: Path, affine: Affine, unit: str) -> None:
    if not np.isfinite(affine).all():
        raise UserError(f"{path} has an affine with values that are not numbers; correct its header")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    # volume of the voxel over that of a box with its edges: 1 for right angles, 0 for a flat voxel
    if edges.min() == 0 or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-3:
        raise UserError(f"{path} has a singular affine {affine[:3].tolist()}; its axes must span space")
    is_declared = MILLIMETRES[unit] != 1
    least, most = DECLARED_EDGES if is_declared else VOXEL_EDGES
    if edges.min() < least or edges.max() > most:
        why = f"its header says {unit}; is that wrong?" if is_declared else "is the unit of length wrong?"
        raise UserError(
            f"{path} has voxels of {' x '.join(f'{edge:g}' for edge in edges)} mm; edges must be "
            f"{least:g} to {most:g} mm ({why})"
        )


def _voxels(path: Path, stored: _Stored) -> Volume:
    """The voxels (X, Y, Z) as stored, slope and intercept applied."""
    try:
        with path.open("rb") as file, np.errstate(over="ignore"):  # beyond float32: infinite, and rejected
            source = _unpacked(path, stored.claimed) if stored.is_packed else file
            proxy = ArrayProxy(source, stored.header, mmap=False)
            voxels = proxy if stored.frame is None else proxy[..., stored.frame]
            return np.asarray(voxels, np.float32).reshape(stored.shape)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unpacked(path: Path, claimed: int) -> io.BytesIO:
    """The content of a gzip stream, read to its end, because gzip checks its CRC only there.

    It is read in pieces: a single read would allocate all memory that the header claims.
    """
    content = io.BytesIO()
    with gzip.open(path) as stream:
        while (held := content.tell()) <= claimed + _SLACK and (piece := stream.read(_PIECE)):
            content.write(piece)
    if held > claimed + _SLACK:  # a damaged stream, or one made to fill the memory
        raise UserError(f"{path} continues after the {claimed:,} bytes that its header claims; it is damaged")
    if held < claimed:
        raise UserError(
            f"{path} claims {claimed:,} bytes, but its stream holds {held:,}; it is truncated or its header is damaged"
        )
    return content


def check_values(name: str, voxels: Volume, may_be_constant: bool) -> None:
    """UserError, beginning with `name`, unless the voxels are finite and, where they must, differ."""
    finite = np.isfinite(voxels)
    if not finite.all():
        raise UserError(
            f"{name} has {voxels.size - np.count_nonzero(finite)} NaN or infinite voxels; correct them"
        )
    low, high = float(voxels.min()), float(voxels.max())
    if low == high and not may_be_constant:
        what = "is empty: every voxel is 0" if low == 0 else f"is constant: every voxel is {low:g}"
        raise UserError(f"{name} {what}")


def _unreadable(path: Path, error: BaseException) -> UserError:
    # an error of the operating system, not of the content
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path} cannot be read: {error.strerror}")
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(
        f"{path} cannot be read as NIfTI ({reason}); it is truncated, damaged or of another kind"
    )
