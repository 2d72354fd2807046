"""Slices of a few scans that a refit keeps for the report: arrays in one compressed file, and no code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.files.writing import replacing


def pictures_of(folder: Path, seed: int) -> Path:
    """Where a refit keeps the pictures of its cell."""
    return folder / f"pictures-{seed}.npz"


def write_pictures(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write arrays of numbers and texts in one step."""
    buffer = io.BytesIO()
    texts = {name: values.astype(str) for name, values in arrays.items() if values.dtype == object}
    np.savez_compressed(buffer, **{**arrays, **texts})  # type: ignore[arg-type]
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_pictures(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """What `write_pictures` wrote; ValueError or OSError if it is damaged. No pickled code is executed."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
