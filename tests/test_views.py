from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from monai.networks.layers import AffineTransform
from monai.transforms import AdjustContrast, ScaleIntensity, ShiftIntensity
from monai.transforms.utils import create_rotate, create_translate
from pydantic import ValidationError
from reference_views import published_view

from core.config import resolve
from core.errors import UserError
from core.volumes.views import ViewSettings, make_views, make_views_with_maps
from core.volumes.views.intensity import recolour
from core.volumes.views.motion import move, movement

GRID = (12, 15, 10)


def volumes(count: int, channels: int = 1) -> torch.Tensor:
    """Volumes without a zero or a repeated value, so that every voxel can be told."""
    voxels = count * channels * int(np.prod(GRID))
    return torch.arange(1, voxels + 1, dtype=torch.float32).reshape(count, channels, *GRID)


ALL = ViewSettings(count=3, crop=0.8, cutout=0.5, noise=0.1)


def test_a_view_does_not_depend_on_batch_or_order() -> None:
    batch = volumes(4)
    together = make_views(batch, [7, 3, 11, 5], epoch=2, seed=1, settings=ALL)
    reordered = make_views(batch[[2, 0]], torch.tensor([11, 7]), epoch=2, seed=1, settings=ALL)
    assert torch.equal(reordered, together[[2, 0]])


@pytest.mark.parametrize("other", [{"subjects": [8]}, {"epoch": 3}, {"seed": 2}])
def test_seed_epoch_and_subject_each_change_the_view(other: dict) -> None:
    settings = {"subjects": [7], "epoch": 2, "seed": 1}
    one = make_views(volumes(1), settings=ALL, **settings)
    two = make_views(volumes(1), settings=ALL, **{**settings, **other})
    assert not torch.equal(one, two)


def test_views_of_one_subject_differ() -> None:
    views = make_views(volumes(1), [0], epoch=1, seed=0, settings=ALL)[0]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])


def test_fewer_views_are_the_first_of_more() -> None:
    more = make_views(volumes(2), [0, 1], epoch=1, seed=0, settings=ALL)
    fewer = make_views(volumes(2), [0, 1], epoch=1, seed=0, settings=ALL.model_copy(update={"count": 2}))
    assert torch.equal(fewer, more[:, :2])


@pytest.mark.parametrize("settings", [ViewSettings(), ViewSettings(count=3, crop=1.0)])
def test_settings_that_change_nothing_give_the_volume_itself(settings: ViewSettings) -> None:
    batch = volumes(2, channels=2)
    views = make_views(batch, [0, 1], epoch=0, seed=0, settings=settings)
    assert settings.change_nothing
    assert views.shape == (2, settings.count, 2, *GRID)
    assert all(torch.equal(views[:, view], batch) for view in range(settings.count))
    views += 1  # the caller owns the result
    assert torch.equal(batch, volumes(2, channels=2))


def test_a_crop_is_a_block_of_the_volume_centred_in_zeros() -> None:
    batch = volumes(6, channels=2)
    views = make_views(batch, range(6), epoch=0, seed=3, settings=ViewSettings(crop=0.8))
    sides = (10, 12, 8)  # 0.8 of 12, 15, 10 to the nearest voxel
    offsets = (1, 1, 1)  # the odd remainder goes to the far side, as in the reference
    starts = set()
    for volume, pair in zip(batch, views, strict=True):
        for view in pair:
            inner = view[:, 1 : 1 + sides[0], 1 : 1 + sides[1], 1 : 1 + sides[2]]
            assert torch.count_nonzero(view) == torch.count_nonzero(inner) == inner.numel()
            start = [int(at) for at in (volume[0] == inner[0, 0, 0, 0]).nonzero()[0]]
            block = volume[:, *(slice(a, a + side) for a, side in zip(start, sides, strict=True))]
            assert torch.equal(inner, block)
            starts.add(tuple(np.subtract(start, offsets)))
    assert len(starts) > 6  # places vary


