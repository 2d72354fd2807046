from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from core.evaluation.segmentation import dice, hausdorff95, segmentation_metrics

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def box(start: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((14, 12, 10), dtype=bool)
    mask[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] = True
    return mask


def test_dice_by_hand() -> None:
    assert dice(box((0, 0, 0), (4, 2, 1)), box((2, 0, 0), (4, 2, 1))) == pytest.approx(2 * 4 / 16)


def surface(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask & ~binary_erosion(mask))


def test_hausdorff_is_the_percentile_of_all_pairs_of_surface_voxels() -> None:
    spacing = np.array([1.0, 2.0, 3.0])
    first, second = box((2, 3, 2), (6, 5, 4)), box((4, 2, 3), (8, 5, 5))
    apart = np.linalg.norm((surface(first)[:, None] - surface(second)[None]) * spacing, axis=2)
    expected = max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))
    assert hausdorff95(first, second, spacing) == pytest.approx(expected)
    assert hausdorff95(first, first, spacing) == 0


def test_metrics_of_each_class_of_a_case() -> None:
    reference, predicted = np.zeros((14, 12, 10), dtype=int), np.zeros((14, 12, 10), dtype=int)
    reference[box((2, 2, 2), (4, 4, 4))] = 1
    predicted[box((3, 2, 2), (4, 4, 4))] = 1
    predicted[box((10, 8, 8), (2, 2, 2))] = 3
    metrics = segmentation_metrics(predicted, reference, AFFINE, {"gm": 1, "wm": 2, "lesion": 3})
    assert metrics["gm"] == pytest.approx({"dice": 0.75, "hausdorff95": 1.0, "volume_error": 0.0})
    assert np.isnan([metrics["wm"]["dice"], metrics["wm"]["hausdorff95"]]).all()
    assert metrics["wm"]["volume_error"] == 0
    assert metrics["lesion"] == pytest.approx({"dice": 0.0, "hausdorff95": np.inf, "volume_error": 8 * 0.006})


def test_volume_errors_are_negative_where_too_little_is_found() -> None:
    reference = box((2, 2, 2), (4, 4, 4)).astype(int)
    metrics = segmentation_metrics(np.zeros_like(reference), reference, AFFINE, {"gm": 1})
    assert metrics["gm"]["volume_error"] == pytest.approx(-64 * 0.006)
    with pytest.raises(ValueError, match="must share a shape"):
        segmentation_metrics(reference[1:], reference, AFFINE, {"gm": 1})
