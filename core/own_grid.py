"""From the grid of a cohort back onto the voxels of a scan: where segmentations are written, and judged.

Shape suffixes: K classes with the background, X, Y, Z voxels of either grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage

from core.tasks.task import ClassProbabilities
from core.volumes.images.nifti import Affine, read_geometry, read_header
from core.volumes.images.resample import resample_labels

Classes = npt.NDArray[np.int16]


@dataclass(frozen=True)
class OwnGrid:
    """The voxels of a scan as its file stores them."""

    shape: tuple[int, int, int]
    affine: Affine
    """(4, 4), voxel to mm of the source."""

    @classmethod
    def of_file(cls, file: Path) -> OwnGrid:
        """The grid of a NIfTI file."""
        return cls(*read_geometry(file))

    @classmethod
    def of_manifest(cls, row: pd.Series) -> OwnGrid | None:
        """The grid of the source of a scan of a cohort; None if the manifest does not know it (phantoms, format 2)."""
        shape, affine = row.get("source_shape"), row.get("source_affine")
        if shape is None or affine is None or len(shape) < 3:
            return None
        x, y, z = (int(side) for side in shape[:3])
        return cls((x, y, z), as_affine(affine))

    @property
    def edges(self) -> tuple[float, float, float]:
        """Of a voxel along its axes, in mm."""
        x, y, z = (float(edge) for edge in nib.affines.voxel_sizes(self.affine))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """The volume of a voxel in mL; axes may be oblique."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000


def as_affine(rows: Sequence[float]) -> Affine:
    """The affine (4, 4) whose upper three rows a manifest keeps, one after the other."""
    return np.vstack([np.asarray(rows, dtype=np.float64).reshape(3, 4), [0.0, 0.0, 0.0, 1.0]])


class Placed(NamedTuple):
    """A segmentation on the voxels of a scan."""

    classes_xyz: Classes
    """The number of every voxel's class, 0 for the background."""
    probabilities_kxyz: npt.NDArray[np.float32]
    milliliters: dict[str, float]
    """The volume of every class, by name."""
    numbers: dict[str, int]
    """By which a map tells the classes, by name."""


def place(given: ClassProbabilities, affine: Affine, own: OwnGrid) -> Placed:
    """Bring the probabilities of one scan (N = 1) onto its own voxels; then take the likeliest class.

    Linear between voxels of the grid of the cohort, so that borders are smooth; beyond it all is background.

    Args:
        given: on the grid of the cohort.
        affine: (4, 4), from voxels of the cohort to mm of the source; see `PreparedScan.affine`.
        own: the voxels of the scan.
    """
    to_grid = np.linalg.inv(affine) @ own.affine
    placed_kxyz = np.stack(
        [
            ndimage.affine_transform(
                values_xyz.astype(np.float32), to_grid, output_shape=own.shape, order=1, mode="grid-constant",
                cval=float(index == 0),
            )
            for index, values_xyz in enumerate(given.values[0])
        ]
    )  # fmt: skip
    return _painted(given, placed_kxyz, own.voxel_ml)


def as_stored(given: ClassProbabilities, voxel_ml: float) -> Placed:
    """The likeliest class of one scan (N = 1) on the grid of the cohort itself; `voxel_ml`: see `stored_voxel_ml`."""
    return _painted(given, given.values[0].astype(np.float32), voxel_ml)


def _painted(
    given: ClassProbabilities, probabilities_kxyz: npt.NDArray[np.float32], voxel_ml: float
) -> Placed:
    classes_xyz = given.classes.paint(probabilities_kxyz)
    counts = given.classes.masks(classes_xyz).sum(axis=(1, 2, 3))
    volumes = {name: int(count) * voxel_ml for name, count in zip(given.classes.sets, counts, strict=True)}
    return Placed(classes_xyz, probabilities_kxyz, volumes, given.classes.numbers)


def image_like(file: Path, values: npt.NDArray[np.generic]) -> nib.Nifti1Image:
    """Values (X, Y, Z) or (X, Y, Z, K) as an image with the affine and the codes of a file.

    A map of classes also has its trailing axes of length 1. Where the file knows neither transform, it is
    scanner-based.
    """
    own = read_header(file)
    further, affine = own.get_data_shape()[3:], own.get_best_affine()
    trailing = further if values.ndim == 3 and all(side == 1 for side in further) else ()
    image = nib.Nifti1Image(values.reshape(*values.shape, *trailing), affine)
    codes = [int(own[name]) for name in ("qform_code", "sform_code")]
    if codes[0]:
        image.set_qform(own.get_qform(), codes[0])
    else:
        image.set_qform(affine, 0)
    image.set_sform(affine, codes[1] if any(codes) else 1)
    image.header.set_xyzt_units(*own.get_xyzt_units())
    return image


def nearest_on(own: OwnGrid, classes_xyz: Classes, affine: Affine) -> Classes:
    """A map of classes on the grid of a cohort, of the nearest voxel for every voxel of a scan; 0 beyond."""
    return resample_labels(classes_xyz, affine, own.affine, own.shape)
