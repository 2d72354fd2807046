from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from core.errors import UserError
from core.losses.pretext import Anatomical
from core.volumes.views.slices import SliceViewSettings, partition_slices, slice_views

GRID = (6, 7, 11)
PUBLISHED = SliceViewSettings(
    original=True, window=100 / 160, corner=(10 / 160, 69 / 160), brightness=0.5, contrast=0.3
)


def volumes(count: int, channels: int = 2) -> torch.Tensor:
    return torch.arange(1.0, 1 + count * channels * int(np.prod(GRID))).reshape(count, channels, *GRID)


@pytest.mark.parametrize(
    ("along", "axis", "shape"),
    [("left_right", 0, (7, 11)), ("front_back", 1, (6, 11)), ("up_down", 2, (6, 7))],
)
def test_slices_are_those_of_their_index(along, axis, shape):
    batch = volumes(3)
    slices, partition, index = partition_slices(batch, [4, 8, 2], 1, 0, 3, along=along)
    assert slices.shape == (3, 3, 2, *shape)
    assert torch.equal(partition, torch.tensor([[0, 1, 2]] * 3))
    for row in range(3):
        for part in range(3):
            assert torch.equal(slices[row, part], batch[row].select(1 + axis, int(index[row, part])))


def test_each_partition_gives_each_of_its_slices_equally_often():
    batch = volumes(1, 1).expand(1200, -1, -1, -1, -1)
    index = partition_slices(batch, range(1200), 0, 0, 3).index_bp
    for part, run in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10])):  # 11 slices: longer runs first
        values, counts = index[:, part].unique(return_counts=True)
        assert values.tolist() == run
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_the_axis_is_found_in_the_affine():
    psr = np.array([[0, 0, 2.0, 0], [-2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    batch = volumes(2)
    slices, _, index = partition_slices(batch, [0, 1], 0, 0, 2, affine=psr)
    assert torch.equal(slices[1, 1], batch[1].select(2, int(index[1, 1])))


def test_slices_and_views_do_not_depend_on_the_batch():
    batch = volumes(4)
    together = partition_slices(batch, [7, 3, 11, 5], 2, 1, 4)
    some = partition_slices(batch[[2, 0]], [11, 7], 2, 1, 4)
    assert torch.equal(some.slices_bpchw, together.slices_bpchw[[2, 0]])
    views = slice_views(together.slices_bpchw, [7, 3, 11, 5], 2, 1, PUBLISHED)
    assert torch.equal(slice_views(some.slices_bpchw, [11, 7], 2, 1, PUBLISHED), views[[2, 0]])


@pytest.mark.parametrize("parts", [0, 12])
def test_more_partitions_than_slices_are_refused(parts):
    with pytest.raises(UserError, match="cannot be made of 11 slices"):
        partition_slices(volumes(1), [0], 0, 0, parts)


def test_a_window_is_a_block_stretched_to_the_full_size():
    slices = torch.rand(1, 1, 1, 32, 32)
    settings = SliceViewSettings(count=4, window=0.5)
    views = slice_views(slices, [3], 0, 0, settings)[0, 0]
    for view in views:
        candidates = [
            F.interpolate(slices[0, 0, None, :, x : x + 16, y : y + 16], (32, 32), mode="bilinear")[0]
            for x in range(17)
            for y in range(17)
        ]
        assert sum(torch.allclose(view, candidate) for candidate in candidates) == 1


def test_published_windows_begin_from_10_to_69_of_160_and_end_with_the_slice():
    side = torch.arange(160.0)
    slices = (1 + side[:, None] + 200 * side).expand(1, 1, 1, 160, 160)
    settings = SliceViewSettings(count=16, window=100 / 160, corner=(10 / 160, 69 / 160))
    first = []
    for epoch in range(60):
        for view in slice_views(slices, [0], epoch, 0, settings)[0, 0, :, 0].double():
            low, high = view[0, 0] - 1, view[-1, -1] - 1
            start, end = int(low % 200), int(high % 200)
            assert end == min(start + 100, 160) - 1
            first.append(start)
    values, counts = np.unique(first, return_counts=True)
    assert values.tolist() == list(range(10, 70))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_brightness_and_contrast_are_drawn_for_each_view_and_leave_zeros():
    slices = 5 + torch.rand(3, 2, 1, 16, 16)
    slices[..., :8] = 0
    views = slice_views(slices, range(3), 0, 0, SliceViewSettings(brightness=0.5, contrast=0.3))
    assert not views[..., :8].any()
    mean, spread = views[..., 8:].mean((3, 4, 5)), views[..., 8:].std((3, 4, 5))
    brightness = mean - slices[..., 8:].mean((2, 3, 4))[..., None]
    contrast = spread / slices[..., 8:].std((2, 3, 4))[..., None]
    assert len(brightness.flatten().mul(1e4).round().unique()) == 12
    assert 0.1 < brightness.abs().max() <= 0.5
    assert 0.05 < (contrast - 1).abs().max() <= 0.3


def test_the_slice_itself_comes_first_if_asked_for():
    slices = torch.rand(2, 3, 1, 16, 16)
    views = slice_views(slices, [0, 1], 0, 0, PUBLISHED)
    assert views.shape == (2, 3, 3, 1, 16, 16)
    assert torch.equal(views[:, :, 0], slices)
    unchanged = slice_views(slices, [0, 1], 0, 0, SliceViewSettings())
    assert torch.equal(unchanged, slices[:, :, None].expand(-1, -1, 2, -1, -1, -1))


def test_the_anatomical_loss_takes_views_and_partitions_as_they_come():
    sampled = partition_slices(volumes(3), range(3), 0, 0, 3)
    views = slice_views(sampled.slices_bpchw, range(3), 0, 0, PUBLISHED)
    embeddings = views.flatten(0, 1).flatten(2)[..., :8].requires_grad_()
    loss = Anatomical().build()(embeddings, sampled.partition_bp.flatten(), 0.5)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corner": (0.1, 0.2)}, "corner acts only with window, got none"),
        (
            {"window": 0.5, "corner": (0.4, 0.2)},
            r"fractions in \[0, 1\) in ascending order, got \(0.4, 0.2\)",
        ),
        ({"window": 0}, "window\n  Input should be greater than 0 "),
        ({"contrast": 1}, "contrast\n  Input should be less than 1 "),
    ],
)
def test_settings_that_cannot_act_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        SliceViewSettings(**wrong)
