"""How voxels are stored: as float16, float32, or int16 with a scale; and back to float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from core.errors import UserError
from core.volumes.cohort.formats import StoredType
from core.volumes.images.nifti import Volume

StoredVoxels = npt.NDArray[np.float16 | np.float32 | np.int16]
"""Voxels as they are stored: a volume (C, X, Y, Z), or a map of classes (X, Y, Z) in int16."""
StoredDtype = np.dtype[np.float16 | np.float32 | np.int16]

LARGEST = 32_767  # int16, the same on both sides of zero
_PIECE = 32_767  # below the 32,768 elements at which torch starts its threads


def encode(volume: Volume, dtype: StoredType) -> tuple[StoredVoxels, npt.NDArray[np.float32]]:
    """A volume (C, X, Y, Z) as it is stored, and the factor (C,) of each channel from stored to real values.

    float16 and float32: rounded to the type, factors 1. int16: a channel of whole numbers up to 32,767 is
    stored exactly as it is; any other channel is divided by largest / 32,767 and rounded, so that its values
    are right to within half of that step. 0 stays exactly 0 and nothing else becomes 0, because 0 means "outside the
    brain": a voxel nearer to 0 than half a step is stored as one step, off by less than a step.

    Raises UserError, without naming the subject, for voxels that are not finite or do not fit the type.
    """
    if not np.isfinite(volume).all():
        raise UserError(f"{np.sum(~np.isfinite(volume))} voxels are NaN or infinite")
    ones = np.ones(len(volume), dtype=np.float32)
    if dtype == "int16":
        channels, scales = zip(*map(_to_int16, volume), strict=True)
        return np.stack(channels), np.array(scales, dtype=np.float32)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(volume, dtype=dtype)
    if not np.isfinite(stored).all():
        raise UserError(
            f"{np.abs(volume).max():g} is above {np.finfo(stored.dtype).max:g}, the largest {dtype}; "
            "store the cohort as float32"
        )
    return stored, ones


def _to_int16(channel: Volume) -> tuple[npt.NDArray[np.int16], np.float32]:
    largest = float(np.abs(channel).max(initial=0))
    if largest <= LARGEST and np.array_equal(channel, np.rint(channel)):
        return channel.astype(np.int16), np.float32(1)
    scale = np.float32(largest / LARGEST)
    if scale < np.finfo(np.float32).tiny or not np.isfinite(scale):
        raise UserError(f"a largest voxel of {largest:g} has no scale in int16; store the cohort as float32")
    steps = np.clip(np.rint(channel / scale), -LARGEST, LARGEST)
    steps = np.where((steps == 0) & (channel != 0), np.sign(channel), steps)
    return steps.astype(np.int16), scale


def encode_label(label: npt.NDArray[np.int16 | np.float32]) -> npt.NDArray[np.int16]:
    """A map of classes (X, Y, Z) as int16; UserError, without the subject, if it holds anything else."""
    whole = np.asarray(label)
    classes = whole.astype(np.int16, copy=False)
    if not np.array_equal(classes, whole):
        raise UserError("the label map holds values that are not whole numbers from -32768 to 32767")
    return np.ascontiguousarray(classes)


def decode(stored: StoredVoxels, scale: npt.NDArray[np.float32] | None, out: npt.NDArray[np.float32]) -> None:
    """Write a stored volume (C, X, Y, Z) into `out` as float32, times `scale` (C,) where there is one.

    torch converts float16 ten times as fast as numpy (6,700 against 670 volumes of 91x109x91 a second).
    In pieces too small for its threads, because those hang in a process forked after they were used.
    """
    source = torch.from_numpy(stored.reshape(-1))
    target = torch.from_numpy(out.reshape(-1))
    for piece, values in zip(torch.split(target, _PIECE), torch.split(source, _PIECE), strict=True):
        piece.copy_(values)
    if scale is not None:
        out *= scale[:, np.newaxis, np.newaxis, np.newaxis]
