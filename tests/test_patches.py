from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from reference_views import covered_share

from core.errors import UserError
from core.volumes.views.patches import PatchSettings, block_mask, corrupt, drop_patches, swap_patches

GRID = (20, 24, 16)
PUBLISHED = PatchSettings()


def brains(count: int, channels: int = 2) -> torch.Tensor:
    """Values around 100 times the row, with a background of zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, channels, *GRID, generator=generator)
    values += 100 * torch.arange(1, count + 1)[:, None, None, None, None]
    values[..., :4] = 0
    return values


def test_what_is_covered_is_distributed_as_in_a_simulation():
    ours = [block_mask(GRID, 0.3, np.random.default_rng((0, draw)), PUBLISHED).mean() for draw in range(1500)]
    simulated = [covered_share(np.random.default_rng((1, draw)), GRID, 0.3) for draw in range(300)]
    assert scipy.stats.ks_2samp(ours, simulated).pvalue > 1e-3
    # uniform but for the last block, which goes at most 1/64 beyond
    assert scipy.stats.kstest(ours, "uniform", (0.002, 0.3)).pvalue > 1e-3
    assert max(ours) < 0.3 + 1 / 64


def test_counting_overlaps_as_published_covers_less():
    published = PatchSettings(overlaps="published")
    pairs = [
        [
            block_mask(GRID, 0.3, np.random.default_rng(draw), chosen).sum()
            for chosen in (PUBLISHED, published)
        ]
        for draw in range(200)
    ]
    once, several = np.transpose(pairs)
    assert (several <= once).all()
    assert several.mean() < 0.95 * once.mean()


def test_blocks_have_the_sides_asked_for():
    settings = PatchSettings(smallest=0.2, largest=0.5)
    sides = set()
    for draw in range(200):
        mask = block_mask(GRID, 1e-6, np.random.default_rng(draw), settings)  # one block is always enough
        spans = [np.unique(axis) for axis in mask.nonzero()]
        assert mask.sum() == np.prod([len(span) for span in spans])
        sides.add(tuple(len(span) for span in spans))
    low, high = np.min(list(sides), axis=0), np.max(list(sides), axis=0)
    np.testing.assert_array_equal(low, [4, 5, 3])
    np.testing.assert_array_equal(high, [10, 12, 8])


def test_dropped_blocks_are_noise_like_the_volume_and_the_rest_is_untouched():
    batch = brains(6)
    dropped, where = drop_patches(batch, range(6), 0, 0, PatchSettings(drop=0.9))
    outside = ~where[:, None].expand_as(batch)
    assert torch.equal(dropped[outside], batch[outside])
    for row in range(6):
        noise = dropped[row][:, where[row]]
        n = noise.shape[1]
        inside = batch[row][batch[row] != 0]
        if n > 100:
            assert noise.mean().item() == pytest.approx(inside.mean().item(), abs=5 / n**0.5)
            assert noise.std().item() == pytest.approx(1, rel=5 / n**0.5)


def test_noise_as_published_lies_between_zero_and_one():
    dropped, where = drop_patches(brains(4), range(4), 0, 0, PatchSettings(noise="unit", drop=0.9))
    noise = dropped[where[:, None].expand_as(dropped)]
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.05)


def test_swapped_blocks_come_from_one_other_brain_of_the_batch():
    batch = brains(5)
    swapped, where = swap_patches(batch, [9, 4, 7, 1, 3], 0, 0, PatchSettings(swap=0.8))
    for row in range(5):
        donors = [
            other
            for other in range(5)
            if torch.equal(swapped[row][:, where[row]], batch[other][:, where[row]])
        ]
        assert where[row].any()
        assert len(donors) == 1
        assert donors[0] != row
        assert torch.equal(swapped[row][:, ~where[row]], batch[row][:, ~where[row]])


def test_every_other_brain_is_a_donor_equally_often():
    batch = (torch.arange(5.0) + 1)[:, None, None, None, None].expand(5, 1, 4, 4, 4)
    counts = torch.zeros(5, 5)
    settings = PatchSettings(swap=0.9)
    for epoch in range(150):
        swapped, where = swap_patches(batch, [2, 9, 4, 6, 1], epoch, 0, settings)
        for row in range(5):
            counts[row, int(swapped[row, 0][where[row]][0]) - 1] += 1
    assert not counts.diagonal().any()
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert scipy.stats.chisquare(others.reshape(5, 4), axis=1).pvalue.min() > 1e-3


def test_the_order_of_a_batch_does_not_change_who_gives_to_whom():
    batch, subjects = brains(5), [9, 4, 7, 1, 3]
    swapped, where = corrupt(batch[:, None], subjects, 2, 1, PUBLISHED)
    order = [3, 0, 4, 2, 1]
    again, again_where = corrupt(batch[order][:, None], [subjects[row] for row in order], 2, 1, PUBLISHED)
    assert torch.equal(again, swapped[order])
    assert torch.equal(again_where, where[order])


def test_places_do_not_depend_on_the_batch_and_switching_one_off_leaves_the_other():
    batch = brains(4)
    _, where = drop_patches(batch, [9, 4, 7, 1], 2, 1, PUBLISHED)
    alone, alone_where = drop_patches(batch[[2]], [7], 2, 1, PUBLISHED)
    assert torch.equal(alone_where[0], where[2])
    assert torch.equal(alone[0], drop_patches(batch, [9, 4, 7, 1], 2, 1, PUBLISHED)[0][2])
    _, both = corrupt(batch[:, None], range(4), 0, 0, PUBLISHED)
    _, only_drop = corrupt(batch[:, None], range(4), 0, 0, PatchSettings(swap=0))
    _, only_swap = corrupt(batch[:, None], range(4), 0, 0, PatchSettings(drop=0))
    assert torch.equal(both, only_drop | only_swap)
    assert not torch.equal(only_drop, only_swap)


def test_mirrors_are_left_alone_unless_asked_for():
    pairs = torch.stack([brains(4), brains(4).flip(2)], dim=1)
    published, where = corrupt(pairs, range(4), 0, 0, PUBLISHED)
    both, both_where = corrupt(pairs, range(4), 0, 0, PatchSettings(mirrors=True))
    assert torch.equal(published[:, 1], pairs[:, 1])
    assert not where[:, 1].any()
    assert torch.equal(both[:, 0], published[:, 0])
    assert torch.equal((both != pairs).any(2)[:, 1] & ~both_where[:, 1], torch.zeros_like(where[:, 1]))
    assert both_where[:, 1].any()
    assert not torch.equal(both_where[:, 1], both_where[:, 0])


def test_blocks_are_taken_from_brains_that_are_not_themselves_corrupted():
    batch = brains(3, 1)
    settings = PatchSettings(drop=0.9, swap=0.9, noise="unit")
    corrupted, _ = corrupt(batch[:, None], range(3), 0, 0, settings)
    _, foreign = swap_patches(batch, range(3), 0, 0, settings)
    values = corrupted[:, 0, 0][foreign]
    assert ((values == 0) | (values > 50)).all()  # noise lies in [0, 1]


def test_alone_there_is_nobody_to_take_from():
    with pytest.raises(UserError, match="batch of 1"):
        corrupt(brains(1)[:, None], [0], 0, 0, PUBLISHED)
    corrupt(brains(1)[:, None], [0], 0, 0, PatchSettings(swap=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drop": 1.0}, "drop\n  Input should be less than 1 "),
        ({"smallest": 0.3}, "smallest must not exceed largest, got 0.3 and 0.25"),
        ({"noise": "other"}, "noise\n  Input should be 'matched' or 'unit' "),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        PatchSettings(**wrong)
