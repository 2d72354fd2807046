"""What numbers in a map mean: plain classes, unions, and regions that overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.evaluation.label_sets import REGIONS, LabelSets
from core.losses.segmentation import IGNORED, CrossEntropy, Dice, Focal, Tversky
from core.tasks.segmentation import LossOfClasses, places_in, target_map

MOST = 32767


def sets_of(*classes: str) -> LabelSets:
    return LabelSets.parse(classes, MOST)


def test_brats_regions_are_unions_and_their_map_has_the_published_numbers():
    """NCR 1, ED 2, ET 4: tumour core 1 + 4, whole tumour 1 + 2 + 4 (Menze et al. 2015)."""
    regions = sets_of(*REGIONS["brats2021"])
    assert regions.overlap
    assert regions.numbers == {"tc": 1, "wt": 2, "et": 4}
    truth = np.array([0, 1, 2, 4, 4, 2])
    masks = regions.masks(truth)
    assert masks[0].tolist() == [False, True, False, True, True, False]
    assert masks[1].tolist() == [False, True, True, True, True, True]
    assert masks[2].tolist() == [False, False, False, True, True, False]
    certain = np.concatenate([(truth == 0)[None], masks]).astype(float)
    assert regions.paint(certain[:, None, None]).ravel().tolist() == truth.tolist()
    assert sets_of(*REGIONS["brats2023"]).numbers == {"tc": 1, "wt": 2, "et": 3}


def test_a_region_is_painted_over_the_larger_ones_where_it_is_likely_enough():
    regions = sets_of("whole=1+2", "core=2")
    probabilities = np.array([[0.4, 0.1, 0.45, 0.6], [0.6, 0.9, 0.55, 0.4], [0.2, 0.8, 0.5, 0.49]])
    assert regions.paint(probabilities[:, None, None]).ravel().tolist() == [1, 2, 2, 0]


def test_plain_classes_are_the_likeliest_and_may_join_numbers():
    classes = sets_of("csf=1", "brain=2+3")
    assert not classes.overlap
    assert classes.numbers == {"csf": 1, "brain": 2}
    probabilities = np.array([[0.5, 0.1, 0.2], [0.3, 0.5, 0.2], [0.2, 0.4, 0.6]])
    assert classes.paint(probabilities[:, None, None]).ravel().tolist() == [0, 1, 2]
    assert classes.masks(np.array([3, 2, 1, 0]))[1].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("a=1", "a=2"), "a name and numbers of its own"),
        (("a=1", "b=1"), "a name and numbers of its own"),
        (("a=0",), "a name and numbers of its own"),
        (("a=40000",), "a name and numbers of its own"),
        (("a=1+2", "b=2+3"), "a map cannot tell them"),
        (("a=1+2+3", "b=3"), "a map cannot tell them"),
    ],
)
def test_classes_that_cannot_be_told_are_refused(classes, words):
    with pytest.raises(UserError, match=words):
        sets_of(*classes)


def test_targets_of_regions_are_each_by_itself_and_unknown_is_unknown_in_all():
    regions = sets_of(*REGIONS["brats2021"])
    given = torch.tensor([[[[0, 1, 2, 4, -1, 7]]]], dtype=torch.int16)
    kept = target_map(given, regions)
    assert kept.flatten().tolist() == [0, 1, 2, 4, -1, 0]
    target = LossOfClasses(torch.nn.Identity(), regions).target(kept)
    assert target.shape == (1, 3, 1, 1, 6)
    assert target[0, :, 0, 0].tolist() == [[0, 1, 0, 1, -1, 0], [0, 1, 1, 1, -1, 0], [0, 0, 0, 1, -1, 0]]
    assert places_in(given, regions).flatten().tolist() == [0, 1, 2, 3, -1, 0]
    plain = LossOfClasses(torch.nn.Identity(), sets_of("a=4", "b=1"))
    places = target_map(given, plain.classes)
    assert places.flatten().tolist() == [0, 2, 0, 1, -1, 0]
    assert torch.equal(plain.target(places), places.long())


def slow_regions(scores, target, kind):
    """From the formulas, voxel by voxel."""
    p = 1 / (1 + np.exp(-scores))
    known = target != IGNORED
    if kind == "cross_entropy":
        cost = -np.where(target == 1, np.log(p), np.log(1 - p))
        return cost[known].mean()
    if kind == "focal":
        right = np.where(target == 1, p, 1 - p)
        return (-((1 - right) ** 2) * np.log(right))[known].mean()
    ratios = []
    for n, k in np.ndindex(target.shape[:2]):
        chosen = known[n, k]
        q, t = p[n, k][chosen], target[n, k][chosen]
        both = (q * t).sum()
        if kind == "dice":
            ratios.append((2 * both + 1e-5) / (q.sum() + t.sum() + 1e-5))
        else:
            ratios.append(
                (both + 1e-5) / (both + 0.3 * (q * (1 - t)).sum() + 0.7 * ((1 - q) * t).sum() + 1e-5)
            )
    return 1 - np.mean(ratios)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (CrossEntropy(), "cross_entropy"),
        (Dice(), "dice"),
        (Tversky(alpha=0.3), "tversky"),
        (Focal(), "focal"),
    ],
)
def test_losses_of_regions_are_their_formulas(settings, kind):
    draws = np.random.default_rng(0)
    scores = draws.normal(size=(2, 3, 4, 3, 2))
    target = draws.integers(0, 2, scores.shape)
    target[:, :, 0, 0] = IGNORED
    loss = settings.build()
    given = torch.from_numpy(scores).requires_grad_()
    found = loss(given, torch.from_numpy(target), 0.5)
    assert found.item() == pytest.approx(slow_regions(scores, target, kind), rel=1e-4)
    found.backward()
    unknown = torch.from_numpy(target == IGNORED)
    assert given.grad[unknown].abs().max() == 0
    assert given.grad[~unknown].abs().max() > 0


def test_weights_of_regions_count_regions():
    scores, target = torch.zeros(1, 2, 1, 1, 2), torch.ones(1, 2, 1, 1, 2)
    loss = CrossEntropy(class_weights=(1.0, 3.0)).build()
    assert loss(scores, target, 0.5).item() == pytest.approx(np.log(2), rel=1e-6)
    scores[:, 1] = 5.0
    expected = (np.log(2) + 3 * np.log1p(np.exp(-5.0))) / 4
    assert loss(scores, target, 0.5).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="2 weights for 3 classes"):
        loss(torch.zeros(1, 3, 1, 1, 2), torch.ones(1, 3, 1, 1, 2), 0.5)
