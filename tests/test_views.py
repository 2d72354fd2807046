from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.volumes.views import ViewSettings, make_views

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
