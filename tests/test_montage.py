"""The montage: what is drawn where, in pixels."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from montage import montage


def block(value: float = 1.0) -> np.ndarray:
    """A volume whose right half (high X) is brighter than its left."""
    volume = np.zeros((20, 24, 20), dtype=np.float32)
    volume[4:16, 4:20, 4:16] = 0.3 * value
    volume[10:16, 4:20, 4:16] = value
    return volume


def test_picture_shows_left_on_the_left_over_a_dark_background(tmp_path: Path) -> None:
    picture = matplotlib.image.imread(montage(block()[None], ["24 y"], tmp_path / "one.png"))
    grey = picture[..., :3].mean(axis=-1)
    height, width = grey.shape
    axial = grey[round(0.1 * height) : round(0.3 * height)]
    left, right = axial[:, round(0.3 * width)].mean(), axial[:, round(0.5 * width)].mean()
    assert left < right - 0.3
    assert grey[:3, :3].max() < 0.1


def test_a_column_for_each_volume_and_rows_for_each_channel(tmp_path: Path) -> None:
    def size(path: Path) -> tuple[int, ...]:
        return matplotlib.image.imread(path).shape[:2]

    one = size(montage(block()[None], ["a"], tmp_path / "one.png"))
    two = size(montage(np.stack([block(), block()]), ["a", "b"], tmp_path / "two.png"))
    channels = np.stack([block(), block(2)])[None]
    both = size(
        montage(
            channels,
            ["a"],
            tmp_path / "both.png",
            titles=("T1", "stiffness"),
            colour_maps=("gray", "inferno"),
            units=("", "kPa"),
        )
    )
    assert two[1] - one[1] == 160
    assert both[0] > 1.8 * one[0]


def test_the_same_volumes_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (montage(block()[None], ["24 y"], tmp_path / name) for name in ("1.png", "2.png"))
    assert first.read_bytes() == second.read_bytes()


def test_captions_must_match_the_volumes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 volumes of 1 channels need as many captions"):
        montage(np.stack([block(), block()]), ["24 y"], tmp_path / "no.png")


def test_empty_volumes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all volumes are 0"):
        montage(np.zeros((1, 4, 4, 4)), ["24 y"], tmp_path / "no.png")
