"""Constrained contrast against loops, and at its corners."""

from __future__ import annotations

import pytest
import torch
from reference_dense import constrained_contrast, kinship_of

from core.errors import UserError
from core.losses import build
from core.losses.dense import draw_anchors, majority_vote


def images(shape=(5, 6), subjects=2, seed=0):
    """Features (B, D, …) in float64, cluster ids in 0 … 2 and an anchor list (B, A)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(subjects, 4, *shape, dtype=torch.float64, generator=generator).requires_grad_()
    clusters = torch.randint(0, 3, (subjects, *shape), generator=generator)
    anchors = torch.stack(
        [torch.randperm(clusters[0].numel(), generator=generator)[:4] for _ in range(subjects)]
    )
    return features, clusters, anchors


@pytest.mark.parametrize("form", ["pairwise", "setwise"])
@pytest.mark.parametrize("reference", [None, "ccl"])
@pytest.mark.parametrize("nearest", [2, 8, 29])
def test_constrained_contrast_follows_its_formula(form, reference, nearest):
    features, clusters, anchors = images()
    neighbours = {"start": nearest, "end": nearest, "shape": "linear"}
    loss = build(
        "constrained_contrast", form=form, reference=reference, temperature=0.2, neighbours=neighbours
    )
    value = loss(features, clusters, torch.ones_like(clusters).bool(), 0.5, anchors)
    expected = constrained_contrast(
        features, clusters, anchors.tolist(), 0.2, nearest, form, published=reference == "ccl"
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    gradient, right = (torch.autograd.grad(each, features)[0] for each in (value, expected))
    torch.testing.assert_close(gradient, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["pairwise", "setwise"])
@pytest.mark.parametrize("nearest", [8, 29])
def test_clusters_that_look_alike_attract_by_their_kernel(form, nearest):
    features, clusters, anchors = images()
    generator = torch.Generator().manual_seed(1)
    contrasts = (
        torch.randn(2, 3, 5, 6, generator=generator)
        + clusters[:, None] * torch.tensor([1.0, 0.0, -2.0])[:, None, None]
    )
    neighbours = {"start": nearest, "end": nearest, "shape": "linear"}
    given = {"form": form, "temperature": 0.2, "neighbours": neighbours}
    everywhere = torch.ones_like(clusters).bool()
    for bandwidth in (0.4, 1.5):
        loss = build("constrained_contrast", bandwidth=bandwidth, **given)
        value = loss(features, clusters, everywhere, 0.5, anchors, contrasts)
        kinship = [kinship_of(contrasts[image], clusters[image], bandwidth) for image in range(2)]
        expected = constrained_contrast(
            features, clusters, anchors.tolist(), 0.2, nearest, form, published=False, kinship=kinship
        )
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        gradient, right = (torch.autograd.grad(each, features)[0] for each in (value, expected))
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)
    # A kernel that is narrower than every distance is equality.
    narrow = build("constrained_contrast", bandwidth=1e-3, **given)
    same = build("constrained_contrast", **given)
    values = [loss(features, clusters, everywhere, 0.5, anchors, contrasts) for loss in (narrow, same)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
    gradient, right = (torch.autograd.grad(each, features)[0] for each in values)
    torch.testing.assert_close(gradient, right, rtol=1e-7, atol=1e-10)
    with pytest.raises(UserError, match="bandwidth needs the images"):
        narrow(features, clusters, everywhere, 0.5, anchors)


def test_nearest_patches_follow_a_schedule_and_volumes_work_like_images():
    features, clusters, anchors = images((3, 4, 4))
    loss = build("constrained_contrast", neighbours={"start": 1.0, "end": 0.25, "shape": "linear"})
    for progress, nearest in ((0.0, 48), (1.0, 12)):
        value = loss(features, clusters, clusters >= 0, progress, anchors)
        flat = features.flatten(2)[..., None]
        expected = constrained_contrast(flat, clusters, anchors.tolist(), 0.1, nearest, "pairwise", False)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        assert loss.diagnostics["neighbours"] == nearest


def test_published_is_zero_where_the_bank_is_no_larger_than_the_neighbourhood():
    features, clusters, anchors = images((10, 10))
    value = build("constrained_contrast", reference="ccl")(features, clusters, clusters >= 0, 0.5, anchors)
    assert value == 0


@pytest.mark.parametrize("form", ["pairwise", "setwise"])
@pytest.mark.parametrize("reference", [None, "ccl"])
def test_corners_are_finite_and_counted(form, reference):
    features, clusters, _ = images((12, 12))
    one, alone = torch.zeros_like(clusters), torch.arange(144).view(1, 12, 12).expand(2, -1, -1)
    foreground = torch.zeros_like(clusters).bool()
    foreground[0, 0, :3] = True
    for temperature in (1e-3, 0.1, 1e3):
        loss = build("constrained_contrast", form=form, reference=reference, temperature=temperature)
        for maps, mask in (
            (clusters, foreground),
            (one, foreground),
            (alone, foreground),
            (one, foreground & False),
        ):
            for values in (features, torch.ones_like(features).requires_grad_()):
                value = loss(values, maps, mask, 0.5)
                (gradient,) = torch.autograd.grad(value, values)
                assert torch.isfinite(value)
                assert torch.isfinite(gradient).all()
                expected_anchors = 3 if mask.any() and (reference or maps is not alone) else 0
                if maps is not clusters and values is features:  # ties may leave an anchor out of its nearest
                    assert loss.diagnostics["anchors_used"] == expected_anchors


def test_half_precision_is_computed_in_float32():
    features, clusters, anchors = images()
    half = features.detach().half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = build("constrained_contrast", temperature=0.01)(half, clusters, clusters >= 0, 0.5, anchors)
    exact = build("constrained_contrast", temperature=0.01)(
        half.float(), clusters, clusters >= 0, 0.5, anchors
    )
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item())


def test_anchors_come_from_the_foreground_without_repeats():
    foreground = torch.zeros(2, 30, dtype=torch.bool)
    foreground[0, [3, 7, 8]] = True
    foreground[1, 10:] = True
    drawn = draw_anchors(foreground, 5)
    assert sorted(drawn[0].tolist()) == [-1, -1, 3, 7, 8]
    assert len(set(drawn[1].tolist())) == 5
    assert drawn[1].min() >= 10


def test_majority_vote_and_its_ties():
    fine = torch.tensor([[[2, 2, 1, 0], [2, 0, 0, 1], [5, 5, 3, 3], [1, 1, 3, 3]]])
    assert majority_vote(fine, (2, 2), 6, fine.shape[1] // 2).tolist() == [[[2, 0], [1, 3]]]


def test_patches_are_averaged_and_maps_put_to_the_vote():
    features, _, _ = images((8, 8))
    generator = torch.Generator().manual_seed(1)
    clusters = torch.randint(0, 3, (2, 8, 8), generator=generator)
    anchors = torch.tensor([[0, 5], [15, 3]])
    value = build("constrained_contrast", patch=2)(features, clusters, clusters >= 0, 0.5, anchors)
    pooled = features.view(2, 4, 4, 2, 4, 2).mean((3, 5))
    voted = majority_vote(clusters, (4, 4), 3, clusters.shape[1] // 4)
    expected = build("constrained_contrast")(pooled, voted, voted >= 0, 0.5, anchors)
    assert value.item() == pytest.approx(expected.item())


def test_errors_say_which_tensor():
    features, clusters, _ = images()
    loss = build("constrained_contrast")
    with pytest.raises(UserError, match=r"features must be \(B, D, H, W\)"):
        loss(features[0], clusters, clusters, 0.5)
    with pytest.raises(UserError, match="clusters must have shape"):
        loss(features, clusters[:1], clusters, 0.5)
    with pytest.raises(UserError, match="finer by one whole factor"):
        loss(features, torch.zeros(2, 7, 7), clusters, 0.5)
    with pytest.raises(UserError, match="nearest patches are by cosine"):
        build("constrained_contrast", neighbours={"end": 5, "shape": "linear", "metric": "manhattan"})
