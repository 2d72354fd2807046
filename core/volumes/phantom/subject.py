"""One person's brain, made from the average one: size, shape, ventricles, stiffness and scanner.

Every draw comes from its own stream of random numbers, a pure function of (seed, purpose, subject), so that
a brain does not change with the size of the cohort, the channels asked for or, up to resolution, the spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from core.volumes.phantom.ageing import (
    INTRACRANIAL_ML,
    INTRACRANIAL_SD,
    SITE_SD_KPA,
    SUBJECT_SD_KPA,
    decline_by_group,
    median_ventricle_ml,
)
from core.volumes.phantom.anatomy import (
    ORIGIN,
    STAGE_AGES,
    WALL_SHIFTS_MM,
    Anatomy,
    Stage,
    along_axes,
    load_anatomy,
)
from core.volumes.phantom.settings import SPACINGS
from core.volumes.phantom.templates import Floats, Kind

# Streams of random numbers.
PERSON, SHAPE, STIFFNESS, TEXTURE, SITE, SCANNER, PATTERN, LESIONS, TOMOGRAPHY, CONTRASTS = range(10)

ANATOMICAL_AGE_SD = 6.0  # years by which a person's atrophy is ahead of or behind the median
VENTRICLE_LOG_SD = 0.22  # beyond what goes with atrophy
STRETCH_SD = 0.025  # of each axis
DISPLACEMENT_MM, DISPLACEMENT_WIDTH_MM = 2.0, 36.0  # SD and smoothness of the individual shape
CENTRE_MM = np.array([[0.0], [-18.0], [8.0]], dtype=np.float32)  # heads are scaled about this point

# Voxel texture as fractions of the local stiffness, SD and smoothness in mm. A pattern that all brains share
# and one of each brain, as in the MRE134 maps, where they are of about equal size.
PATTERN_SD, PATTERN_WIDTH_MM = 0.17, 6.0
FINE_SD, FINE_WIDTH_MM = 0.235, 8.0
BROAD_SD, BROAD_WIDTH_MM = 0.14, 20.0
SOFTEST_KPA = 0.1  # 0 means background

EXTENT_MM = (180, 216, 180)  # of the field of view, between the centres of its first and last voxels

T1_OF_TISSUE = (0.22, 0.63, 0.92)  # CSF, grey, white
BIAS_WIDTH_MM = 60.0


class TissueVolumes(TypedDict):
    """Volumes of a brain in mL: sums of fractions, not of labels."""

    csf_ml: float
    """Ventricles included."""
    gm_ml: float
    wm_ml: float
    ventricle_ml: float


@dataclass(frozen=True, eq=False)
class PhantomBrain:
    """One brain with its true labels and volumes. Arrays are (X, Y, Z), X from left to right."""

    channels: dict[str, Floats]
    """"stiffness" in kPa, 0 outside brain tissue; "t1w" in arbitrary units, 0 outside the skull."""
    tissue: NDArray[np.uint8]
    """0 background, 1 CSF, 2 grey matter, 3 white matter."""
    fractions: Floats
    """(X, Y, Z, 3): how much of a voxel is CSF, grey and white matter."""
    regions: NDArray[np.uint8]
    """0 outside every region, else 1 + place in ageing.REGIONS; approximate."""
    volumes_ml: TissueVolumes
    affine: NDArray[np.float64]
    """(4, 4), voxel index to RAS mm."""


@dataclass(frozen=True)
class Person:
    """The person whose brain is made: all that the brain depends on."""

    seed: int
    index: int
    age: float
    site: int
    relative_stiffness: float = 1.0
    """Factor by which this person's brain is stiffer than the average of the same age."""

    def stream(self, purpose: int) -> np.random.Generator:
        """Random numbers of this person for one purpose."""
        return random_stream(self.seed, purpose, self.index)

    def site_stream(self) -> np.random.Generator:
        """Random numbers of this person's site, equal for all who were scanned there."""
        return random_stream(self.seed, SITE, self.site)


def random_stream(*key: int) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    return np.random.default_rng(key)


