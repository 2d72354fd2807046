"""From volumes to views of them. Suffixes: B subjects, V views, C channels, X, Y, Z."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from core.errors import UserError
from core.volumes.images.mirror import DIRECTIONS, RAS, Direction, world_axis
from core.volumes.images.nifti import Affine
from core.volumes.views.intensity import recolour
from core.volumes.views.motion import move, move_maps, movement
from core.volumes.views.settings import Sides, ViewSettings
from core.volumes.views.streams import Subjects, choices_of, standard_normal, stream_of
from core.volumes.views.turns import quarter_turns

Choices = dict[str, npt.NDArray[np.float64]]

CHOICES = {
    "corner": 3, "cut_corner": 3, "cut": 1, "flip": 3, "rotate": 3, "zoom": 1, "translate": 3, "scale": 1,
    "shift": 1, "contrast": 1, "gamma": 1, "happens": 4, "on_class": 2, "one_of": 1, "eighths": 1,
}  # fmt: skip
"""How many uniform numbers a view draws for each choice, in the order of drawing.

All are drawn, used or not, so that switching the crop on does not move the cutouts. New choices are added at the
end, so that old views stay the same.
"""

HAPPENS = ("crop", "noise", "move", "intensity")
"""What a view may be spared, in the order of its numbers `happens`."""

VOLUMES_AT_ONCE = 8
"""How many volumes are moved in one call on a GPU; each takes 12 bytes a voxel beside itself."""


class _View(NamedTuple):
    row: int  # of the batch
    number: int
    stream: np.random.SeedSequence
    choices: Choices
    settings: ViewSettings
    """Those of all views, or with `one_of` those of one change alone."""


class Views(NamedTuple):
    """Views of volumes (B, V, C, X, Y, Z), and of their maps of classes (B, V, M, X, Y, Z) int16."""

    volumes: torch.Tensor
    maps: torch.Tensor


def make_views(
    volumes_bcxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    settings: ViewSettings,
    affine: Affine = RAS,
) -> torch.Tensor:
    """The views of volumes alone (B, V, C, X, Y, Z); see `make_views_with_maps`."""
    shape = (len(volumes_bcxyz), 0, *volumes_bcxyz.shape[2:])
    no_maps = torch.empty(shape, dtype=torch.int16, device=volumes_bcxyz.device)
    return make_views_with_maps(volumes_bcxyz, no_maps, subjects, epoch, seed, settings, affine).volumes


def make_views_with_maps(
    volumes_bcxyz: torch.Tensor,
    maps_bmxyz: torch.Tensor,
    subjects: Subjects,
    epoch: int,
    seed: int,
    settings: ViewSettings,
    affine: Affine = RAS,
) -> Views:
    """`settings.count` random views of each volume, on the volumes' device, in which maps are moved as volumes are.

    Args:
        volumes_bcxyz: volumes (B, C, X, Y, Z), floating point, 0 outside the brain.
        maps_bmxyz: their M maps of classes (B, M, X, Y, Z) int16: flipped, moved (to the nearest voxel), cropped and
            turned like the volumes; 0 where a view reaches beyond them. Intensities, noise and cutouts leave them.
        subjects: (B,) whole numbers that identify the subjects, such as rows of the cohort; not negative.
        epoch: number of the epoch, not negative; a subject gets new views in each.
        seed: seed of the run, not negative.
        settings: the changes, in the order flips, movement, intensities, noise, cutout, crop, quarter turns, so that
            cut and padded voxels are exactly 0. Cutouts keep their place on the volume's grid.
        affine: 4x4 voxel-to-world, which says where left and right are; a cohort's is RAS.

    Returns:
        (B, V, C, X, Y, Z), new tensors of the volumes' dtype, and of int16; X, Y, Z are `settings.pad_to` if given.
        Flips, crops and cutouts are the same on all devices; movements and intensities to rounding; noise on every
        device of one type.

    Raises:
        UserError: `settings.pad_to` is smaller than the volume or its crop, or views with quarter turns have unequal
            sides.
    """
    if settings.change_nothing:
        return Views(*(torch.stack([each] * settings.count, dim=1) for each in (volumes_bcxyz, maps_bmxyz)))
    if len(subjects) != len(volumes_bcxyz):
        raise ValueError(f"{len(volumes_bcxyz)} volumes for {len(subjects)} subjects")
    subjects_count, channels, *grid = volumes_bcxyz.shape
    grid_of_views = _grid_of_views(grid, settings)
    # if views fill every voxel, the memory need not be zero
    fills = list(grid_of_views) == _kept_sides(grid, settings) and settings.crop_probability in (0.0, 1.0)
    allocate = volumes_bcxyz.new_empty if fills else volumes_bcxyz.new_zeros
    out_bvcxyz = allocate((subjects_count, settings.count, channels, *grid_of_views))
    out_bvmxyz = maps_bmxyz.new_zeros((subjects_count, settings.count, maps_bmxyz.shape[1], *grid_of_views))
    views = [
        _View(row, number, stream, choices, settings.with_one_of(choices["one_of"][0]))
        for row, subject in enumerate(subjects)
        for number in range(settings.count)
        for stream in [stream_of(seed, subject, epoch, number)]
        for choices in [_draw(stream)]
    ]
    is_placed = any(settings.flips) or settings.rotate_about is not None or settings.eighth_turns is not None
    axes = {
        direction: world_axis(affine, direction) if is_placed else axis
        for axis, direction in enumerate(DIRECTIONS)
    }
    for part in _parts(views, volumes_bcxyz.device):
        sources = [_flipped(volumes_bcxyz[view.row], view.choices, view.settings, axes) for view in part]
        maps = [_flipped(maps_bmxyz[view.row], view.choices, view.settings, axes) for view in part]
        if settings.moves:
            moved = [
                place
                for place, view in enumerate(part)
                if view.settings.moves and _happens(view.choices, "move", settings)
            ]
            movements = [_movement(sources[place].shape[1:], part[place], axes) for place in moved]
            if moved:
                made = move(torch.stack([sources[place] for place in moved]), np.stack(movements))
                for place, source in zip(moved, made, strict=True):
                    sources[place] = source
                if maps_bmxyz.shape[1]:
                    of_maps = move_maps(torch.stack([maps[place] for place in moved]), np.stack(movements))
                    for place, source in zip(moved, of_maps, strict=True):
                        maps[place] = source
        for source_cxyz, map_mxyz, view in zip(sources, maps, part, strict=True):
            recolours = settings.recolours and _happens(view.choices, "intensity", settings)
            coloured_cxyz = _recoloured(source_cxyz, view.choices, settings) if recolours else source_cxyz
            kept = _place_of_crop(source_cxyz.shape[1:], map_mxyz, view.choices, settings)
            _write_view(out_bvcxyz[view.row, view.number], coloured_cxyz, kept, view, settings)
            if len(map_mxyz):
                into_mxyz = _inside(out_bvmxyz[view.row, view.number], kept)
                into_mxyz.copy_(map_mxyz[:, kept[0], kept[1], kept[2]])
    if settings.quarter_turns is None:
        return Views(out_bvcxyz, out_bvmxyz)
    turned = [
        torch.stack(
            [
                quarter_turns(
                    each[:, number], subjects, epoch, seed, view=number, about=settings.quarter_turns, affine=affine
                )[0]
                for number in range(settings.count)
            ],
            dim=1,
        )
        for each in (out_bvcxyz, out_bvmxyz)
    ]  # fmt: skip
    return Views(*turned)


def _happens(choices: Choices, change: str, settings: ViewSettings) -> bool:
    """Whether a view has this change, which only a share of all views has."""
    share: float = getattr(settings, f"{change}_probability")
    return bool(choices["happens"][HAPPENS.index(change)] < share)


def _draw(stream: np.random.SeedSequence) -> Choices:
    """The uniform numbers in [0, 1) of one view, by choice."""
    ends = np.cumsum(list(CHOICES.values()))
    parts = np.split(choices_of(stream).random(ends[-1]), ends[:-1])
    return dict(zip(CHOICES, parts, strict=True))


def _parts(views: Sequence[_View], device: torch.device) -> Iterator[Sequence[_View]]:
    """Views in parts that are moved together: as many as the CPU has threads, since each takes one."""
    at_once = torch.get_num_threads() if device.type == "cpu" else VOLUMES_AT_ONCE
    return (views[first : first + at_once] for first in range(0, len(views), at_once))


def _flipped(
    volume_cxyz: torch.Tensor, choices: Choices, settings: ViewSettings, axes: Mapping[Direction, int]
) -> torch.Tensor:
    """The volume with those of its left-right, front-back and up-down `axes` exchanged that were drawn."""
    flips = zip(axes.values(), choices["flip"], settings.flips, strict=True)
    chosen = [1 + axis for axis, chance, probability in flips if chance < probability]
    return volume_cxyz.flip(chosen) if chosen else volume_cxyz


def _movement(grid: Sequence[int], view: _View, axes: Mapping[Direction, int]) -> npt.NDArray[np.float64]:
    """The affine (3, 4) of one view's movement; sizes are uniform in their logarithm, as 1.1 undoes 1 / 1.1."""
    settings, choices = view.settings, view.choices
    degrees = settings.rotate * _signed(choices["rotate"])
    if settings.rotate_about is not None:
        only = axes[settings.rotate_about]
        degrees = np.where(np.arange(3) == only, degrees, 0.0)
    if settings.eighth_turns is not None:
        degrees[axes[settings.eighth_turns]] += 45 * int(8 * choices["eighths"][0])
    return movement(
        degrees,
        (1 + settings.zoom) ** _signed(choices["zoom"])[0],
        settings.translate * min(grid) * _signed(choices["translate"]),
    )


