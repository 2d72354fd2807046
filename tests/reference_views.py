"""Slow, obvious re-derivations of views, in numpy and voxel by voxel where that is shortest."""

from __future__ import annotations

import itertools

import numpy as np
import torch


def published_view(
    volume: np.ndarray,
    key: tuple[int, int, int, int],
    crop: float,
    cutout: float,
    cutout_size: float,
    noise: float,
) -> np.ndarray:
    """Crop, noise and cutout of one volume (C, X, Y, Z) float32 as they were in the first release."""
    stream = np.random.SeedSequence(key)
    draws = np.random.default_rng(stream).random(7)
    grid = volume.shape[1:]
    kept = [max(1, round(crop * side)) for side in grid]
    starts = [int(draw * (side - keep + 1)) for draw, side, keep in zip(draws[:3], grid, kept, strict=True)]
    generator = torch.Generator().manual_seed(int(stream.generate_state(5, np.uint64)[4]))
    grain = torch.randn(volume.shape[0], *kept, generator=generator).numpy()
    cube = max(1, round(cutout_size * min(grid)))
    cut = [int(draw * (side - cube + 1)) for draw, side in zip(draws[3:6], grid, strict=True)]
    out = np.zeros_like(volume)
    for x, y, z in itertools.product(*(range(keep) for keep in kept)):
        place = [start + at for start, at in zip(starts, (x, y, z), strict=True)]
        in_cut = all(low <= at < low + cube for low, at in zip(cut, place, strict=True))
        value = volume[:, *place] + (np.float32(noise) * grain[:, x, y, z] if noise else np.float32(0))
        target = [(side - keep) // 2 + at for side, keep, at in zip(grid, kept, (x, y, z), strict=True)]
        out[:, *target] = 0 if in_cut and draws[6] < cutout else value
    return out


def covered_share(rng: np.random.Generator, grid: tuple[int, int, int], most: float) -> float:
    """Share of a grid under blocks with sides of 5 to 25 %, added until a uniform share is reached."""
    inside = set()
    wanted = rng.random() * most
    voxels = grid[0] * grid[1] * grid[2]
    while len(inside) < wanted * voxels:
        spans = []
        for side in grid:
            length = round((0.05 + 0.2 * rng.random()) * side)
            start = int(rng.random() * (side - length + 1))
            spans.append(range(start, start + length))
        inside |= set(itertools.product(*spans))
    return len(inside) / voxels
