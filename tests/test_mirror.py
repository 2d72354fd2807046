from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from core.errors import UserError
from core.volumes.images.mirror import mirror_image, opposite_voxels, world_axis
from core.volumes.views import ViewSettings, make_views
from core.volumes.views.turns import quarter_turns

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


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_each_direction_is_found_in_every_orientation(codes):
    affine = affine_for(codes)
    axes = [world_axis(affine, direction) for direction in ("left_right", "front_back", "up_down")]
    assert [codes[axis] in ends for axis, ends in zip(axes, ("LR", "PA", "IS"), strict=True)] == [True] * 3


def test_a_flat_affine_has_no_axis_for_a_direction():
    with pytest.raises(UserError, match="no up-down axis"):
        world_axis(np.diag([1.0, 1.0, 0.0, 1.0]), "up_down")


def head(opposite: int, grid: tuple[int, int, int] = GRID, seed: int = 0) -> torch.Tensor:
    """(1, 1, X, Y, Z): random voxels, the same on both sides of a plane, and zeros where there is no counterpart."""
    draws = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) + 1
    volume = torch.zeros(grid)
    for i in range(grid[0]):
        j = opposite - i
        if 0 <= j < grid[0]:
            volume[i] = draws[min(i, j)]
    return volume[None, None]


@pytest.mark.parametrize("opposite", [10, 13, 14, 15, 16, 19, 21])
def test_the_middle_of_a_head_is_found_wherever_it_lies(opposite):
    """Among all planes by brute force the one about which most of the head lies opposite to the head."""
    volume = head(opposite)
    # A bright lesion on one side moves nothing.
    volume[0, 0, max(0, opposite - GRID[0] + 1) + 1, 3:6, 3:6] *= 100
    line = (volume[0, 0] != 0).float()
    slowly = [
        sum(float((line[i] * line[o - i]).sum()) for i in range(GRID[0]) if 0 <= o - i < GRID[0])
        for o in range(2 * GRID[0] - 1)
    ]
    assert opposite_voxels(volume) == [int(np.argmax(slowly))] == [opposite]


def test_heads_of_a_batch_have_their_own_middles_and_an_empty_one_that_of_the_grid():
    batch = torch.cat([head(12), head(17, seed=1), torch.zeros(1, 1, *GRID)])
    assert opposite_voxels(batch) == [12, 17, GRID[0] - 1]
    assert opposite_voxels(-batch) == [12, 17, GRID[0] - 1]


def test_a_mirror_image_has_every_voxel_at_the_opposite_place():
    batch = torch.rand(3, 2, *GRID)
    for opposites in ([15, 15, 15], [12, 15, 19]):
        mirrored = mirror_image(batch, opposites)
        for row, opposite in enumerate(opposites):
            for i in range(GRID[0]):
                inside = 0 <= opposite - i < GRID[0]
                expected = batch[row, :, opposite - i] if inside else torch.zeros(2, *GRID[1:])
                assert torch.equal(mirrored[row, :, i], expected)


def test_a_symmetric_head_off_the_middle_is_its_own_mirror_image():
    for opposite in (11, 18):
        volume = head(opposite)
        assert torch.equal(mirror_image(volume), volume)
        assert not torch.equal(volume.flip(2), volume)


def test_crops_of_a_head_and_of_its_mirror_image_lie_opposite():
    """A crop of the mirror image at the same place is the counterpart of the crop."""
    volume = torch.rand(4, 1, *GRID)
    both = torch.cat([volume, mirror_image(volume, [15] * 4)], dim=1)
    seen = make_views(both, range(4), 1, 0, ViewSettings(count=1, crop_size=6, pad_to=6))[:, 0]
    for row in range(4):
        at = (volume[row, 0] == seen[row, 0, 0, 0, 0]).nonzero()[0].tolist()
        for i in range(6):
            opposite = GRID[0] - 1 - (at[0] + i)
            part = volume[row, 0, opposite, at[1] : at[1] + 6, at[2] : at[2] + 6]
            assert torch.equal(seen[row, 1, i], part)


def test_turns_do_not_depend_on_the_batch():
    batch = volumes(4)[..., :11, :11]
    turned, turns = quarter_turns(batch, [7, 3, 11, 5], 2, 1)
    some_turned, some_turns = quarter_turns(batch[[2, 0]], [11, 7], 2, 1)
    assert torch.equal(some_turned, turned[[2, 0]])
    assert torch.equal(some_turns, turns[[2, 0]])


@pytest.mark.parametrize("other", [{"subjects": range(50, 90)}, {"epoch": 3}, {"seed": 2}, {"view": 1}])
def test_seed_epoch_view_and_subject_each_change_turns(other):
    cubes = volumes(1).expand(40, -1, -1, -1, -1)[..., :11, :11]
    settings = {"subjects": range(40), "epoch": 2, "seed": 1}
    assert not torch.equal(quarter_turns(cubes, **settings)[1], quarter_turns(cubes, **(settings | other))[1])


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
    one = volumes(20)[:, :, :8, :8, :8]
    pairs = torch.stack([one, one.flip(2)], dim=1)
    turned, turns = quarter_turns(pairs, range(20), 0, 0)
    apart = quarter_turns(pairs[:, 1], range(20), 0, 0)[0]
    assert torch.equal(apart, turned[:, 1])
    assert torch.equal(turned[:, 1], turned[:, 0].flip(2))
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