def _recoloured(volume_cxyz: torch.Tensor, choices: Choices, settings: ViewSettings) -> torch.Tensor:
    scale, shift, contrast, gamma = (
        _signed(choices[name])[0] * getattr(settings, name)
        for name in ("scale", "shift", "contrast", "gamma")
    )
    return recolour(volume_cxyz, scale=1 + scale, shift=shift, contrast=1 + contrast, gamma=math.exp(gamma))


def _signed(uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [-1, 1) from those in [0, 1)."""
    return 2 * uniform - 1


def _grid_of_views(grid: Sequence[int], settings: ViewSettings) -> tuple[int, int, int]:
    """X, Y, Z of a view; UserError if the part of the volume that is kept does not fit in it."""
    kept = _kept_sides(grid, settings) if settings.crop_probability == 1 else list(grid)
    wanted = tuple(grid) if settings.pad_to is None else _three(settings.pad_to)
    if any(side > room for side, room in zip(kept, wanted, strict=True)):
        raise UserError(
            f"views.pad_to={settings.pad_to} is smaller than the {' x '.join(map(str, kept))} voxels that are "
            f"kept of the {' x '.join(map(str, grid))} of a volume; crop more or pad to a larger grid"
        )
    x, y, z = wanted
    return x, y, z


def _kept_sides(grid: Sequence[int], settings: ViewSettings) -> list[int]:
    """Voxels along X, Y, Z that a crop keeps."""
    if settings.crop_size is not None:
        return [min(size, side) for size, side in zip(_three(settings.crop_size), grid, strict=True)]
    return [max(1, round((settings.crop or 1.0) * side)) for side in grid]


def _three(sides: Sides) -> tuple[int, int, int]:
    return (sides, sides, sides) if isinstance(sides, int) else sides


def _place_of_crop(
    grid: Sequence[int], map_mxyz: torch.Tensor, choices: Choices, settings: ViewSettings
) -> list[slice[int, int]]:
    """The block of a volume that a view keeps."""
    kept = _kept_sides(grid, settings) if _happens(choices, "crop", settings) else list(grid)
    if settings.crop_place == "centre":
        return _middle(grid, kept)
    if choices["on_class"][0] < settings.crop_on_class and len(map_mxyz):
        there = (map_mxyz > 0).any(0).nonzero()
        if len(there):
            # Any voxel of any class, as near to the middle of the crop as the grid allows.
            middle = there[int(choices["on_class"][1] * len(there))].tolist()
            starts = [
                min(max(at - side // 2, 0), whole - side)
                for at, side, whole in zip(middle, kept, grid, strict=True)
            ]
            return [slice(start, start + side) for start, side in zip(starts, kept, strict=True)]
    return _block(grid, kept, choices["corner"])


def _inside(out_cxyz: torch.Tensor, source: Sequence[slice[int, int]]) -> torch.Tensor:
    """The middle of a view, where the block `source` of a volume goes."""
    sides = [block.stop - block.start for block in source]
    target = _middle(out_cxyz.shape[1:], sides)
    return out_cxyz[:, target[0], target[1], target[2]]


def _write_view(
    out_cxyz: torch.Tensor,
    volume_cxyz: torch.Tensor,
    source: Sequence[slice[int, int]],
    view: _View,
    settings: ViewSettings,
) -> None:
    """Fill `out_cxyz` with the block `source` of `volume_cxyz`, noise and cutout; around it it must hold zeros."""
    choices = view.choices
    grid = volume_cxyz.shape[1:]
    kept_cxyz = _inside(out_cxyz, source)
    kept_cxyz.copy_(volume_cxyz[:, source[0], source[1], source[2]])
    if settings.noise > 0 and _happens(choices, "noise", settings):
        noise = standard_normal(kept_cxyz, view.stream)
        if settings.noise_in == "brain":
            noise = noise.mul_(kept_cxyz != 0)
        kept_cxyz.add_(noise, alpha=settings.noise)
    if choices["cut"][0] < settings.cutout:
        cube = max(1, round(settings.cutout_size * min(grid)))
        cut = _block(grid, [cube, cube, cube], choices["cut_corner"])
        inside = [
            slice(max(block.start - kept.start, 0), max(block.stop - kept.start, 0))
            for block, kept in zip(cut, source, strict=True)
        ]
        kept_cxyz[:, inside[0], inside[1], inside[2]] = 0


def _block(
    grid: Sequence[int], sides: Sequence[int], corner: npt.NDArray[np.float64]
) -> list[slice[int, int]]:
    """The block of `sides` voxels whose corner lies at the fraction `corner`, in [0, 1), of the free room."""
    starts = [int(at * (side - kept + 1)) for side, kept, at in zip(grid, sides, corner, strict=True)]
    return [slice(start, start + kept) for start, kept in zip(starts, sides, strict=True)]


def _middle(grid: Sequence[int], sides: Sequence[int]) -> list[slice[int, int]]:
    """The block of `sides` voxels in the middle of the grid, an odd remainder on the far side."""
    starts = [(side - kept) // 2 for side, kept in zip(grid, sides, strict=True)]
    return [slice(start, start + kept) for start, kept in zip(starts, sides, strict=True)]
