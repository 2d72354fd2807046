"""Small pictures of a scan: three slices per channel as one JPEG, with the outlines of its label map."""

from __future__ import annotations

import base64
import io
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.report.figures.style import SERIES

MIDDLE = 0.5
HEIGHT = 96  # pixels for the deepest slice, less where channels are many
FEWEST_PIXELS = 56
DARKEST = 24  # grey of the darkest brain; the background is black
GAP = 3  # pixels
OUTLINE = np.array([int(SERIES[4][place : place + 2], 16) for place in (1, 3, 5)], dtype=np.uint8)
QUALITY = 78

Box: TypeAlias = "tuple[slice[int, int], slice[int, int], slice[int, int]]"
"""A part of the grid: from which voxel to which along X, Y and Z."""


def thumbnail(
    volume: npt.NDArray[np.float32],
    label: npt.NDArray[np.int16] | None,
    box: Box,
    shown: tuple[tuple[float, float], ...],
) -> str:
    """A data URL: a row of axial, coronal and sagittal slice per channel of (C, X, Y, Z). Left is on the left.

    The cuts go through the middle of `box` (what holds all brains), or through the largest part of the
    label map (X, Y, Z). `shown` has for each channel the values drawn as dark and as white, the same for
    all scans, so that a dark or bright scan shows.
    """
    cut = _cut(label[box] if label is not None and label[box].any() else None, volume[0][box].shape)
    height = max(FEWEST_PIXELS, HEIGHT // max(1, len(volume) // 2))
    rows = [
        _row(channel[box], None if label is None else label[box], cut, limits, height)
        for channel, limits in zip(volume, shown, strict=True)
    ]
    picture = Image.fromarray(np.concatenate([part for row in rows for part in (row, _gap(row))][:-1]))
    if label is None:
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _gap(row: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.zeros((GAP, *row.shape[1:]), dtype=np.uint8)


def _cut(label: npt.NDArray[np.int16] | None, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Where X, Y and Z are sliced."""
    if label is None:
        x, y, z = (round(MIDDLE * (size - 1)) for size in shape)
    else:
        x, y, z = (
            int((label > 0).sum(axis=tuple(other for other in range(3) if other != axis)).argmax())
            for axis in range(3)
        )
    return x, y, z


def _row(
    volume: npt.NDArray[np.float32],
    label: npt.NDArray[np.int16] | None,
    cut: tuple[int, int, int],
    limits: tuple[float, float],
    height: int,
) -> npt.NDArray[np.uint8]:
    """(height, width, 3): the slices side by side at one scale, bottom left of each at its lowest mm."""
    x, y, z = cut
    planes: list[tuple[slice[None, None] | int, ...]] = [
        (slice(None), slice(None), z),
        (slice(None), y, slice(None)),
        (x, slice(None), slice(None)),
    ]
    per_voxel = height / max(volume.shape[1:])
    parts = []
    for plane in planes:
        part = _coloured(volume[plane].T[::-1], limits, per_voxel)
        if label is not None:
            _outline(part, label[plane].T[::-1])
        parts.append(np.pad(part, ((height - len(part), 0), (0, GAP), (0, 0))))
    return np.concatenate(parts, axis=1)[:, :-GAP]


def _coloured(
    plane: npt.NDArray[np.float32], limits: tuple[float, float], per_voxel: float
) -> npt.NDArray[np.uint8]:
    low, high = limits
    grey = DARKEST + np.clip((plane - low) / (high - low), 0, 1) * (255 - DARKEST)
    picture = Image.fromarray(np.where(plane == 0, 0, grey).round().astype(np.uint8))
    size = (max(1, round(plane.shape[1] * per_voxel)), max(1, round(plane.shape[0] * per_voxel)))
    grown = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    return np.repeat(grown[..., None], 3, axis=2)


def _outline(picture: npt.NDArray[np.uint8], label: npt.NDArray[np.int16]) -> None:
    """Paint the pixels of a class that border on another class."""
    height, width = picture.shape[:2]
    rows = np.arange(height) * label.shape[0] // height
    columns = np.arange(width) * label.shape[1] // width
    grown = label[np.ix_(rows, columns)]
    padded = np.pad(grown, 1)
    borders = np.zeros(grown.shape, dtype=bool)
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        borders |= padded[down : down + height, right : right + width] != grown
    picture[borders & (grown > 0)] = OUTLINE