def test_crops_reach_every_place() -> None:
    batch = volumes(1).expand(300, -1, -1, -1, -1)
    views = make_views(batch, range(300), epoch=0, seed=0, settings=ViewSettings(count=1, crop=0.8))
    corners = views[:, 0, 0, 1, 1, 1].long() - 1
    x_starts, counts = torch.unique(corners // (GRID[1] * GRID[2]), return_counts=True)
    assert x_starts.tolist() == [0, 1, 2]
    assert counts.min() > 70  # 100 expected each


def test_cutout_zeroes_exactly_one_cube_in_every_channel() -> None:
    batch = volumes(8, channels=2)
    views = make_views(batch, range(8), epoch=0, seed=0, settings=ViewSettings(cutout=1.0, cutout_size=0.4))
    for volume, pair in zip(batch, views, strict=True):
        for view in pair:
            zero = view == 0
            assert torch.equal(zero[0], zero[1])
            spans = [axis.unique() for axis in zero[0].nonzero(as_tuple=True)]
            assert [len(span) for span in spans] == [4, 4, 4]  # 0.4 of the shortest side, 10
            assert all(int(span[-1] - span[0]) == 3 for span in spans)
            assert zero[0].sum() == 4**3
            assert torch.equal(view[~zero], volume[~zero])


def test_cutout_happens_with_its_probability() -> None:
    batch = volumes(1).expand(400, -1, -1, -1, -1)
    views = make_views(batch, range(400), epoch=0, seed=0, settings=ViewSettings(count=1, cutout=0.3))
    share = (views.flatten(1) == 0).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / 400) ** 0.5)


def test_noise_has_its_standard_deviation_and_no_mean() -> None:
    batch = torch.zeros(2, 1, 40, 40, 40)
    views = make_views(batch, [0, 1], epoch=0, seed=0, settings=ViewSettings(noise=0.05)).flatten(2)
    n = views.shape[-1]
    assert views.std(dim=2).flatten().tolist() == pytest.approx([0.05] * 4, rel=4 / (2 * n) ** 0.5)
    assert views.mean(dim=2).abs().max() < 5 * 0.05 / n**0.5
    correlation = torch.corrcoef(views.flatten(0, 1)) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


def test_noise_leaves_padding_and_cutouts_at_zero() -> None:
    batch = volumes(4)
    plain = make_views(batch, range(4), 0, 0, ViewSettings(crop=0.8, cutout=1.0))
    noisy = make_views(batch, range(4), 0, 0, ViewSettings(crop=0.8, cutout=1.0, noise=0.01))
    assert torch.equal(plain == 0, noisy == 0)


def test_switching_one_choice_leaves_the_others_in_place() -> None:
    batch = volumes(4)
    cut = make_views(batch, range(4), 0, 0, ViewSettings(cutout=1.0)) == 0
    both = make_views(batch, range(4), 0, 0, ViewSettings(cutout=1.0, noise=0.1)) == 0
    assert torch.equal(cut, both)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_crops_and_cutouts_are_the_same_on_a_gpu() -> None:
    settings = ViewSettings(crop=0.8, cutout=0.5)
    on_cpu = make_views(volumes(4), range(4), 1, 2, settings)
    assert torch.equal(make_views(volumes(4).cuda(), range(4), 1, 2, settings).cpu(), on_cpu)


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.5}, {"cutout": 2}, {"noise": -1}, {"count": 0}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ViewSettings(**wrong)


