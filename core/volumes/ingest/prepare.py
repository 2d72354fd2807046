"""One scan from its files to the cohort's grid: masked, placed, resampled and scaled, with measures of its quality."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine

from core.errors import UserError
from core.volumes.images.intensity import foreground, scale
from core.volumes.images.midline import find_midline
from core.volumes.images.nifti import Affine, Volume
from core.volumes.images.preprocess import FIELD_CENTRE, Preprocessing, covers_template_field, grid_affine
from core.volumes.images.registration import overlap_with_template, register
from core.volumes.images.resample import Labels, Mask, Resampled, resample, resample_labels
from core.volumes.sources.images import read_image, read_image_geometry, trailing_axes
from core.volumes.sources.listing import ImageFile, Scan

SAME_GRID = (
    0.1  # of a voxel: largest distance between the corners of two maps of one grid; tools round affines
)
MOST_CLASSES = np.iinfo(np.int16).max
FULL, OVERSHOOT = 255, 0.2
"""The largest number of a mask in whole numbers; by how much of it an interpolated one may go beyond 0 and it."""
UNKNOWN = -1
"""In a map of classes: nobody knows. A training ignores it, and nothing is compared there."""


class PreparedScan(NamedTuple):
    """A scan on the cohort's grid."""

    voxels: npt.NDArray[np.float32]
    """(C, X, Y, Z), exactly 0 outside the brain and nowhere else."""
    maps: dict[str, Labels]
    """(X, Y, Z) classes by the name of the map, 0 is background; those that the scan has."""
    affine: Affine
    """(4, 4), voxel to mm of the *source*: a landmark keeps its place in the first image's world."""
    quality: dict[str, float]
    """Measures for the manifest, one value each; see `prepare_scan`."""
    origin: Mapping[str, str | list[float]] = MappingProxyType({})
    """What leads back to the source: see `origin_of`."""


class Image(NamedTuple):
    """A volume (X, Y, Z) in canonical orientation, and its affine (4, 4) from voxel to mm."""

    voxels: Volume
    affine: Affine


def prepare_scan(scan: Scan, preprocessing: Preprocessing) -> PreparedScan:
    """Run the pipeline on one scan: a pure function of its files and the settings.

    The first image decides where the brain is; further channels and the maps are placed by their own
    affines in the same mm. A mask or a map must be on the first image's grid.
    `quality` holds:

    - coverage: fraction of the brain's voxels that lie within the grid
    - brain_ml: volume of the brain in the source, in millilitres
    - template_overlap: Dice of the brain with that of MNI152; NaN for a brain left in native space
    - what `registration.register` or `midline.find_midline` measured, where it was asked for
    - intensity_mean, _median, _p01, _p99: of the brain's voxels on the grid before scaling; the second
      channel's have "_2" at the end, and so on

    Raises UserError, naming the file, for what cannot be used.
    """
    first, mask = _first_image(scan, preprocessing)
    target, placing = _place(first, mask, scan.images[0], preprocessing)
    quality = {
        "coverage": coverage(mask, first.affine, target, preprocessing.shape),
        "brain_ml": float(np.count_nonzero(mask) * abs(np.linalg.det(first.affine[:3, :3])) / 1000),
        **placing,
    }
    channels, origin = [], origin_of(scan.images[0], first)
    for number, file in enumerate(scan.images, start=1):
        image = first if number == 1 else _read(file)
        inside = mask if number == 1 else _mask_of(image, mask, first.affine, preprocessing)
        if number > 1:
            origin[f"source_hash_{number}"] = voxel_hash(image.voxels)
        placed = resample(*image, target, preprocessing.shape, inside, preprocessing.interpolation)
        quality |= _intensity_measures(placed, "" if number == 1 else f"_{number}")
        channels.append(_scaled(placed, file, preprocessing))
    maps = {
        name: _label(file, scan.images[0], first, target, preprocessing) for name, file in scan.maps.items()
    }
    return PreparedScan(np.stack(channels), maps, target, quality, origin)


def voxel_hash(voxels: Volume) -> str:
    """Digits that two images share only if all their voxels are the same, in canonical orientation."""
    return hashlib.sha256(np.ascontiguousarray(voxels, dtype=np.float32).data).hexdigest()[:32]


def origin_of(file: ImageFile, image: Image) -> dict[str, str | list[float]]:
    """What the manifest keeps of the first image before resampling.

    source_hash: of its voxels (of further channels with _2, …), which tells the same scan under another name.
    source_shape (with trailing axes of length 1), source_affine (three rows) and source_codes (such as LAS): its grid
    as stored, with which a map of the cohort's grid is brought back onto the voxels of the file.
    """
    shape, affine = read_image_geometry(file)
    codes = "".join(code or "?" for code in nib.orientations.aff2axcodes(affine))
    return {
        "source_hash": voxel_hash(image.voxels),
        "source_shape": [float(side) for side in (*shape, *trailing_axes(file))],
        "source_affine": np.asarray(affine, dtype=np.float64)[:3].reshape(-1).tolist(),
        "source_codes": codes,
    }


