"""How well label maps agree, class by class and case by case, with a stated answer where a class is empty."""

from __future__ import annotations

from collections.abc import Mapping

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice

from core.evaluation import Floats
from core.evaluation.tissues import voxel_volume

Mask = npt.NDArray[np.bool_]


def segmentation_metrics(
    predicted_xyz: npt.NDArray[np.generic],
    reference_xyz: npt.NDArray[np.generic],
    affine: Floats,
    classes: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """Per class of one case: `dice`, `hausdorff95` in mm, `volume_error` in mL (predicted - reference).

    | class is in    | dice | hausdorff95 |
    |----------------|------|-------------|
    | neither map    | NaN  | NaN         |
    | one map only   | 0    | infinity    |

    NaN means that the case tells nothing about the class: leave it out of means. A case in which only one map
    has the class counts as the worst possible.

    Args:
        predicted_xyz: label map (X, Y, Z).
        reference_xyz: label map of the same shape.
        affine: 4x4, voxel index to mm.
        classes: label of each class.
    """
    if predicted_xyz.shape != reference_xyz.shape:
        raise ValueError(
            f"label maps must share a shape, got {predicted_xyz.shape} and {reference_xyz.shape}"
        )
    spacing = nib.affines.voxel_sizes(affine)
    metrics = {}
    for name, label in classes.items():
        predicted, reference = predicted_xyz == label, reference_xyz == label
        metrics[name] = {
            "dice": dice(predicted, reference),
            "hausdorff95": hausdorff95(predicted, reference, spacing),
            "volume_error": (int(predicted.sum()) - int(reference.sum())) * voxel_volume(affine),
        }
    return metrics


def dice(predicted: Mask, reference: Mask) -> float:
    """2 |P ∩ R| / (|P| + |R|) of two masks; NaN if both are empty, 0 if one is."""
    size = int(predicted.sum()) + int(reference.sum())
    return 2 * int((predicted & reference).sum()) / size if size else float("nan")


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