def brain(grid: tuple[int, int, int] = GRID, channels: int = 2, seed: int = 0) -> torch.Tensor:
    """A random ellipsoid in exact zeros, (C, X, Y, Z), with values on both sides of 0."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.meshgrid(*(torch.linspace(-1, 1, side) ** 2 for side in grid), indexing="ij")
    return torch.randn(channels, *grid, generator=generator) * (sum(squares) < 0.8)


def brains(count: int, grid: tuple[int, int, int] = GRID, channels: int = 2) -> torch.Tensor:
    return torch.stack([brain(grid, channels, seed) for seed in range(count)])


EVERYTHING = ViewSettings(
    count=3, crop=0.9, cutout=0.5, noise=0.1, flip=0.5, flip_front_back=0.5, flip_up_down=0.5, rotate=15, zoom=0.1,
    translate=0.1, scale=0.1, shift=0.1, contrast=0.3, gamma=0.3,
)  # fmt: skip

ONE_BY_ONE = {
    "crop": {"crop": 0.8}, "crop_size": {"crop_size": 8}, "cutout": {"cutout": 1.0}, "noise": {"noise": 0.1},
    "flip": {"flip": 0.5}, "flip_front_back": {"flip_front_back": 0.5}, "flip_up_down": {"flip_up_down": 0.5},
    "rotate": {"rotate": 15}, "zoom": {"zoom": 0.1}, "translate": {"translate": 0.1}, "scale": {"scale": 0.1},
    "shift": {"shift": 0.1}, "contrast": {"contrast": 0.3}, "gamma": {"gamma": 0.3}, "pad_to": {"pad_to": 16},
    "crop_place": {"crop": 0.8, "crop_place": "centre"}, "eighth_turns": {"eighth_turns": "left_right"},
    "rotate_about": {"rotate": 15, "rotate_about": "front_back"}, "one_of": {"zoom": 0.1, "rotate": 15, "one_of": True},
}  # fmt: skip


@pytest.mark.parametrize(("crop", "cutout", "noise"), [(1.0, 0.5, 0.1), (0.8, 1.0, 0.1), (0.53, 0.5, 0.0)])
def test_crop_cutout_and_noise_are_those_of_the_first_release(crop, cutout, noise):
    batch = brains(3)
    settings = ViewSettings(crop=crop, cutout=cutout, cutout_size=0.4, noise=noise)
    views = make_views(batch, [4, 9, 6], epoch=3, seed=5, settings=settings)
    for row, subject in enumerate([4, 9, 6]):
        for view in range(2):
            expected = published_view(batch[row].numpy(), (5, subject, 3, view), crop, cutout, 0.4, noise)
            if noise:  # the sum may be fused
                np.testing.assert_allclose(views[row, view].numpy(), expected, rtol=0, atol=1e-6)
            else:
                np.testing.assert_array_equal(views[row, view].numpy(), expected)


@pytest.mark.parametrize("settings", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_every_setting_acts_and_says_so(settings):
    chosen = ViewSettings(count=2, **settings)
    assert not chosen.change_nothing
    views = make_views(brains(4), range(4), 0, 0, chosen)
    same = views.shape == (4, 2, 2, *GRID) and torch.equal(
        views, brains(4)[:, None].expand(-1, 2, -1, -1, -1, -1)
    )
    assert not same


@pytest.mark.parametrize("threads", [1, 2])
def test_no_view_depends_on_the_batch_to_the_last_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = make_views(brains(5), [7, 3, 11, 5, 2], 2, 1, EVERYTHING)
        for row, subject in enumerate([7, 3, 11, 5, 2]):
            alone = make_views(brains(5)[[row]], [subject], 2, 1, EVERYTHING)
            assert torch.equal(alone[0], together[row])
        reordered = make_views(brains(5)[[3, 0, 2]], [5, 7, 11], 2, 1, EVERYTHING)
        assert torch.equal(reordered, together[[3, 0, 2]])
    finally:
        torch.set_num_threads(before)


def test_another_process_makes_the_same_views(tmp_path):
    script = (
        "import torch\nfrom core.volumes.views import ViewSettings, make_views, make_views_with_maps\n"
        f"settings = ViewSettings.model_validate_json('{EVERYTHING.model_dump_json()}')\n"
        f"batch = torch.load({str(tmp_path / 'batch.pt')!r})\n"
        f"torch.save(make_views(batch, [4, 8], 3, 2, settings), {str(tmp_path / 'views.pt')!r})\n"
    )
    torch.save(brains(2), tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    assert torch.equal(torch.load(tmp_path / "views.pt"), make_views(brains(2), [4, 8], 3, 2, EVERYTHING))


@pytest.mark.parametrize(
    "other", [name for name in ONE_BY_ONE if name not in ("pad_to", "crop_place", "flip", "one_of")]
)
def test_switching_a_view_on_leaves_left_right_flips_where_they_were(other):
    """Left of the middle the volume is negative, right of it positive, whatever else is done to it."""
    side = torch.linspace(-1, 1, GRID[0]).sign()[:, None, None].expand(GRID)
    batch = (side * (1 + torch.rand(GRID)))[None, None].expand(40, -1, -1, -1, -1)
    settings = {"count": 1, "flip": 0.5} | ONE_BY_ONE[other]

    def flipped(views: torch.Tensor) -> torch.Tensor:
        profile = views[:, 0, 0].sum((2, 3))
        return profile.argmax(1) < profile.argmin(1)

    alone = flipped(make_views(batch, range(40), 0, 0, ViewSettings(count=1, flip=0.5)))
    assert torch.equal(flipped(make_views(batch, range(40), 0, 0, ViewSettings(**settings))), alone)
    assert 8 < alone.sum() < 32


def test_every_choice_is_drawn_whatever_is_switched_on():
    """One view alone, then with all others: the same numbers reach it, seen in what they can only have made."""
    batch = brains(6)
    turned = make_views(batch, range(6), 0, 0, ViewSettings(rotate=20, zoom=0.2, translate=0.1))
    brighter = make_views(batch, range(6), 0, 0, ViewSettings(rotate=20, zoom=0.2, translate=0.1, shift=0.5))
    shift = (brighter - turned)[turned != 0].reshape(-1)
    alone = make_views(batch, range(6), 0, 0, ViewSettings(shift=0.5)) - batch[:, None]
    assert len(alone[batch[:, None].expand_as(alone) != 0].mul(1e4).round().unique()) == 12
    assert set(shift.mul(1e4).round().unique().tolist()) <= {
        near
        for value in alone[batch[:, None].expand_as(alone) != 0].mul(1e4).round().unique().tolist()
        for near in (value - 1, value, value + 1)
    }


@pytest.mark.parametrize(("setting", "axis"), [("flip", 0), ("flip_front_back", 1), ("flip_up_down", 2)])
def test_flips_exchange_their_direction_with_their_probability(setting, axis):
    batch = volumes(1).expand(400, -1, -1, -1, -1)
    views = make_views(batch, range(400), 0, 0, ViewSettings(count=1, **{setting: 0.3}))[:, 0]
    mirrored = batch.flip(2 + axis)
    is_flipped = (views == mirrored).flatten(1).all(1)
    assert ((views == batch).flatten(1).all(1) ^ is_flipped).all()
    assert is_flipped.float().mean().item() == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / 400) ** 0.5)


def test_left_and_right_are_found_in_the_affine():
    psr = np.array([[0, 0, 2.0, 0], [-2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # arrays (P, S, R)
    views = make_views(volumes(2), range(2), 0, 0, ViewSettings(flip=1.0), affine=psr)
    assert torch.equal(views[:, 0], volumes(2).flip(4))


def test_flips_are_independent_of_each_other():
    batch = volumes(1).expand(400, -1, -1, -1, -1)
    settings = ViewSettings(count=1, flip=0.5, flip_front_back=0.5, flip_up_down=0.5)
    corners = make_views(batch, range(400), 0, 0, settings)[:, 0, 0, 0, 0, 0]
    _, counts = corners.unique(return_counts=True)
    assert len(counts) == 8
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_movements_are_monais_to_rounding():
    batch = brains(6, (14, 17, 12))
    rng = np.random.default_rng(0)
    degrees, sizes, voxels = (
        rng.uniform(-30, 30, (6, 3)),
        rng.uniform(0.8, 1.2, 6),
        rng.uniform(-3, 3, (6, 3)),
    )
    ours = move(batch, np.stack([movement(*each) for each in zip(degrees, sizes, voxels, strict=True)]))
    transform = AffineTransform(normalized=False, align_corners=False, reverse_indexing=True)
    to_middle = create_translate(3, [-(side - 1) / 2 for side in batch.shape[2:]])
    for row in range(6):
        turn = np.eye(4)
        for axis in range(3):  # X first, then Y, then Z
            angles = [0.0, 0.0, 0.0]
            angles[axis] = np.deg2rad(degrees[row, axis])
            turn = create_rotate(3, angles) @ turn
        brain_moves = create_translate(3, voxels[row]) @ turn @ np.diag([sizes[row]] * 3 + [1])
        theta = np.linalg.inv(to_middle) @ np.linalg.inv(brain_moves) @ to_middle
        theirs = transform(batch[[row]], torch.from_numpy(theta).float()[None])
        torch.testing.assert_close(ours[[row]], theirs, rtol=0, atol=2e-5)


def test_a_movement_by_whole_voxels_is_a_shift():
    batch = brains(1)
    moved = move(batch, movement(np.zeros(3), 1.0, np.array([2.0, -1.0, 3.0]))[None])
    torch.testing.assert_close(moved[0, :, 2:, :-1, 3:], batch[0, :, :-2, 1:, :-3], rtol=0, atol=1e-5)
    assert not moved[0, :, :2].any()  # from beyond the grid
    assert not moved[0, :, :, -1].any()


def test_a_quarter_turn_is_a_permutation_of_voxels():
    batch = brains(1, (11, 11, 11))
    moved = move(batch, movement(np.array([0.0, 0.0, 90.0]), 1.0, np.zeros(3))[None])
    torch.testing.assert_close(moved, torch.rot90(batch, 1, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("direction", "axis", "order"),
    [("up_down", 2, (0, 1, 2)), ("left_right", 0, (0, 1, 2)), ("up_down", 0, (2, 0, 1))],
)
def test_eighth_turns_are_multiples_of_45_degrees_about_one_axis(direction, axis, order):
    plane = [1 + each for each in range(3) if each != axis]
    ball = (
        torch.stack(torch.meshgrid(*[torch.arange(-5.0, 6.0)] * 3, indexing="ij")).norm(dim=0) < 4.5
    ).float()
    batch = (brains(1, (11, 11, 11), 1) * ball).expand(64, -1, -1, -1, -1)
    affine = np.eye(4)[:, [*order, 3]]
    views = make_views(batch, range(64), 0, 0, ViewSettings(count=1, eighth_turns=direction), affine)[:, 0]
    quarters = torch.stack([torch.rot90(batch[0], turn, plane) for turn in range(4)])
    nearest = (views[:, None] - quarters).abs().flatten(2).amax(2).amin(1) < 1e-4
    assert 20 < nearest.sum() < 44  # half of all multiples are quarters
    between = views[~nearest]
    again = move(between, np.stack([movement(45.0 * np.eye(3)[axis], 1.0, np.zeros(3))] * len(between)))
    # Two interpolations blur; of all quarters, one is far nearer than the others.
    gaps = (again[:, None] - quarters).square().flatten(2).mean(2).sort(dim=1).values
    assert (gaps[:, 0] < 0.5 * gaps[:, 1]).all()


def test_rotations_about_one_direction_leave_what_lies_along_it():
    batch = torch.ones(4, 1, 9, 9, 7) * torch.arange(1.0, 8.0)
    views = make_views(batch, range(4), 0, 0, ViewSettings(count=1, rotate=30, rotate_about="up_down"))[:, 0]
    torch.testing.assert_close(views[:, 0, 4, 4], batch[:, 0, 4, 4])
    assert (views[:, 0, 0, 0] == 0).any()  # corners come from beyond the grid


def test_with_one_of_a_view_has_one_change_at_most_and_all_are_equally_frequent():
    """Told apart by what each leaves of a volume: its mean along X, its sum, and which side is the larger one."""
    batch = torch.zeros(400, 1, 9, 9, 9)
    batch[:, :, 1:4, 3:6, 3:6] = 1.0
    settings = ViewSettings(count=1, translate=0.4, flip=1.0, zoom=0.5, one_of=True)
    views = make_views(batch, range(400), 0, 0, settings)[:, 0]
    same = (views == batch).flatten(1).all(1)
    flipped = (views == batch.flip(2)).flatten(1).all(1)
    zoomed, moved = (
        (views == make_views(batch, range(400), 0, 0, ViewSettings(count=1, **alone))[:, 0]).flatten(1).all(1)
        for alone in ({"zoom": 0.5}, {"translate": 0.4})
    )
    kinds = torch.stack([same, flipped, zoomed, moved]).int()
    assert (kinds.sum(0) == 1).all()
    assert scipy.stats.chisquare(kinds.sum(1).numpy()).pvalue > 1e-3
    with pytest.raises(ValidationError, match="one_of acts only with one of rotate, zoom"):
        ViewSettings(one_of=True, noise=0.1)


def test_zoom_shows_the_brain_larger():
    batch = (brains(1, (32, 32, 32), 1) != 0).float()
    larger = move(batch, movement(np.zeros(3), 1.1, np.zeros(3))[None])
    assert float(larger.sum() / batch.sum()) == pytest.approx(1.1**3, rel=0.01)


@pytest.mark.parametrize("side", [1, 2])
def test_flat_volumes_can_be_moved(side):
    views = make_views(torch.ones(2, 1, 8, 8, side), [0, 1], 0, 0, ViewSettings(rotate=10))
    assert torch.isfinite(views).all()
    assert views.any()


def test_movements_leave_zero_what_is_far_from_the_brain():
    batch = torch.zeros(8, 1, 24, 24, 24)
    batch[:, :, 8:16, 8:16, 8:16] = 1.0
    views = make_views(batch, range(8), 0, 0, ViewSettings(rotate=15, zoom=0.1, translate=0.05))
    far = torch.ones(24, 24, 24, dtype=torch.bool)
    far[3:21, 3:21, 3:21] = False  # 15 degrees of rotation, 10 % of size, 1.2 voxels and one of interpolation
    assert torch.count_nonzero(views[..., far]) == 0


def test_drawn_movements_are_uniform_within_their_bounds():
    """Where a single bright voxel's centre of mass goes under translation alone."""
    batch = torch.zeros(300, 1, 21, 23, 25)
    batch[:, :, 10, 11, 12] = 1.0
    views = make_views(batch, range(300), 0, 0, ViewSettings(count=1, translate=0.2))[:, 0, 0]
    for axis, middle in enumerate((10, 11, 12)):
        profile = views.sum([other + 1 for other in range(3) if other != axis])
        moved = (profile * torch.arange(views.shape[1 + axis])).sum(1) / profile.sum(1) - middle
        assert scipy.stats.kstest(moved.numpy() / (0.2 * 21), "uniform", (-1, 2)).pvalue > 1e-3


