from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from core.evaluation.segmentation import Agreement, compare_maps, dice_of, hausdorff95, surface_dice


def box(start: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((14, 12, 10), dtype=bool)
    mask[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] = True
    return mask


def surface(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask & ~binary_erosion(mask))


def test_hausdorff_is_the_percentile_of_all_pairs_of_surface_voxels() -> None:
    spacing = np.array([1.0, 2.0, 3.0])
    first, second = box((2, 3, 2), (6, 5, 4)), box((4, 2, 3), (8, 5, 5))
    apart = np.linalg.norm((surface(first)[:, None] - surface(second)[None]) * spacing, axis=2)
    expected = max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))
    assert hausdorff95(first, second, spacing) == pytest.approx(expected)
    assert hausdorff95(first, first, spacing) == 0


def agreement(
    predicted: np.ndarray, reference: np.ndarray, *classes: int, tolerance: float = 2.0
) -> Agreement:
    return compare_maps(
        predicted, reference, [(each,) for each in classes], np.array([1.0, 2.0, 3.0]), tolerance=tolerance
    )


def test_agreement_of_each_class_of_a_case() -> None:
    """Found a voxel aside; in neither map; in the predicted one only."""
    reference, predicted = np.zeros((14, 12, 10), dtype=int), np.zeros((14, 12, 10), dtype=int)
    reference[box((2, 2, 2), (4, 4, 4))] = 1
    predicted[box((3, 2, 2), (4, 4, 4))] = 1
    predicted[box((10, 8, 8), (2, 2, 2))] = 3
    found = agreement(predicted, reference, 1, 2, 3)
    np.testing.assert_array_equal(found.counts_k3, [[48, 64, 64], [0, 0, 0], [0, 8, 0]])
    np.testing.assert_allclose(dice_of(found.counts_k3), [0.75, np.nan, 0.0])
    np.testing.assert_allclose(found.distances_k2[:, 0], [1.0, np.nan, np.inf])
    np.testing.assert_allclose(found.distances_k2[:, 1], [1.0, np.nan, 0.0])


def test_what_is_unknown_in_the_reference_counts_for_nothing() -> None:
    reference = box((2, 2, 2), (4, 4, 4)).astype(int)
    reference[:, :, :4][reference[:, :, :4] == 0] = -1
    found = agreement(np.ones_like(reference), reference, 1)
    beyond = 14 * 12 * 6 - 4 * 4 * 2
    np.testing.assert_array_equal(found.counts_k3, [[64, 64 + beyond, 64]])


def test_the_box_of_both_maps_changes_no_distance() -> None:
    """Against the same maps in a field eight times as large."""
    draws = np.random.default_rng(0)
    reference, predicted = np.zeros((14, 12, 10), dtype=int), np.zeros((14, 12, 10), dtype=int)
    reference[2:9, 3:9, 2:8] = draws.integers(0, 3, (7, 6, 6))
    predicted[4:11, 2:8, 3:9] = draws.integers(0, 3, (7, 6, 6))
    wide = [np.pad(each, ((7, 7), (6, 6), (5, 5))) for each in (predicted, reference)]
    for number in (1, 2):
        masks = [each == number for each in wide]
        spacing = np.array([1.0, 2.0, 3.0])
        found = agreement(predicted, reference, number)
        assert found.distances_k2[0, 0] == pytest.approx(hausdorff95(*masks, spacing))
        assert found.distances_k2[0, 1] == pytest.approx(surface_dice(*masks, spacing, 2.0))
    with pytest.raises(ValueError, match="must share a shape"):
        agreement(reference[1:], reference, 1)
