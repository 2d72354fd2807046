"""Laws that the pairwise losses obey whatever the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.losses import LOSSES, build
from core.losses.neighbourhood import Neighbours

KERNELLED = ("y_aware", "threshold", "exponential")
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
names = st.sampled_from(sorted(LOSSES))
views = st.integers(1, 3)
neighbour_settings = st.sampled_from(
    [None, {"end": 3, "shape": "linear"}, {"end": 0.5, "shape": "cosine", "metric": "manhattan"}]
)


def batch(seed: int, subjects: int = 6, views: int = 2, distinct: bool = False):
    """Embeddings (B, V, D) in float64 and ages on a grid of quarter years."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(subjects, views, 4, dtype=torch.float64, generator=generator)
    if distinct:
        labels = 20 + torch.randperm(60, generator=generator)[:subjects].double()
    else:
        labels = torch.randint(80, 100, (subjects,), generator=generator).double() / 4
    return embeddings, labels


@few
@given(names, seeds, views, neighbour_settings)
def test_order_of_subjects_and_of_views_does_not_matter(name, seed, views, neighbours):
    embeddings, labels = batch(seed, 6, views)
    loss = build(name, neighbours=neighbours)
    value = loss(embeddings, labels, 1.0).item()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed + 1))
    assert loss(embeddings[order], labels[order], 1.0).item() == pytest.approx(value, rel=1e-9)
    assert loss(embeddings.flip(1), labels, 1.0).item() == pytest.approx(value, rel=1e-9)


@few
@given(names, seeds, st.integers(-400, 400))
def test_only_differences_of_age_matter(name, seed, shift):
    embeddings, labels = batch(seed)
    loss = build(name)
    assert loss(embeddings, labels + shift / 4, 0.0).item() == loss(embeddings, labels, 0.0).item()


@few
@given(names, seeds, st.floats(0.1, 10))
def test_scale_of_the_embedding_matters_to_distances_only(name, seed, scale):
    embeddings, labels = batch(seed)
    if name == "rank_n_contrast":  # a distance divided by a temperature
        left = build(name, temperature=2.0 * scale)(embeddings * scale, labels, 0.0)
        right = build(name, temperature=2.0)(embeddings, labels, 0.0)
    else:
        left, right = (build(name)(each, labels, 0.0) for each in (embeddings * scale, embeddings))
    assert left.item() == pytest.approx(right.item(), rel=1e-9)


@few
@given(names, seeds, views, st.integers(1, 20), neighbour_settings)
def test_chunks_change_neither_value_nor_gradient(name, seed, views, chunk_rows, neighbours):
    embeddings, labels = batch(seed, 7, views)
    results = []
    for rows in (None, chunk_rows):
        leaf = embeddings.clone().requires_grad_()
        value = build(name, neighbours=neighbours, chunk_rows=rows)(leaf, labels, 1.0)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reference", ["dynlocrep", "barbano"])
def test_chunks_of_the_published_variants(reference):
    embeddings, labels = batch(0, 9)
    for name in KERNELLED:
        whole, chunked = (build(name, reference=reference, chunk_rows=rows) for rows in (None, 4))
        assert chunked(embeddings, labels, 0.0).item() == pytest.approx(whole(embeddings, labels, 0.0).item())


@few
@given(names, seeds, views)
def test_gradients_by_finite_differences(name, seed, views):
    embeddings, labels = batch(seed, 4, views)
    loss = build(name, temperature=0.5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, 0.0), embeddings.requires_grad_(), eps=1e-6)


@few
@given(st.sampled_from(KERNELLED), seeds)
def test_a_vanishing_width_is_the_equality_kernel(name, seed):
    embeddings, labels = batch(seed, distinct=True)
    narrow = build(name, kernel="rbf", width=1e-3)(embeddings, labels, 0.0).item()
    assert narrow == pytest.approx(build(name, kernel="equal")(embeddings, labels, 0.0).item(), rel=1e-9)
    if name == "y_aware":
        assert narrow == pytest.approx(build("supcon")(embeddings, labels, 0.0).item(), rel=1e-9)
        assert narrow == pytest.approx(build("simclr")(embeddings, None, 0.0).item(), rel=1e-9)


@few
@given(seeds)
def test_an_unbounded_width_makes_everyone_attract(seed):
    embeddings, labels = batch(seed)
    wide = build("y_aware", width=1e9)(embeddings, labels, 0.0).item()
    same = build("supcon")(embeddings, torch.zeros_like(labels), 0.0).item()
    assert wide == pytest.approx(same, rel=1e-9)


@few
@given(seeds, st.sampled_from(["simclr", "supcon", "y_aware"]))
def test_a_high_temperature_counts_the_others(seed, name):
    embeddings, labels = batch(seed)
    assert build(name, temperature=1e8)(embeddings, labels, 0.0).item() == pytest.approx(
        math.log(11), rel=1e-6
    )


@few
@given(names, seeds, st.sampled_from(["cosine", "euclidean", "manhattan", "chebyshev"]))
def test_neighbours_of_the_whole_batch_are_the_plain_loss(name, seed, metric):
    embeddings, labels = batch(seed)
    plain = build(name)(embeddings, labels, 0.0).item()
    for end in (6, 1.0, 100):
        everyone = build(name, neighbours={"end": end, "shape": "linear", "metric": metric})
        assert everyone(embeddings, labels, 1.0).item() == plain


@few
@given(seeds)
def test_normalisers_agree_where_every_anchor_weighs_the_same(seed):
    embeddings, _ = batch(seed, 6)
    labels = torch.tensor([1, 1, 2, 2, 3, 3])
    for name in ("supcon", *KERNELLED):
        settings = {"kernel": "equal"} if name in KERNELLED else {}
        anchor, total = (build(name, normalise=how, **settings) for how in ("anchor", "total"))
        assert anchor(embeddings, labels, 0.0).item() == pytest.approx(total(embeddings, labels, 0.0).item())


def test_schedules_act_on_temperature_and_width():
    embeddings, labels = batch(5)
    scheduled = build(
        "y_aware",
        temperature={"shape": "linear", "start": 0.2, "end": 0.05},
        width={"shape": "exponential", "start": 8.0, "end": 2.0},
    )
    for progress, temperature, width in ((0.0, 0.2, 8.0), (0.5, 0.125, 4.0), (1.0, 0.05, 2.0)):
        fixed = build("y_aware", temperature=temperature, width=width)(embeddings, labels, progress)
        assert scheduled(embeddings, labels, progress).item() == pytest.approx(fixed.item())
        assert scheduled.diagnostics["temperature"].item() == pytest.approx(temperature)


def test_neighbour_counts():
    counts = Neighbours(start=None, end=14, shape="staircase", step=5, epochs=50)
    assert [counts.count(32, epoch / 50) for epoch in (1, 5, 10, 45)] == [32, 30, 28, 14]
    assert counts.count(8, 1.0) == 8  # a small last batch is never asked for more than it has
    assert Neighbours(start=0.5, end=0.25, shape="linear").count(32, 0.5) == 12
    assert Neighbours(start=10, end=1, shape="cosine").count(32, 1.0) == 1
    assert Neighbours(end=1, shape="exponential").count(16, 0.5) == 4
    assert Neighbours(end=1.0, shape="linear").count(32, 1.0) == 32  # the fraction 1.0, not one subject
    assert Neighbours(end=2, shape="linear", min_batch=16).count(15, 1.0) == 15