@pytest.mark.parametrize("setting", ["scale", "shift", "contrast", "gamma"])
def test_intensities_leave_exact_zeros_and_only_them(setting):
    batch = brains(4) + 5 * (brains(4) != 0)
    views = make_views(batch, range(4), 0, 0, ViewSettings(**{setting: 0.3}))
    assert torch.equal(views == 0, (batch == 0)[:, None].expand_as(views))


def test_intensities_are_what_the_formulas_say():
    image = brain()
    inside = image[0].numpy()[image[0].numpy() != 0].astype(float)
    cases = {
        "scale": (inside * 1.2, {"scale": 1.2}),
        "shift": (inside + 0.4, {"shift": 0.4}),
        "contrast": (inside.mean() + 0.7 * (inside - inside.mean()), {"contrast": 0.7}),
        "gamma": (
            inside.min() + np.ptp(inside) * ((inside - inside.min()) / np.ptp(inside)) ** 1.4, {"gamma": 1.4},
        ),
        "all but gamma": (
            1.2 * (inside.mean() + 0.7 * (inside - inside.mean())) + 0.4,
            {"scale": 1.2, "shift": 0.4, "contrast": 0.7},
        ),
    }  # fmt: skip
    for expected, changes in cases.values():
        result = recolour(image, **changes)
        np.testing.assert_allclose(result[0].numpy()[image[0].numpy() != 0], expected, atol=1e-5)
        assert not result[0].numpy()[image[0].numpy() == 0].any()