@dataclass(frozen=True, eq=False)
class _Head:
    """Where in the average brain the content of each voxel of a person's head comes from."""

    where: NDArray[np.intp]
    """(n,) flat indices of the voxels that touch the inside of the skull."""
    places: Floats
    """(3, n) origins, in voxels of the average brain."""
    inside: Floats
    """(n,) fraction inside the skull."""
    shape: tuple[int, ...]

    def read(self, volume: Floats) -> Floats:
        """(n,) values of the average brain's map `volume` (X, Y, Z)."""
        values: Floats = ndimage.map_coordinates(volume, self.places, order=1)
        return values

    def read_labels(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(n,) labels of the average brain's nearest voxels."""
        nearest: NDArray[np.uint8] = ndimage.map_coordinates(labels, self.places, order=0)
        return nearest

    def image(self, values: NDArray[Kind]) -> NDArray[Kind]:
        """(X, Y, Z) image of (n,) values, 0 elsewhere."""
        image = np.zeros(self.shape, dtype=values.dtype)
        image.flat[self.where] = values
        return image


def make_brain(person: Person, spacing: float, channels: Sequence[str]) -> PhantomBrain:
    """The brain of `person` on the grid of `spacing` mm, with "stiffness", "t1w" or both."""
    anatomy = load_anatomy(spacing)
    draws = person.stream(SHAPE)
    anatomical_age = person.age + ANATOMICAL_AGE_SD * draws.standard_normal()
    stage = aged(anatomy, anatomical_age)
    ventricle_ml = median_ventricle_ml(anatomical_age) * np.exp(VENTRICLE_LOG_SD * draws.standard_normal())
    head = _shape_head(anatomy, stage, float(ventricle_ml), draws)
    grey, white, ventricle = head.read(stage.grey), head.read(stage.white), head.read(stage.ventricle)
    csf = np.clip(head.inside - grey - white, 0, None)
    labels = np.where(head.inside >= 0.5, 1 + np.argmax([csf, grey, white], axis=0), 0).astype(np.uint8)
    images = {}
    if "stiffness" in channels:
        images["stiffness"] = _stiffness(person, anatomy, head, stage, grey + white)
    if "t1w" in channels:
        images["t1w"] = _t1w(person, anatomy, head, (csf, grey, white))
    return PhantomBrain(
        channels={name: head.image(images[name]) for name in channels},
        tissue=head.image(labels),
        fractions=np.stack([head.image(each) for each in (csf, grey, white)], axis=-1),
        regions=head.image(head.read_labels(stage.regions) * (grey + white >= 0.5)),
        volumes_ml={
            "csf_ml": _millilitres(csf, spacing),
            "gm_ml": _millilitres(grey, spacing),
            "wm_ml": _millilitres(white, spacing),
            "ventricle_ml": _millilitres(ventricle, spacing),
        },
        affine=anatomy.affine.copy(),
    )


def _millilitres(fractions: Floats, spacing: float) -> float:
    return float(fractions.sum(dtype=np.float64)) * spacing**3 / 1000


def aged(anatomy: Anatomy, age: float) -> Stage:
    """The average brain at `age` (years), between the two nearest stages; volumes are linear in between."""
    place = float(np.interp(age, STAGE_AGES, np.arange(len(STAGE_AGES))))
    before = min(int(place), len(STAGE_AGES) - 2)
    share = np.float32(place - before)
    young, old = anatomy.stages[before], anatomy.stages[before + 1]

    def between(of_young: Floats, of_old: Floats) -> Floats:
        return of_young + share * (of_old - of_young)

    return Stage(
        grey=between(young.grey, old.grey),
        white=between(young.white, old.white),
        ventricle=between(young.ventricle, old.ventricle),
        stiffness=between(young.stiffness, old.stiffness),
        regions=young.regions if share < 0.5 else old.regions,
        ventricle_ml=between(young.ventricle_ml, old.ventricle_ml),
    )


def _shape_head(anatomy: Anatomy, stage: Stage, ventricle_ml: float, draws: np.random.Generator) -> _Head:
    """Scale, stretch and bend the average head, and move its ventricles' wall.

    The ventricles will hold `ventricle_ml` in a head of median size; larger heads have larger ventricles.
    """
    shape, spacing = stage.grey.shape, np.float32(anatomy.spacing)
    size = INTRACRANIAL_ML * (1 + INTRACRANIAL_SD * draws.standard_normal()) / anatomy.intracranial_ml
    stretch = np.exp(STRETCH_SD * draws.standard_normal(3))
    scale = stretch * (size / stretch.prod()) ** (1 / 3)

    origin = np.array(ORIGIN, dtype=np.float32)[:, None]
    here = np.stack(np.unravel_index(anatomy.near_head, shape)).astype(np.float32) * spacing + origin
    bend = [smooth_field(draws, anatomy.spacing, DISPLACEMENT_WIDTH_MM) for _ in range(3)]
    there = CENTRE_MM + (here - CENTRE_MM) / scale[:, None].astype(np.float32)
    there += np.float32(DISPLACEMENT_MM) * np.stack([field.flat[anatomy.near_head] for field in bend])
    places = (there - origin) / spacing

    inside = ndimage.map_coordinates(anatomy.inside, places, order=1)
    touched = np.flatnonzero(inside)
    places = places[:, touched]
    wanted = ventricle_ml * anatomy.intracranial_ml / INTRACRANIAL_ML
    shift = np.float32(np.interp(wanted, stage.ventricle_ml, WALL_SHIFTS_MM))
    push = np.stack([ndimage.map_coordinates(component, places, order=1) for component in anatomy.push])
    return _Head(anatomy.near_head[touched], places - shift * push / spacing, inside[touched], shape)


def _stiffness(person: Person, anatomy: Anatomy, head: _Head, stage: Stage, tissue: Floats) -> Floats:
    """(n,) kPa where at least half of the voxel is `tissue`, 0 elsewhere."""
    draws = person.stream(STIFFNESS)
    kept = (1 - decline_by_group(person.age)).astype(np.float32)
    kpa = head.read(np.tensordot(kept, stage.stiffness, axes=1)) / np.maximum(tissue, np.float32(0.01))
    offset = SUBJECT_SD_KPA * draws.standard_normal() + SITE_SD_KPA * person.site_stream().standard_normal()
    kpa = (kpa + np.float32(offset)) * np.float32(person.relative_stiffness)
    fine = FINE_SD * smooth_field(draws, anatomy.spacing, FINE_WIDTH_MM).flat[head.where]
    broad = BROAD_SD * smooth_field(draws, anatomy.spacing, BROAD_WIDTH_MM).flat[head.where]
    in_brain = tissue >= 0.5
    texture = fine + broad
    texture = texture - texture[in_brain].mean()  # only the offset changes the mean of a brain
    texture = 1 + texture + PATTERN_SD * head.read(_common_pattern(anatomy.spacing))
    return np.where(in_brain, np.maximum(kpa * texture, SOFTEST_KPA), 0).astype(np.float32)


def _t1w(person: Person, anatomy: Anatomy, head: _Head, fractions: tuple[Floats, Floats, Floats]) -> Floats:
    """(n,) intensities where at least half of the voxel is inside the skull, 0 elsewhere.

    Gain, coil shading and noise belong to the scanner; shading changes with the person.
    """
    scanner, draws = person.site_stream(), person.stream(SCANNER)
    scanner.standard_normal()  # the site's offset of stiffness
    gain = 800 * np.exp(0.2 * scanner.standard_normal())
    noise = scanner.uniform(0.015, 0.03)
    _, grey, white = fractions
    clean = head.read(anatomy.residual_t1) * (grey + white)
    for intensity, fraction in zip(T1_OF_TISSUE, fractions, strict=True):
        clean = clean + np.float32(intensity) * fraction
    shading = 0.04 * smooth_field(scanner, anatomy.spacing, BIAS_WIDTH_MM)
    shading = shading + 0.07 * smooth_field(draws, anatomy.spacing, BIAS_WIDTH_MM)
    clean = clean * np.exp(shading.flat[head.where])
    # the magnitude of a complex signal: Rician noise (Gudbjartsson and Patz 1995), never 0 in the head
    real, imaginary = noise * draws.standard_normal((2, clean.size))
    magnitude = gain * np.hypot(clean + real, imaginary)
    return np.where(head.inside >= 0.5, magnitude, 0).astype(np.float32)


@lru_cache(maxsize=3)
def _common_pattern(spacing: float) -> Floats:
    """The texture that all brains share, (X, Y, Z), SD 1; the same for every cohort, as anatomy is."""
    return smooth_field(random_stream(PATTERN), spacing, PATTERN_WIDTH_MM)


def smooth_field(draws: np.random.Generator, spacing: float, width_mm: float) -> Floats:
    """A random field (X, Y, Z) of mean 0 and SD 1, white noise seen through a Gaussian of SD `width_mm`.

    The noise lies on a lattice of its own, so that the field is the same at every spacing.
    """
    weights = _field_weights(spacing, width_mm)
    noise = draws.standard_normal([matrix.shape[1] for matrix in weights], dtype=np.float32)
    return along_axes(weights, noise)


@lru_cache(maxsize=16)
def _field_weights(spacing: float, width_mm: float) -> tuple[sparse.csr_matrix, ...]:
    """One (voxels, lattice) matrix for each axis; the squares of each row sum to 1."""
    reach = 3 * width_mm
    weights = []
    for origin, size, extent in zip(ORIGIN, SPACINGS[spacing], EXTENT_MM, strict=True):
        lattice = np.arange(origin - reach, origin + extent + reach + 0.1, width_mm)
        distance = origin + spacing * np.arange(size)[:, None] - lattice
        rows = np.exp(-0.5 * (distance / width_mm) ** 2) * (abs(distance) <= reach)
        rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
        weights.append(sparse.csr_matrix(rows.astype(np.float32)))
    return tuple(weights)
