"""How well label maps agree, class by class and case by case, with a stated answer where a class is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice

from core.evaluation import Floats
from core.volumes.images.resample import bounding_box

Mask = npt.NDArray[np.bool_]


class Agreement(NamedTuple):
    """How two maps of K classes agree in one case; see the functions of this file for classes that are empty."""

    counts_k3: Floats
    """Voxels in both maps, in the predicted one, in the reference."""
    distances_k2: Floats
    """The 95 % Hausdorff distance in mm, and the surface Dice; NaN if they were not asked for."""


def compare_maps(
    predicted_xyz: npt.NDArray[np.generic],
    reference_xyz: npt.NDArray[np.generic],
    classes: Sequence[tuple[int, ...]],
    edges: Floats,
    *,
    tolerance: float | None,
    unknown: int = -1,
) -> Agreement:
    """Compare two maps (X, Y, Z), class by class.

    Args:
        predicted_xyz: numbers of classes.
        reference_xyz: the same, of the same shape.
        classes: the numbers of each of the K classes.
        edges: (3,) of a voxel in mm.
        tolerance: mm that a surface may be off, for the surface Dice; None: no distances, which take long.
        unknown: the number in the reference where nothing is known, and nothing is compared.
    """
    if predicted_xyz.shape != reference_xyz.shape:
        raise ValueError(
            f"label maps must share a shape, got {predicted_xyz.shape} and {reference_xyz.shape}"
        )
    # Surfaces are searched in the box of both maps only, a voxel wider: a head is mostly background.
    box = bounding_box((predicted_xyz != 0) | (reference_xyz != 0), 1)
    predicted_xyz, reference_xyz = predicted_xyz[box], reference_xyz[box]
    known = reference_xyz != unknown
    counts_k3, distances_k2 = np.zeros((len(classes), 3)), np.full((len(classes), 2), np.nan)
    for place, numbers in enumerate(classes):
        predicted, reference = np.isin(predicted_xyz, numbers) & known, np.isin(reference_xyz, numbers)
        counts_k3[place] = (predicted & reference).sum(), predicted.sum(), reference.sum()
        if tolerance is not None:
            distances_k2[place] = (
                hausdorff95(predicted, reference, edges),
                surface_dice(predicted, reference, edges, tolerance),
            )
    return Agreement(counts_k3, distances_k2)


def dice_of(counts_nk3: Floats) -> Floats:
    """2 |P and R| / (|P| + |R|) of counts (…, K, 3) -> (…, K); NaN where a class is in neither map, 0 if in one."""
    sizes_nk = counts_nk3[..., 1] + counts_nk3[..., 2]
    with np.errstate(invalid="ignore"):
        found: Floats = np.where(sizes_nk > 0, 2 * counts_nk3[..., 0] / sizes_nk, np.nan)
    return found


def hausdorff95(predicted_xyz: Mask, reference_xyz: Mask, spacing: Floats) -> float:
    """95th percentile of distances between surfaces, the larger of both directions, in mm (MONAI's).

    NaN if both masks are empty, infinity if one is.

    Args:
        predicted_xyz: mask (X, Y, Z).
        reference_xyz: mask of the same shape.
        spacing: (3,) size of a voxel along each axis in mm.
    """
    present = int(predicted_xyz.any()) + int(reference_xyz.any())
    if present < 2:
        return float("inf") if present else float("nan")
    distance = compute_hausdorff_distance(
        _one_case(predicted_xyz),
        _one_case(reference_xyz),
        include_background=True,
        percentile=95,
        spacing=[float(side) for side in spacing],
    )
    return float(distance.item())


def surface_dice(predicted_xyz: Mask, reference_xyz: Mask, spacing: Floats, tolerance: float) -> float:
    """The share of both surfaces that lies within `tolerance` mm of the other one (Nikolov et al. 2021; MONAI's).

    NaN if both masks are empty, 0 if one is. `spacing`: see `hausdorff95`.
    """
    present = int(predicted_xyz.any()) + int(reference_xyz.any())
    if present < 2:
        return 0.0 if present else float("nan")
    share = compute_surface_dice(
        _one_case(predicted_xyz),
        _one_case(reference_xyz),
        [tolerance],
        include_background=True,
        spacing=[float(side) for side in spacing],
    )
    return float(share.item())


def _one_case(mask_xyz: Mask) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask_xyz))[None, None].float()