def test_intensities_are_monais_where_there_is_no_background():
    image = torch.rand(1, *GRID) + 0.5
    torch.testing.assert_close(
        recolour(image, gamma=1.7), torch.as_tensor(AdjustContrast(1.7)(image)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        recolour(image, scale=1.1), torch.as_tensor(ScaleIntensity(None, None, 0.1)(image))
    )
    torch.testing.assert_close(recolour(image, shift=0.2), torch.as_tensor(ShiftIntensity(0.2)(image)))


@pytest.mark.parametrize("image", [torch.zeros(1, *GRID), torch.full((1, *GRID), 3.0)])
def test_intensities_of_empty_and_constant_volumes_stay_finite(image):
    assert torch.isfinite(recolour(image, scale=0.9, shift=0.1, contrast=1.3, gamma=0.5)).all()


def test_a_crop_in_voxels_is_padded_to_the_grid_asked_for():
    batch = volumes(4)
    views = make_views(batch, range(4), 0, 0, ViewSettings(crop_size=(9, 40, 6), pad_to=(12, 18, 11)))
    assert views.shape == (4, 2, 1, 12, 18, 11)
    inner = views[..., 1:10, 1:16, 2:8]  # odd remainders on the far side
    assert torch.count_nonzero(views) == torch.count_nonzero(inner) == inner.numel()
    fraction = make_views(batch, range(4), 0, 0, ViewSettings(crop=0.8))
    voxels = make_views(batch, range(4), 0, 0, ViewSettings(crop_size=(10, 12, 8)))
    assert torch.equal(fraction, voxels)


def test_a_centre_crop_is_the_middle_in_every_view():
    batch = volumes(2)
    views = make_views(batch, range(2), 0, 0, ViewSettings(crop_size=7, crop_place="centre"))
    expected = torch.zeros_like(batch)
    expected[:, :, 2:9, 4:11, 1:8] = batch[:, :, 2:9, 4:11, 1:8]
    assert torch.equal(views[:, 0], expected)
    assert torch.equal(views[:, 1], expected)


def test_padding_to_less_than_is_kept_is_refused():
    with pytest.raises(UserError, match=r"views\.pad_to=8 is smaller than the 10 x 12 x 8 voxels"):
        make_views(volumes(1), [0], 0, 0, ViewSettings(crop=0.8, pad_to=8))


def test_noise_can_be_kept_inside_the_brain():
    views = make_views(brains(3), range(3), 0, 0, ViewSettings(noise=0.1, noise_in="brain"))
    everywhere = make_views(brains(3), range(3), 0, 0, ViewSettings(noise=0.1))
    inside = (brains(3) != 0)[:, None].expand_as(views)
    assert torch.equal(views[inside], everywhere[inside])
    assert not views[~inside].any()
    assert everywhere[~inside].all()


def test_half_precision_stays_half_precision():
    views = make_views(brains(2).half(), range(2), 0, 0, EVERYTHING)
    assert views.dtype == torch.float16
    without_noise = EVERYTHING.model_copy(update={"noise": 0.0})  # its numbers depend on the type
    difference = make_views(brains(2).half(), range(2), 0, 0, without_noise).float() - make_views(
        brains(2), range(2), 0, 0, without_noise
    )
    assert difference.abs().max() < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_views_without_noise_are_the_same_on_a_gpu_to_rounding():
    settings = EVERYTHING.model_copy(update={"noise": 0.0})
    on_cpu = make_views(brains(9), range(9), 1, 2, settings)
    on_gpu = make_views(brains(9).cuda(), range(9), 1, 2, settings)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    alone = make_views(brains(9)[[4]].cuda(), [4], 1, 2, settings)
    assert torch.equal(alone[0], on_gpu[4])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 0.9, "crop_size": 8}, "exclude each other"),
        ({"crop_place": "centre"}, "acts only with crop"),
        ({"crop_size": 0}, "crop_size"),
        ({"pad_to": "x"}, "pad_to"),
        ({"zoom": 1.0}, "zoom"),
    ],
)
def test_settings_that_cannot_act_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ViewSettings(**wrong)
    with pytest.raises(UserError, match=message):
        resolve({"views": wrong})


