from __future__ import annotations

import pytest
import torch

from core.evaluation.sliding_window import mirrored_sliding_window


def mirrored_part(windows: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    return mirrored


@pytest.mark.parametrize("grid", [(20, 16, 18), (9, 16, 11), (21, 17, 8)])  # larger, smaller, odd
def test_every_window_comes_with_its_counterpart(grid: tuple[int, int, int]) -> None:
    """Windows that return their mirrored partner must put together the mirrored volume, which is symmetric here."""
    half = torch.rand(2, 3, *grid)
    volumes = half + half.flip(2) + 1
    volumes[:, 0] += torch.linspace(0, 0.1, grid[0])[:, None, None]
    out = mirrored_sliding_window(volumes, mirrored_part, (12, 12, 12), windows_per_batch=3)
    torch.testing.assert_close(out, volumes.flip(2))


def test_a_predictor_without_sight_of_the_mirror_gives_its_plain_answer() -> None:
    volumes = torch.randn(1, 2, 20, 16, 18)
    out = mirrored_sliding_window(volumes, lambda windows, _: windows.sum(1, keepdim=True), (12, 12, 12))
    torch.testing.assert_close(out, volumes.sum(1, keepdim=True))


def test_both_windows_have_the_volumes_channels() -> None:
    seen = []

    def predictor(windows: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(windows.shape), tuple(mirrored.shape)))
        return windows

    mirrored_sliding_window(torch.randn(1, 2, 16, 12, 12), predictor, (12, 12, 12), overlap=0.5)
    assert set(seen) == {((1, 2, 12, 12, 12), (1, 2, 12, 12, 12))}
    assert len(seen) == 2