def _read(file: ImageFile) -> Image:
    return Image(*read_image(file))


def _name(file: ImageFile) -> str:
    return str(file.path) if file.row is None else f"{file.path} row {file.row}"


def _first_image(scan: Scan, preprocessing: Preprocessing) -> tuple[Image, Mask]:
    """The image that decides where the brain is, and where it is brain."""
    image = _read(scan.images[0])
    if preprocessing.mask is None:
        if scan.mask is not None:
            raise UserError(f"{_name(scan.mask)}: a brain mask is listed, but preprocessing has mask=None")
        mask = foreground(image.voxels, preprocessing.scaling)
    else:
        if scan.mask is None:
            raise UserError(
                f"{_name(scan.images[0])} comes with no brain mask, but preprocessing has mask='file'"
            )
        stored = Image(*read_image(scan.mask, may_be_constant=True))
        _check_grid(scan.mask, "mask", stored, scan.images[0], image)
        try:
            mask = mask_of(stored.voxels)
        except UserError as error:
            raise UserError(f"{_name(scan.mask)} {error}") from None
        if not image.voxels[mask].any():
            raise UserError(
                f"{_name(scan.mask)}: the image is 0 everywhere inside this mask; do they belong together?"
            )
    if not mask.any():
        raise UserError(
            f"{_name(scan.images[0])}: no voxel is above the lower end of {preprocessing.intensity}"
        )
    return image, mask


def mask_of(voxels: Volume) -> Mask:
    """Where a mask (X, Y, Z) is brain: a binary one, or one of probabilities up to 1 or 255, at half of that.

    A mask that was interpolated is one of probabilities: its rim is wide, far from the brain it may hold traces, and a
    spline overshoots 0 and 1. Numbers up to 255 may as well be labels: of a mask most lie above the half.

    Raises:
        UserError: it is empty, or no mask; the message has no name.
    """
    values = np.unique(voxels)
    low, high = float(values[0]) + 0.0, float(values[-1]) + 0.0
    if low == high == 0:
        raise UserError("is empty: every voxel is 0")
    if low == 0 and len(values) == 2:
        return np.asarray(voxels != 0)
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return np.asarray(voxels >= 0.5)
    if low >= -OVERSHOOT * FULL and high <= (1 + OVERSHOOT) * FULL:
        is_whole = bool((values == np.rint(values)).all())
        within = voxels >= FULL / 2
        if 2 * np.count_nonzero(within) > np.count_nonzero(voxels >= (1 if is_whole else FULL / 10)):
            return np.asarray(within)
    raise UserError(
        f"is no mask: it has {len(values)} values from {low:g} to {high:g}, and a mask has 0 and one other, or 0 to 1 "
        "or 0 to 255 with brain from half of that; of labels make one, such as labels > 0"
    )


def _place(
    image: Image, mask: Mask, file: ImageFile, preprocessing: Preprocessing
) -> tuple[Affine, dict[str, float]]:
    """Affine (4, 4) from the grid's voxels to the image's mm, and how well the brain lies in the template's place."""
    grid = functools.partial(grid_affine, preprocessing.spacing, preprocessing.shape)
    if preprocessing.registration == "affine":
        try:
            found = register(*image, mask)
        except UserError as error:
            raise UserError(f"{_name(file)}: {error}") from None
        return found.template_to_source @ grid(), found.measures
    mode = preprocessing.centre
    if mode == "auto":
        mode = "world" if covers_template_field(image.voxels.shape, image.affine) else "brain"
    if preprocessing.midline:
        try:
            midline = find_midline(*image, mask, brain_centre(mask, image.affine))
        except UserError as error:
            raise UserError(f"{_name(file)}: {error}") from None
        placed = grid(midline.middle if mode == "brain" else np.array([0.0, *FIELD_CENTRE[1:]]))
        return midline.to_source @ placed, {"template_overlap": math.nan, **midline.measures}
    if mode == "brain":
        return grid(brain_centre(mask, image.affine)), {"template_overlap": math.nan}
    return grid(), {"template_overlap": overlap_with_template(mask, image.affine)}