def test_a_side_that_is_no_number_is_named_by_its_setting():
    with pytest.raises(UserError, match=r"setting 'views\.crop_size': input should be greater"):
        resolve({"views": {"crop_size": 0}})


FLIPS = {"flip": 0.5, "flip_front_back": 0.5, "flip_up_down": 0.5}
MOVES = {**FLIPS, "crop_size": 6, "pad_to": 8, "quarter_turns": "left_right"}


@pytest.mark.parametrize(
    "chosen", [{}, MOVES, MOVES | {"crop_on_class": 1.0}, {"crop": 0.5, "crop_place": "centre"}]
)
def test_maps_are_moved_exactly_as_volumes_are(chosen):
    """The volume has the class of every voxel as its intensity; noise and intensities come on top for one channel."""
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (3, 2, 8, 8, 8)).astype(np.int16))
    seen = make_views_with_maps(maps.float(), maps, range(3), 2, 1, ViewSettings(count=3, **chosen))
    assert torch.equal(seen.volumes, seen.maps.float())
    assert seen.maps.dtype == torch.int16
    noisy = ViewSettings(count=3, noise=0.1, scale=0.5, cutout=1.0, **chosen)
    assert torch.equal(make_views_with_maps(maps.float(), maps, range(3), 2, 1, noisy).maps, seen.maps)
    alone = make_views(maps.float(), range(3), 2, 1, ViewSettings(count=3, **chosen))
    if "crop_on_class" not in chosen:
        assert torch.equal(alone, seen.volumes)


