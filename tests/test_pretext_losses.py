"""Anatomical, symmetry, rotation and inpainting losses against their formulas, and at their corners."""

from __future__ import annotations

import math

import pytest
import torch
from reference_dense import anatomical, symmetry

from core.errors import UserError
from core.losses import build

FORMS = ("cosine_nce", "siamese", "group", "margin")


def embeddings_of(subjects: int, views: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(subjects, views, 6, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("views", [2, 3])
def test_anatomical_follows_its_formula(views):
    embeddings, partitions = embeddings_of(6, views), [0, 1, 2, 0, 1, 2]
    value = build("anatomical", temperature=0.3)(embeddings, torch.tensor(partitions), 0.5)
    expected = anatomical(embeddings, partitions, 0.3)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    gradient, right = (torch.autograd.grad(each, embeddings)[0] for each in (value, expected))
    torch.testing.assert_close(gradient, right, rtol=1e-8, atol=1e-10)


def test_anatomical_with_every_slice_its_own_partition_has_simclr_negatives():
    """For two views, NT-Xent counts each positive once in its denominator, and so does anatomical."""
    embeddings = embeddings_of(5, 2)
    left = build("anatomical", temperature=0.2)(embeddings, torch.arange(5), 0.0)
    right = build("simclr", temperature=0.2)(embeddings, None, 0.0)
    assert left.item() == pytest.approx(right.item(), rel=1e-9)


def test_anatomical_corners():
    loss = build("anatomical", temperature=1e-3)
    for views, partitions in ((3, [1, 1, 1, 1]), (1, [0, 1, 2, 0]), (2, [0, 1, 1, 1])):
        embeddings = embeddings_of(4, views)
        value = loss(embeddings, torch.tensor(partitions), 0.5)
        (gradient,) = torch.autograd.grad(value, embeddings)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        used = 0 if views == 1 or len(set(partitions)) == 1 else 4 * views
        assert loss.diagnostics["anchors_used"] == used


@pytest.mark.parametrize("form", FORMS)
def test_symmetry_follows_its_formula(form):
    embeddings, healthy = embeddings_of(5, 2), [1, 0, 1, 1, 0]
    extra = {"temperature": 0.2} if form == "group" else {"margin": 4.0} if form == "margin" else {}
    loss = build("symmetry", form=form, **extra)
    value = loss(embeddings, torch.tensor(healthy), 0.5)
    assert value.item() == pytest.approx(symmetry(embeddings, healthy, form, 0.2, 4.0), rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor(healthy), 0.5), embeddings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("healthy", [[1, 1], [0, 0], []])
def test_symmetry_corners(form, healthy):
    for embeddings in (embeddings_of(2, 2), torch.ones(2, 2, 6, dtype=torch.float64, requires_grad=True)):
        part = embeddings[: len(healthy)]
        value = build("symmetry", form=form)(part, torch.tensor(healthy), 0.5)
        (gradient,) = torch.autograd.grad(value, embeddings)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        if form == "group" or not healthy:
            assert value.item() == pytest.approx(0.0, abs=1e-12)


def test_symmetry_settings_that_cannot_act_are_errors():
    for settings, message in (
        ({"margin": 1.0}, "margin acts only with form 'margin', got form 'cosine_nce'"),
        ({"form": "siamese", "temperature": 0.1}, "temperature acts only with form 'group'"),
    ):
        with pytest.raises(UserError, match=message):
            build("symmetry", **settings)
    with pytest.raises(UserError, match="symmetry compares two sides"):
        build("symmetry")(embeddings_of(3, 3), torch.ones(3), 0.5)


def test_rotation_and_inpainting_by_hand():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    assert build("rotation")(logits, torch.tensor([[2, 0]]), 0.5).item() == pytest.approx(math.log(4) / 2)
    restored = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert build("inpainting")(restored, torch.zeros(2, 2), 0.5).item() == 2.5
    with pytest.raises(UserError, match=r"logits must be \(B, V, 4\)"):
        build("rotation")(logits, torch.tensor([2, 0]), 0.5)
    with pytest.raises(UserError, match="must have one shape"):
        build("inpainting")(restored, torch.zeros(2), 0.5)