def brain_centre(mask: Mask, affine: Affine) -> npt.NDArray[np.float64]:
    """Middle of the brain in mm: of the box that holds the inner 99 % of the brain on each axis.

    A box, because it leaves equal margins on both sides of the grid; 99 %, because a few stray voxels far
    from the brain must not move it. The result is the centre of a voxel, so that a volume that already has
    the spacing of the cohort is moved without interpolation (where the grid has a middle voxel).
    """
    middle = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        cumulative = np.cumsum(mask.sum(axis=others))
        low, high = np.searchsorted(cumulative, np.array([0.005, 0.995]) * cumulative[-1])
        middle.append((low + high) // 2)
    return np.asarray(apply_affine(affine, middle), dtype=np.float64)


def coverage(mask: Mask, affine: Affine, target: Affine, shape: tuple[int, int, int]) -> float:
    """Fraction of the mask's voxels whose centres lie within the grid."""
    to_grid = np.linalg.inv(target) @ affine
    scales = np.diag(to_grid)[:3]
    if np.array_equal(to_grid[:3, :3], np.diag(scales)):  # parallel axes: each is inside or not by itself
        lines = [scales[axis] * np.arange(mask.shape[axis]) + to_grid[axis, 3] for axis in range(3)]
        kept = [(line > -0.5) & (line < size - 0.5) for line, size in zip(lines, shape, strict=True)]
        return float(np.count_nonzero(mask[np.ix_(*kept)]) / np.count_nonzero(mask))
    within = 0
    # one slice at a time: the coordinates of a whole head would take a gigabyte
    for x in range(len(mask)):
        inside = np.argwhere(mask[x])
        places = apply_affine(to_grid, np.column_stack([np.full(len(inside), x), inside]))
        within += int(((places > -0.5) & (places < np.asarray(shape) - 0.5)).all(axis=1).sum())
    return within / int(np.count_nonzero(mask))


def _mask_of(image: Image, mask: Mask, affine: Affine, preprocessing: Preprocessing) -> Mask:
    """The brain in a further channel: the voxels of the mask file, or, without one, all that are not background."""
    if preprocessing.mask is None:
        return foreground(image.voxels, preprocessing.scaling)
    if mask.shape == image.voxels.shape and np.array_equal(affine, image.affine):
        return mask
    return np.asarray(resample_labels(mask.astype(np.int16), affine, image.affine, image.voxels.shape) != 0)


def _intensity_measures(placed: Resampled, ending: str) -> dict[str, float]:
    values = placed.voxels[placed.inside]
    if values.size == 0:
        return {}
    p01, median, p99 = np.percentile(values, [1, 50, 99])
    measures = {"mean": values.mean(dtype=np.float64), "median": median, "p01": p01, "p99": p99}
    return {f"intensity_{name}{ending}": float(value) for name, value in measures.items()}


def _scaled(placed: Resampled, file: ImageFile, preprocessing: Preprocessing) -> Volume:
    if not placed.inside.any():
        raise UserError(
            f"{_name(file)}: no voxel of the brain falls into the grid; is centre='brain' meant, or is the "
            "affine of this image not that of the others?"
        )
    try:
        return scale(placed.voxels, placed.inside, preprocessing.scaling)
    except UserError as error:
        raise UserError(f"{_name(file)}: {error}") from None


def _label(
    file: ImageFile, image_file: ImageFile, image: Image, target: Affine, preprocessing: Preprocessing
) -> Labels:
    stored = Image(*read_image(file, may_be_constant=True))  # of a healthy brain it is all 0
    _check_grid(file, "label map", stored, image_file, image)
    low, high = float(stored.voxels.min()), float(stored.voxels.max())
    if low < UNKNOWN or high > MOST_CLASSES or (stored.voxels != np.rint(stored.voxels)).any():
        odd = stored.voxels[(stored.voxels != np.rint(stored.voxels)) | (stored.voxels < UNKNOWN)]
        raise UserError(
            f"{_name(file)}: classes must be whole numbers from 0 to {MOST_CLASSES}, or {UNKNOWN} where unknown, "
            f"got {float(odd.flat[0]) if odd.size else high:g}"
        )
    return resample_labels(stored.voxels.astype(np.int16), stored.affine, target, preprocessing.shape)


def _check_grid(file: ImageFile, what: str, stored: Image, image_file: ImageFile, image: Image) -> None:
    """Raise UserError unless the map lies on the image's grid."""
    if stored.voxels.shape != image.voxels.shape:
        raise UserError(
            f"{_name(file)}: this {what} has {stored.voxels.shape} voxels, its image {image_file.path.name} has "
            f"{image.voxels.shape}; resample it to the image's grid"
        )
    corners = np.array(np.meshgrid(*([0, size - 1] for size in image.voxels.shape))).reshape(3, -1).T
    apart = apply_affine(np.linalg.inv(image.affine) @ stored.affine, corners) - corners
    if (furthest := float(np.abs(apart).max())) > SAME_GRID:
        lies = f"{furthest:.3g} voxels" if math.isfinite(furthest) else "far"
        raise UserError(
            f"{_name(file)}: this {what} lies {lies} away from its image {image_file.path.name} (another affine); "
            "resample it to the image's grid"
        )