def test_a_moved_map_has_the_class_of_the_nearest_voxel():
    """In the middle of a block of one class the interpolated intensity is the class itself."""
    maps = torch.from_numpy(np.random.default_rng(0).integers(1, 5, (4, 1, 4, 4, 4)).astype(np.int16))
    maps = maps.repeat_interleave(6, 2).repeat_interleave(6, 3).repeat_interleave(6, 4)
    chosen = ViewSettings(count=2, rotate=20, zoom=0.2, translate=0.1)
    seen = make_views_with_maps(maps.float(), maps, range(4), 1, 0, chosen)
    whole = (seen.volumes - seen.volumes.round()).abs() < 1e-4
    pure = whole & (seen.volumes > 0.5)
    # Between two classes an interpolated value may be whole by chance, and is then in no neighbour.
    alike = (seen.volumes.round() == seen.maps)[pure].float().mean()
    assert pure.float().mean() > 0.2
    assert alike > 0.995
    assert set(seen.maps.unique().tolist()) <= set(range(5))
    assert not torch.equal(seen.maps[:, 0], seen.maps[:, 1])


def test_crops_on_a_class_hold_a_voxel_of_it():
    maps = torch.zeros(20, 1, 16, 16, 16, dtype=torch.int16)
    maps[:, :, 13, 2, 8] = 3
    volumes = torch.rand(20, 1, 16, 16, 16)
    for share, expected in ((1.0, (1.0, 1.0)), (0.0, (0.0, 0.1)), (0.5, (0.3, 0.7))):
        chosen = ViewSettings(count=4, crop_size=4, pad_to=4, crop_on_class=share)
        seen = make_views_with_maps(volumes, maps, range(20), 1, 0, chosen)
        held = (seen.maps == 3).flatten(2).any(2).float().mean().item()
        assert expected[0] <= held <= expected[1]
    # A scan without any class is cropped anywhere.
    nothing = make_views_with_maps(volumes, maps * 0, range(20), 1, 0, chosen)
    assert nothing.volumes.shape == (20, 4, 1, 4, 4, 4)
