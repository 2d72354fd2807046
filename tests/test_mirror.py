from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from core.errors import UserError
from core.volumes.images.mirror import midline_offset, midline_voxel, mirror, world_axis
from core.volumes.views.turns import mirrored_crops, quarter_turns

GRID = (16, 13, 11)
ORIENTATIONS = [
    "".join(side[flip] for side, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for flips in itertools.product((0, 1), repeat=3)
]


def affine_for(codes: str, spacing: float = 2.0) -> np.ndarray:
    """The axes of the array point to `codes`, such as P, S and R."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, code in enumerate(codes):
        world = next(number for number, ends in enumerate(("LR", "PA", "IS")) if code in ends)
        affine[world, axis] = spacing if code in "RAS" else -spacing
    assert "".join(nib.aff2axcodes(affine)) == codes
    return affine


def volumes(count: int, channels: int = 2, grid: tuple[int, int, int] = GRID) -> torch.Tensor:
    """No two voxels alike."""
    voxels = count * channels * int(np.prod(grid))
    return torch.arange(1, voxels + 1).reshape(count, channels, *grid)


def place_of(volume: torch.Tensor, patch: torch.Tensor) -> list[int]:
    """The voxel of `volume` (C, X, Y, Z) whose value stands first in `patch`."""
    return [int(at) for at in (volume[0] == patch[0, 0, 0, 0]).nonzero()[0]]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_each_direction_is_found_in_every_orientation(codes):
    affine = affine_for(codes)
    axes = [world_axis(affine, direction) for direction in ("left_right", "front_back", "up_down")]
    assert [codes[axis] in ends for axis, ends in zip(axes, ("LR", "PA", "IS"), strict=True)] == [True] * 3


def test_a_flat_affine_has_no_axis_for_a_direction():
    with pytest.raises(UserError, match="no up-down axis"):
        world_axis(np.diag([1.0, 1.0, 0.0, 1.0]), "up_down")


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "SPL"])
def test_the_midline_is_where_the_world_is_zero(codes):
    affine = affine_for(codes)
    affine[:3, 3] = [-9.0, 4.0, 7.0]
    axis = world_axis(affine, "left_right")
    voxel = [(side - 1) / 2 for side in GRID]
    voxel[axis] = midline_voxel(affine, GRID)
    assert (affine @ [*voxel, 1])[0] == pytest.approx(0, abs=1e-12)


def test_the_midline_of_a_centred_grid_is_its_middle():
    affine = affine_for("RAS")
    affine[0, 3] = -2.0 * (GRID[0] - 1) / 2
    assert midline_offset(affine, GRID) == 0
    assert midline_voxel(affine, GRID) == (GRID[0] - 1) / 2


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "SRA"])
def test_a_counterpart_is_the_same_patch_of_the_mirror_image(codes):
    affine = affine_for(codes)
    batch = volumes(5)
    pairs = mirrored_crops(batch, range(5), 1, 0, (6, 5, 4), affine=affine)
    assert pairs.shape == (5, 2, 2, 6, 5, 4)
    for volume, (patch, counterpart) in zip(batch, pairs, strict=True):
        x, y, z = place_of(volume, patch)
        block = (slice(None), slice(x, x + 6), slice(y, y + 5), slice(z, z + 4))
        assert torch.equal(patch, volume[block])
        assert torch.equal(counterpart, mirror(volume, affine)[block])


def test_the_counterpart_of_a_counterpart_is_the_patch():
    batch = volumes(4)
    pairs = mirrored_crops(batch, range(4), 1, 0, 5)
    of_mirror = mirrored_crops(mirror(batch), range(4), 1, 0, 5)
    assert torch.equal(pairs.flip(1), of_mirror)


@pytest.mark.parametrize("midline", [5.0, 7.5, 8.0, 9.5, 9.3])
def test_a_patch_and_its_counterpart_lie_opposite_about_the_midline(midline):
    nearest = np.floor(2 * midline + 0.5) / 2
    x_of = torch.arange(GRID[0])[:, None, None].expand(1, 1, *GRID).expand(200, -1, -1, -1, -1)
    pairs = mirrored_crops(x_of, range(200), 0, 0, 4, midline=midline)
    assert torch.equal(pairs[:, 0] + pairs[:, 1], torch.full_like(pairs[:, 0], int(2 * nearest)))
    # every place with a counterpart is reached, and no other
    starts = pairs[:, 0, 0, 0, 0, 0].unique().tolist()
    possible = [
        start
        for start in range(GRID[0] - 3)
        if 2 * nearest - start - 3 >= 0 and 2 * nearest - start < GRID[0]
    ]
    assert starts == possible


def test_whole_volumes_are_their_own_patches():
    batch = volumes(2)
    pairs = mirrored_crops(batch, range(2), 0, 0, GRID)
    assert torch.equal(pairs[:, 0], batch)
    assert torch.equal(pairs[:, 1], mirror(batch))


def test_label_maps_travel_with_their_images():
    images, labels = volumes(3).float(), volumes(3, 1) % 7
    crops = mirrored_crops(images, [5, 1, 8], 2, 3, 6)
    of_labels = mirrored_crops(labels, [5, 1, 8], 2, 3, 6)
    recovered = (crops[:, :, :1].long() - 1) % (2 * int(np.prod(GRID))) % int(np.prod(GRID))
    for row in range(3):
        expected = (volumes(3, 1)[row].flatten() % 7)[recovered[row].flatten()].reshape(2, 1, 6, 6, 6)
        assert torch.equal(of_labels[row], expected)
    assert of_labels.dtype == torch.int64


def test_crops_and_turns_do_not_depend_on_the_batch():
    batch = volumes(4)
    together = mirrored_crops(batch, [7, 3, 11, 5], 2, 1, 6)
    turned, turns = quarter_turns(together, [7, 3, 11, 5], 2, 1)
    some = mirrored_crops(batch[[2, 0]], torch.tensor([11, 7]), 2, 1, 6)
    some_turned, some_turns = quarter_turns(some, [11, 7], 2, 1)
    assert torch.equal(some, together[[2, 0]])
    assert torch.equal(some_turned, turned[[2, 0]])
    assert torch.equal(some_turns, turns[[2, 0]])


@pytest.mark.parametrize("other", [{"subjects": range(50, 90)}, {"epoch": 3}, {"seed": 2}, {"view": 1}])
def test_seed_epoch_view_and_subject_each_change_places_and_turns(other):
    batch = volumes(1).expand(40, -1, -1, -1, -1)
    settings = {"subjects": range(40), "epoch": 2, "seed": 1}
    changed = settings | other
    assert not torch.equal(
        mirrored_crops(batch, size=6, **settings), mirrored_crops(batch, size=6, **changed)
    )
    cubes = batch[..., :11, :11]
    assert not torch.equal(quarter_turns(cubes, **settings)[1], quarter_turns(cubes, **changed)[1])


@pytest.mark.parametrize(("size", "midline"), [((17, 4, 4), None), ((4, 4, 12), None), ((5, 4, 4), 1.5)])
def test_patches_that_do_not_fit_are_refused(size, midline):
    with pytest.raises(UserError, match="does not fit into the"):
        mirrored_crops(volumes(1), [0], 0, 0, size, midline=midline)


def test_labels_are_how_many_quarters_a_volume_was_turned():
    batch = volumes(60, 1, (5, 8, 8))
    turned, turns = quarter_turns(batch, range(60), 0, 0)
    assert turns.dtype == torch.int64
    assert torch.bincount(turns).min() > 5
    for volume, result, turn in zip(batch, turned, turns.tolist(), strict=True):
        back = result
        for _ in range(turn):
            back = back.transpose(2, 3).flip(3)  # a quarter in the other direction
        assert torch.equal(back, volume)


def test_turns_keep_left_and_right_and_mirroring():
    pairs = mirrored_crops(volumes(20), range(20), 0, 0, 8)
    turned, turns = quarter_turns(pairs, range(20), 0, 0)
    apart = quarter_turns(pairs[:, 1], range(20), 0, 0)[0]
    assert torch.equal(apart, turned[:, 1])
    assert torch.equal(turned.sum((4, 5)), pairs.sum((4, 5)))  # what lies at one X stays there
    assert turns.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("about", "grid"), [("front_back", (6, 4, 6)), ("up_down", (6, 6, 4))])
def test_turns_about_other_directions(about, grid):
    batch = volumes(12, 1, grid)
    turned, turns = quarter_turns(batch, range(12), 0, 0, about=about)
    axis = {"front_back": 1, "up_down": 2}[about]
    plane = [2 + other for other in range(3) if other != axis]
    assert torch.equal(turned.sum(plane), batch.sum(plane))
    assert turns.max() > 0


def test_unequal_sides_cannot_be_turned():
    with pytest.raises(UserError, match="need equal front-back and up-down sides, got 13 and 11 voxels"):
        quarter_turns(volumes(1), [0], 0, 0)
    psr = affine_for("PSR")
    assert quarter_turns(volumes(1, 1, (6, 6, 9)), [0], 0, 0, affine=psr)[0].shape[2:] == (6, 6, 9)
