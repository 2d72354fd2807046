"""NumPy arrays of volumes and of their labels; headers are checked before an array is mapped or loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.volumes.sources.files import checked_file
from core.volumes.sources.listing import ImageFile

AffineRows = tuple[tuple[float, ...], ...]

MNI_GRIDS = {(182, 218, 182): 1.0, (121, 145, 121): 1.5, (91, 109, 91): 2.0}
"""Shape and edge of a voxel in mm of the MNI152 grids of FSL (1 and 2 mm) and of CAT12 and SPM (1.5 mm)."""

MNI_NOTE = (
    ".npy arrays carry no geometry: their grid is taken as FSL, SPM and CAT12 store MNI152, "
    "with the first axis from right to left"
)


@dataclass(frozen=True)
class ArrayHeader:
    """The header of a `.npy` file, after the check that the file can hold what it claims."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic[object]]


def read_header(path: Path, kinds: str = "iuf") -> ArrayHeader:
    """Shape and type of a `.npy` array; UserError unless its type is one of numpy's `kinds` and it is whole.

    Pickled objects are never loaded, because they can run any code.
    """
    checked_file(path)
    try:
        with path.open("rb") as file:
            shape, dtype = _parse(file)
            begin = file.tell()
    # the header is Python text, so a damaged one can raise any error of the tokenizer
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as a NumPy array ({reason})") from error
    if dtype.hasobject:
        raise UserError(
            f"{path} holds pickled Python objects, which are not loaded because they can run code; "
            "save it again as plain numbers or text: np.save(path, array.astype(str))"
        )
    if dtype.kind not in kinds or dtype.fields:
        raise UserError(f"{path} holds {dtype} values; {_in_words(kinds)} are needed")
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise UserError(f"{path} has shape {shape}; it is empty")
    claimed, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - begin
    if claimed > there:
        raise UserError(
            f"{path} claims {claimed:,} bytes (shape {shape}, {dtype}), but has only {there:,}; "
            "it is truncated or its header is damaged"
        )
    return ArrayHeader(shape, dtype)


def map_array(path: Path) -> npt.NDArray[np.generic[object]]:
    """The array, mapped from disk: only what is indexed is read."""
    read_header(path)
    try:
        mapped: npt.NDArray[np.generic[object]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a NumPy array ({error})") from error
    return mapped


def volumes_in(path: Path) -> tuple[int, tuple[int, int, int]]:
    """How many volumes an array (N, X, Y, Z) or (N, 1, X, Y, Z) holds, and their shape (X, Y, Z)."""
    shape = read_header(path).shape
    if len(shape) == 5 and shape[1] == 1:
        shape = (shape[0], *shape[2:])
    if len(shape) != 4:
        raise UserError(f"{path} has shape {shape}; (N, X, Y, Z) or (N, 1, X, Y, Z) is needed")
    return shape[0], (shape[1], shape[2], shape[3])


def read_values(path: Path) -> list[object]:
    """An array (N,) or (N, 1) of numbers or texts, as Python values."""
    shape = read_header(path, kinds="iufUSb").shape
    if math.prod(shape) != shape[0] if shape else True:
        raise UserError(f"{path} has shape {shape}; one value for each subject, (N,), is needed")
    values: list[object] = np.load(path, allow_pickle=False).reshape(-1).tolist()
    return values


def mni_affine(path: Path, shape: tuple[int, ...]) -> AffineRows:
    """The affine (4 x 4, voxel to mm) of the MNI152 grid of this shape; UserError if there is none.

    FSL's and SPM's templates begin at the right, back and bottom: voxel 0, 0, 0 is (90, -126, -72) mm.
    """
    if shape not in MNI_GRIDS:
        known = ", ".join(f"{'x'.join(map(str, grid))} ({edge:g} mm)" for grid, edge in MNI_GRIDS.items())
        raise UserError(f"{path} has volumes of shape {shape}, which is no MNI152 grid; known: {known}")
    edge = MNI_GRIDS[shape]
    return (
        (-edge, 0.0, 0.0, 90.0),
        (0.0, edge, 0.0, -126.0),
        (0.0, 0.0, edge, -72.0),
        (0.0, 0.0, 0.0, 1.0),
    )


def array_file(path: Path) -> ImageFile:
    """A `.npy` file of one volume, (X, Y, Z) or with axes of size 1 before them, on an MNI152 grid."""
    shape = read_header(path).shape
    if len(shape) < 3 or math.prod(shape[:-3]) != 1:
        raise UserError(f"{path} has shape {shape}; one volume is needed, (X, Y, Z)")
    return ImageFile(path, None, mni_affine(path, shape[-3:]))


def _parse(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[np.generic[object]]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is unknown")
    return shape, dtype


def _in_words(kinds: str) -> str:
    return "numbers or texts" if "U" in kinds else "integer or floating-point grey values"
