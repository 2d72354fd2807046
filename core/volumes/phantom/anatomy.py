"""The average brain of the phantom on a coarse grid, at several stages of ageing.

Growing ventricles push the tissue around them outwards. Voxels are ordered by how readily they turn from
tissue into cerebrospinal fluid (CSF), and from grey into white, so that a threshold at the right quantile
gives the wanted volumes exactly. The 1 mm labels are then averaged over the voxels of the coarse grid:
fractions, whose sums are volumes at any spacing.

Grids are RAS and cover the MNI field of view. Axes: X, Y, Z voxels; L stages of ageing; G groups of regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from core.volumes.phantom.ageing import (
    INTRACRANIAL_ML,
    KPA_OF_KIND,
    LABELS,
    median_brain_ml,
    median_grey_ml,
    median_ventricle_ml,
)
from core.volumes.phantom.settings import SPACINGS
from core.volumes.phantom.templates import CROP_START, Floats, Kind, Mask, Templates, load_templates

ORIGIN = (-90, -126, -72)  # mm, centre of the first voxel
STAGE_AGES = np.array([0.0, 40.0, 62.0, 80.0, 95.0, 108.0])  # years, closer where ventricles grow faster
WALL_SHIFTS_MM = np.arange(-3.0, 3.1, 1.0)  # at which the volume of the ventricles is tabulated


@dataclass(frozen=True, eq=False)
class Stage:
    """The average brain at one age. All maps (X, Y, Z) are fractions of a voxel, but for `regions`."""

    grey: Floats
    white: Floats
    ventricle: Floats
    stiffness: Floats
    """(G, X, Y, Z) young-adult kPa times the fraction of the voxel that is tissue of each group."""
    regions: NDArray[np.uint8]
    """Region at the centre of each voxel: 0 for none, else 1 + its place in REGIONS."""
    ventricle_ml: Floats
    """Volume of the ventricles after a further shift of their wall by each of WALL_SHIFTS_MM."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The average brain on one grid, from which subjects are made. Volumes are those of the ICBM head (1883 mL)."""

    spacing: float
    affine: NDArray[np.float64]
    """(4, 4), voxel index to RAS mm."""
    intracranial_ml: float
    near_head: NDArray[np.intp]
    """Flat indices of the voxels that can ever lie inside a skull."""
    stages: tuple[Stage, ...]
    """One for each of STAGE_AGES."""
    inside: Floats
    """(X, Y, Z) fraction inside the skull: grey + white + CSF, ventricles included."""
    push: Floats
    """(3, X, Y, Z) displacement in mm for each mm by which the ventricles' wall moves outwards."""
    residual_t1: Floats
    """(X, Y, Z) what the average T1-weighted image shows beyond its three tissues."""


@lru_cache(maxsize=3)
def load_anatomy(spacing: float) -> Anatomy:
    """The anatomy on the grid of `spacing` mm (a key of `SPACINGS`), made once in each process."""
    templates = load_templates()
    weights = [_box_weights(spacing, axis, size) for axis, size in enumerate(templates.inside.shape)]
    inside = along_axes(weights, templates.inside)
    push = np.stack([along_axes(weights, component) for component in templates.push])
    pull = _Pull.of(templates)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = ORIGIN
    near = ndimage.binary_dilation(inside > 0, iterations=max(1, round(8 / spacing)))
    return Anatomy(
        spacing=spacing,
        affine=affine,
        intracranial_ml=float(templates.inside.sum()) / 1000,
        near_head=np.flatnonzero(near),
        stages=tuple(_stage(templates, pull, float(age), weights, push) for age in STAGE_AGES),
        inside=inside,
        push=push,
        residual_t1=along_axes(weights, templates.residual_t1),
    )


