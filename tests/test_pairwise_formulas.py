"""The engine against nested loops: values and gradients, formulas and published variants, in float64."""

from __future__ import annotations

import pytest
import torch
from reference_pairwise import kernel, reference_loss

from core.losses import build

KERNELS = ("equal", "rbf", "cauchy", "laplace", "epanechnikov")
KERNELLED = ("y_aware", "threshold", "exponential")
METRICS = ("cosine", "euclidean", "manhattan", "chebyshev")


def batch(subjects: int, views: int, seed: int = 0, embedding: int = 5):
    """Random embeddings (B, V, D) in float64 and ages in years, two of them equal."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(subjects, views, embedding, dtype=torch.float64, generator=generator)
    labels = torch.randint(20, 30, (subjects,), generator=generator).double() + 0.5
    labels[-1] = labels[0]
    return embeddings.requires_grad_(), labels


def assert_same(loss, expected, embeddings, tolerance=1e-9):
    """Equal values, and gradients equal in every entry relative to the largest."""
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradient, right = (
        torch.autograd.grad(value, embeddings, retain_graph=True)[0] for value in (loss, expected)
    )
    torch.testing.assert_close(gradient, right, rtol=0, atol=tolerance * max(right.abs().max().item(), 1e-12))


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("kernel_name", KERNELS)
@pytest.mark.parametrize("name", KERNELLED)
def test_kernel_losses_follow_their_formula(name, kernel_name, views):
    embeddings, labels = batch(6, views)
    width = {} if kernel_name == "equal" else {"width": 3.0}
    for normalise in ("anchor", "total"):
        loss = build(name, kernel=kernel_name, temperature=0.2, normalise=normalise, **width)
        expected = reference_loss(name, embeddings, labels.tolist(), 0.2, kernel_name, 3.0, normalise)
        assert_same(loss(embeddings, labels, 0.5), expected, embeddings)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_simclr_and_rank_n_contrast_follow_their_formulas(views):
    embeddings, labels = batch(6, views)
    expected = reference_loss("supcon", embeddings, labels.tolist(), 0.3)
    assert_same(build("supcon", temperature=0.3)(embeddings, labels, 0.0), expected, embeddings)
    expected = reference_loss("rank_n_contrast", embeddings, labels.tolist(), 2.0)
    for settings in ({}, {"reference": "rnc"}):
        assert_same(build("rank_n_contrast", **settings)(embeddings, labels, 0.0), expected, embeddings)
    if views > 1:
        expected = reference_loss("supcon", embeddings, None, 0.3)
        for name in ("simclr", "supcon"):
            assert_same(build(name, temperature=0.3)(embeddings, None, 0.0), expected, embeddings)
        assert_same(build("simclr", temperature=0.3)(embeddings, labels, 0.0), expected, embeddings)


@pytest.mark.parametrize("name", ["supcon", *KERNELLED, "rank_n_contrast"])
@pytest.mark.parametrize("metric", METRICS)
def test_any_loss_can_be_confined_to_neighbours(name, metric):
    embeddings, labels = batch(7, 2, seed=3)
    neighbours = {"start": 7, "end": 3, "shape": "linear", "metric": metric}
    kernel_name, settings = ("rbf", {"kernel": "rbf", "width": 3.0}) if name in KERNELLED else ("equal", {})
    loss = build(name, temperature=0.5, neighbours=neighbours, **settings)
    for progress, subjects in ((0.25, 6), (1.0, 3)):
        expected = reference_loss(
            name, embeddings, labels.tolist(), 0.5, kernel_name, 3.0, others=2 * subjects - 1, metric=metric
        )
        assert_same(loss(embeddings, labels, progress), expected, embeddings)
        assert loss.diagnostics["neighbours"] == 2 * subjects - 1


@pytest.mark.parametrize("reference", ["dynlocrep", "barbano"])
@pytest.mark.parametrize("kernel_name", ["rbf", "gaussian", "cauchy"])
@pytest.mark.parametrize("name", KERNELLED)
def test_published_variants(name, kernel_name, reference):
    normalise = {"dynlocrep": "total", "barbano": "anchor"}[reference]
    for views, width in ((1, 2.0), (2, 0.3)):
        embeddings, labels = batch(6, views, seed=1)
        loss = build(name, kernel=kernel_name, width=width, temperature=0.1, reference=reference)
        expected = reference_loss(
            name, embeddings, labels.tolist(), 0.1, kernel_name, width, normalise, published=True
        )
        assert_same(loss(embeddings, labels, 0.5), expected, embeddings)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kernel_name", ["rbf", "gaussian", "cauchy"])
def test_published_dynamic_loss_over_its_staircase(kernel_name, metric):
    embeddings, labels = batch(8, 2, seed=2)
    neighbours = {"start": None, "end": 3, "shape": "staircase", "step": 5, "epochs": 50, "metric": metric}
    loss = build(
        "exponential",
        kernel=kernel_name,
        temperature=0.1,
        reference="dynlocrep",
        neighbours=neighbours | {"min_batch": 1},
    )
    for epoch in (1, 12, 33, 50):
        subjects = max(int(8 - (8 - 3) / 9 * (epoch // 5)), 3)
        expected = reference_loss(
            "exponential", embeddings, labels.tolist(), 0.1, kernel_name, 2.0, "total",
            others=2 * subjects - 1, metric=metric, published=True,
        )  # fmt: skip
        assert_same(loss(embeddings, labels, epoch / 50), expected, embeddings)


def test_published_neighbourhood_needs_32_subjects():
    neighbours = {"end": 3, "shape": "linear"}
    for subjects, acts in ((31, False), (32, True)):
        embeddings, labels = batch(subjects, 1)
        loss = build("exponential", reference="dynlocrep", neighbours=neighbours)
        plain = build("exponential", reference="dynlocrep")
        differ = loss(embeddings, labels, 1.0).item() != pytest.approx(plain(embeddings, labels, 1.0).item())
        assert differ == acts


def test_published_exponential_is_the_formula_with_offset_times_temperature_over_007():
    embeddings, labels = batch(6, 2)
    offset = build("exponential", logit_offset="self", temperature=0.1)(embeddings, labels, 0.0)
    published = build("exponential", reference="barbano", temperature=0.1)(embeddings, labels, 0.0)
    assert published.item() == pytest.approx(offset.item() * 0.1 / 0.07)
    plain = build("exponential", temperature=0.1)(embeddings, labels, 0.0)
    assert offset.item() != pytest.approx(plain.item(), rel=0.05)


def test_supcon_bins_ages():
    embeddings, _ = batch(5, 1)
    ages = torch.tensor([20.1, 21.9, 22.0, 23.5, 30.0])
    binned = build("supcon", bin_width=2.0)(embeddings, ages, 0.0)
    expected = build("supcon")(embeddings, torch.tensor([0, 0, 1, 1, 2]), 0.0)
    assert binned.item() == pytest.approx(expected.item())


def test_kernels_by_hand():
    assert kernel("rbf", 2.0, 2.0) == pytest.approx(0.6065, abs=1e-4)
    assert kernel("cauchy", 2.0, 2.0) == 0.5
    assert kernel("epanechnikov", 1.0, 2.0) == 0.75


def test_a_loss_of_two_subjects_by_hand():
    """SimCLR of orthogonal subjects with identical views at T = 1: log(e + 2) − 1 for every anchor."""
    embeddings = torch.eye(2)[:, None].repeat(1, 2, 1)
    expected = torch.log(torch.exp(torch.tensor(1.0)) + 2) - 1
    assert build("simclr", temperature=1.0)(embeddings, None, 0.0).item() == pytest.approx(expected.item())
