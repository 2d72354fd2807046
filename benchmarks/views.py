"""Views at 91 x 109 x 91 on one thread, one volume after another, against MONAI: `python -m benchmarks.views`.

Ours and theirs take turns in one process. The table has the median of the repeats, as volumes per second of processor
time, and the ratio of the two. A dash means that MONAI has no such transform.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import monai.data
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandAffine,
    RandCoarseDropout,
    RandFlip,
    RandGaussianNoise,
    RandRotate90,
    RandScaleIntensity,
    RandShiftIntensity,
    RandSpatialCrop,
    SpatialPad,
)  # fmt: skip
from rich.console import Console
from rich.table import Table

from core.volumes.images.mirror import mirror_image
from core.volumes.views import ViewSettings, make_views
from core.volumes.views.patches import PatchSettings, drop_patches, swap_patches
from core.volumes.views.slices import SliceViewSettings, partition_slices, slice_views
from core.volumes.views.turns import quarter_turns

GRID = (91, 109, 91)
SUBJECTS = 4

Case = Callable[[], object]


def brains() -> torch.Tensor:
    """(B, 1, 91, 109, 91): zeros outside an ellipsoid that fills about as much of the grid as a brain."""
    squares = torch.meshgrid(*(torch.linspace(-1, 1, side) ** 2 for side in GRID), indexing="ij")
    inside = sum(squares) < 0.7
    return torch.randn(SUBJECTS, 1, *GRID, generator=torch.Generator().manual_seed(0)) * inside


def ours(volumes: torch.Tensor, **settings: object) -> Case:
    """One view of each volume."""
    chosen = ViewSettings.model_validate({"count": 1, **settings})
    return lambda: make_views(volumes, range(len(volumes)), 0, 0, chosen)


def theirs(volumes: torch.Tensor, *transforms: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """The same with MONAI; the results are stacked to one batch."""
    view = Compose(transforms)
    return lambda: torch.stack([view(volume) for volume in volumes])


def comparisons(volumes: torch.Tensor) -> list[tuple[str, Case, Case | None]]:
    """The comparisons: name, our view, the transform of MONAI."""
    cubes = torch.nn.functional.pad(volumes, (0, 5, 0, 0, 0, 5))[:, :, :, 6:102].contiguous()
    rows = range(len(volumes))
    radians = 15 / 180 * torch.pi
    affine = RandAffine(
        prob=1,
        rotate_range=[radians] * 3,
        scale_range=[0.05] * 3,
        translate_range=[4] * 3,
        padding_mode="zeros",
    )
    # So many holes that they cover 15 % on average, with sides of 5 to 25 %.
    holes = RandCoarseDropout(
        holes=2, max_holes=95, spatial_size=[5] * 3, max_spatial_size=[23] * 3, fill_value=(0.0, 1.0), prob=1
    )
    sampled = partition_slices(volumes, rows, 0, 0, 3).slices_bpchw
    published = SliceViewSettings(window=100 / 160, corner=(10 / 160, 69 / 160), brightness=0.5, contrast=0.3)
    return [
        ("published: nothing changes", ours(volumes), theirs(volumes, lambda volume: volume)),
        ("crop", ours(volumes, crop_size=91),
         theirs(volumes, RandSpatialCrop([91] * 3, random_size=False), SpatialPad(GRID))),
        ("cutout", ours(volumes, cutout=1.0), theirs(volumes, RandCoarseDropout(1, 32, fill_value=0, prob=1))),
        ("noise", ours(volumes, noise=0.05), theirs(volumes, RandGaussianNoise(1, std=0.05, sample_std=False))),
        ("flip", ours(volumes, flip=0.5), theirs(volumes, RandFlip(0.5, 0))),
        ("rotate, zoom, translate", ours(volumes, rotate=15, zoom=0.05, translate=0.05), theirs(volumes, affine)),
        ("scale", ours(volumes, scale=0.1), theirs(volumes, RandScaleIntensity(0.1, prob=1))),
        ("shift", ours(volumes, shift=0.1), theirs(volumes, RandShiftIntensity(0.1, prob=1))),
        ("scale, shift, contrast", ours(volumes, scale=0.1, shift=0.1, contrast=0.3), None),
        ("gamma", ours(volumes, gamma=0.3), theirs(volumes, RandAdjustContrast(1, (0.74, 1.35)))),
        ("crop, cutout, noise, flip", ours(volumes, crop=0.9, cutout=0.5, noise=0.05, flip=0.5), theirs(
            volumes, RandFlip(0.5, 0), RandGaussianNoise(1, std=0.05, sample_std=False),
            RandCoarseDropout(1, 32, fill_value=0, prob=0.5),
            RandSpatialCrop([round(0.9 * side) for side in GRID], random_size=False), SpatialPad(GRID))),
        ("mirror images", lambda: mirror_image(volumes), None),
        ("quarter turns of 96", lambda: quarter_turns(cubes, rows, 0, 0), theirs(cubes, RandRotate90(1, 3, (1, 2)))),
        ("dropped blocks", lambda: drop_patches(volumes, rows, 0, 0, PatchSettings(noise="unit")),
         theirs(volumes, holes)),
        ("swapped blocks", lambda: swap_patches(volumes, rows, 0, 0, PatchSettings()), None),
        ("three slices, two views each",
         lambda: slice_views(partition_slices(volumes, rows, 0, 0, 3).slices_bpchw, rows, 0, 0, published), None),
        ("two views of three slices alone", lambda: slice_views(sampled, rows, 0, 0, published), None),
    ]  # fmt: skip


def seconds(case: Case) -> float:
    """Processor time of one batch: on one thread it is the wall-clock time on an idle machine."""
    started = time.process_time()
    case()
    return time.process_time() - started


def medians(cases: Sequence[Case], repeats: int) -> list[float]:
    """Median processor seconds of each case, taking turns after one unmeasured turn."""
    for case in cases:
        seconds(case)
    turns = [[seconds(case) for case in cases] for _ in range(repeats)]
    return [statistics.median(of_case) for of_case in zip(*turns, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    monai.data.set_track_meta(False)
    table = Table(
        "view", "ours, volumes/s", "MONAI, volumes/s", "ratio", title="Views at 91 x 109 x 91, one thread"
    )
    for name, mine, other in comparisons(brains()):
        times = medians([mine] if other is None else [mine, other], repeats)
        speeds = [SUBJECTS / time for time in times]
        compared = (f"{speeds[1]:.0f}", f"{speeds[0] / speeds[1]:.1f}") if other else ("–", "–")
        table.add_row(name, f"{speeds[0]:.0f}", *compared)
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