@dataclass(frozen=True, eq=False)
class _Pull:
    """Moves 1 mm maps outwards from the ventricles: each voxel takes the value of a voxel further inwards."""

    where: NDArray[np.intp]
    """Flat indices of the n voxels that move at all."""
    places: Floats
    """(3, n) their voxel coordinates."""
    push: Floats
    """(3, n) their displacement for each mm."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, templates: Templates) -> _Pull:
        push = templates.push.reshape(3, -1)
        where = np.flatnonzero(np.abs(push).max(axis=0) > 0.02)
        places = np.stack(np.unravel_index(where, templates.inside.shape)).astype(np.float32)
        return cls(where, places, push[:, where], templates.inside.shape)

    def origin(self, shift_mm: float) -> NDArray[np.intp]:
        """(n,) flat indices of where the values of the moving voxels come from."""
        indices = np.rint(self.places - np.float32(shift_mm) * self.push).astype(np.intp)
        return np.asarray(np.ravel_multi_index(tuple(indices), self.shape, mode="clip"))


def _stage(
    templates: Templates, pull: _Pull, age: float, weights: Sequence[sparse.csr_matrix], push: Floats
) -> Stage:
    """The average brain with the median volumes of `age`, on the coarse grid that `push` has."""
    voxels_per_ml = templates.inside.sum() / INTRACRANIAL_ML  # for 1 mL in a person with a median head
    ventricle_ml = float(median_ventricle_ml(age))
    # the ventricles are not pulled: in the middle of thin horns the values would come from beyond the other wall
    ventricle = _highest(-templates.wall_shift, templates.inside, ventricle_ml * voxels_per_ml)
    origin = pull.origin(float(templates.wall_shift[ventricle].max()))

    def pulled(values: NDArray[Kind]) -> NDArray[Kind]:
        moved = values.copy()
        moved.flat[pull.where] = values.flat[origin]
        return moved

    brain_ml, grey_ml = float(median_brain_ml(age)), float(median_grey_ml(age))
    brain = _highest(pulled(templates.tissue), templates.inside & ~ventricle, brain_ml * voxels_per_ml)
    white = _highest(pulled(templates.whiteness), brain, (brain_ml - grey_ml) * voxels_per_ml)
    regions = pulled(templates.regions)
    kind = brain * (1 + regions + LABELS * white)
    coarse_ventricle = along_axes(weights, ventricle)
    return Stage(
        grey=along_axes(weights, brain & ~white),
        white=along_axes(weights, white),
        ventricle=coarse_ventricle,
        stiffness=np.stack([along_axes(weights, kpa[kind]) for kpa in KPA_OF_KIND]),
        regions=_at_centres(regions * brain, push.shape[1:]),
        ventricle_ml=_tabulate_ventricles(coarse_ventricle, push),
    )


def _highest(values: Floats, candidates: Mask, count: float) -> Mask:
    """The `count` of the `candidates` where `values` are highest."""
    among = values[candidates]
    place = max(0, among.size - round(count))
    return np.asarray(candidates & (values >= np.partition(among, place)[place]))


def _spacing_of(shape: tuple[int, ...]) -> float:
    return next(spacing for spacing, known in SPACINGS.items() if known == shape)


def _at_centres(labels: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Labels of the 1 mm voxels at the centres of the coarse grid's, 0 where that lies beyond the crop."""
    spacing = int(_spacing_of(shape))
    axes = [
        origin - start + spacing * np.arange(size)
        for origin, start, size in zip(ORIGIN, CROP_START, shape, strict=True)
    ]
    known = [(axis >= 0) & (axis < size) for axis, size in zip(axes, labels.shape, strict=True)]
    coarse = np.zeros(shape, dtype=np.uint8)
    coarse[np.ix_(*known)] = labels[np.ix_(*(axis[ok] for axis, ok in zip(axes, known, strict=True)))]
    return coarse


def _tabulate_ventricles(ventricle: Floats, push: Floats) -> Floats:
    """mL of `ventricle` after a shift of its wall by each of WALL_SHIFTS_MM."""
    spacing = _spacing_of(ventricle.shape)
    near = np.flatnonzero(np.abs(push).max(axis=0) > 0.3)
    places = np.stack(np.unravel_index(near, ventricle.shape)).astype(np.float32)
    steps = push.reshape(3, -1)[:, near] / np.float32(spacing)
    moved = [
        ndimage.map_coordinates(ventricle, places - np.float32(mm) * steps, order=1) for mm in WALL_SHIFTS_MM
    ]
    millilitres = [values.sum(dtype=np.float64) * spacing**3 / 1000 for values in moved]
    return np.array(millilitres, dtype=np.float32)


def _box_weights(spacing: float, axis: int, size: int) -> sparse.csr_matrix:
    """(coarse, fine) share of each coarse voxel along `axis` that each 1 mm voxel of the crop fills."""
    centres = (ORIGIN[axis] + spacing * np.arange(SPACINGS[spacing][axis]))[:, None]
    fine = CROP_START[axis] + np.arange(size)
    low = np.maximum(centres - spacing / 2, fine - 0.5)
    high = np.minimum(centres + spacing / 2, fine + 0.5)
    return sparse.csr_matrix((np.clip(high - low, 0, None) / spacing).astype(np.float32))


def along_axes(weights: Sequence[sparse.csr_matrix], volume: NDArray[np.float32 | np.bool_]) -> Floats:
    """Multiply each axis of `volume` (X, Y, Z) by its matrix.

    Sparse products add in a fixed order, so their bytes do not depend on the number of threads; those of
    BLAS can.
    """

    def along_first(volume: Floats, matrix: sparse.csr_matrix) -> Floats:
        product = matrix @ volume.reshape(volume.shape[0], -1)
        return np.moveaxis(product.reshape(-1, *volume.shape[1:]), 0, -1)  # the next axis comes to the front

    return np.ascontiguousarray(reduce(along_first, weights, volume.astype(np.float32, copy=False)))
