"""What every loss must do, at every corner a search can visit."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from core.errors import UserError
from core.losses import LOSSES, ObjectiveSettings, build

NAMES = sorted(LOSSES)
KERNELLED = ("y_aware", "threshold", "exponential")
KERNELS = ("equal", "rbf", "cauchy", "laplace", "epanechnikov")


def embeddings_of(subjects: int, views: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(subjects * 10 + views)
    return torch.randn(subjects, views, 8, generator=generator).to(dtype).requires_grad_()


def finite_loss(loss, embeddings, labels, progress=0.5):
    """The loss value, after checking that it and its gradient are finite and nobody is lost count of."""
    value = loss(embeddings, labels, progress)
    assert value.shape == ()
    assert value.requires_grad
    (gradient,) = torch.autograd.grad(value, embeddings)
    assert torch.isfinite(value), loss
    assert torch.isfinite(gradient).all(), loss
    diagnostics = loss.diagnostics
    assert diagnostics["anchors_used"] + diagnostics["anchors_dropped"] == embeddings[..., 0].numel()
    assert not any(entry.requires_grad for entry in diagnostics.values())
    return value, gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("views", [1, 2])
def test_identical_ages(name, views):
    value, _ = finite_loss(build(name), embeddings_of(5, views), torch.full((5,), 40.0))
    if name == "threshold":  # nobody is farther than anybody
        assert value == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("views", [1, 2])
def test_one_subject(name, views):
    loss = build(name)
    finite_loss(loss, embeddings_of(1, views), torch.tensor([40.0]))
    if views == 1:
        assert loss.diagnostics["anchors_dropped"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_rank_has_a_zero_on_the_graph(name):
    embeddings = embeddings_of(3)[:0]
    value = build(name)(embeddings, torch.zeros(0), 0.5)
    assert value == 0
    assert value.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_duplicate_embeddings(name, fraction):
    one = torch.randn(1, 1, 8)
    neighbours = None if fraction is None else {"end": fraction, "shape": "linear"}
    for embeddings in (one.repeat(6, 2, 1), torch.randn(6, 1, 8).repeat(1, 2, 1), torch.zeros(6, 2, 8)):
        finite_loss(build(name, neighbours=neighbours), embeddings.requires_grad_(), torch.arange(6.0), 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(name, temperature):
    for labels in (torch.linspace(20, 90, 12), torch.full((12,), 40.0)):
        finite_loss(build(name, temperature=temperature), embeddings_of(12), labels)


@pytest.mark.parametrize("name", KERNELLED)
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_extreme_widths(name, kernel):
    for width, views in itertools.product((1e-3, 0.1, 1e4), (1, 2)):
        loss = build(name, kernel=kernel, width=width)
        finite_loss(loss, embeddings_of(12, views), torch.linspace(20, 90, 12))
        if width == 1e-3 and views == 1 and kernel != "cauchy":
            assert loss.diagnostics["anchors_dropped"] == 12


@pytest.mark.parametrize("name", KERNELLED)
@pytest.mark.parametrize("reference", ["dynlocrep", "barbano"])
def test_published_variants_at_the_corners(name, reference):
    for labels, width in itertools.product(
        (torch.full((6,), 40.0), torch.linspace(20, 90, 6)), (1e-3, 2.0, 1e4)
    ):
        for temperature in (1e-3, 0.1, 1e3):
            loss = build(name, reference=reference, width=width, temperature=temperature)
            finite_loss(loss, embeddings_of(6, 1), labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name, dtype):
    embeddings = embeddings_of(12, dtype=dtype)
    labels = torch.linspace(20, 90, 12)
    expected = build(name, temperature=0.02)(embeddings.detach().float(), labels, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = finite_loss(build(name, temperature=0.02), embeddings, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ages_of_any_number_type_mean_the_same(name):
    embeddings, ages = embeddings_of(6), [20, 30, 30, 45, 60, 61]
    values = []
    for dtype in (torch.float32, torch.int64, torch.float64, torch.uint8, torch.float16):
        value, _ = finite_loss(build(name), embeddings, torch.tensor(ages, dtype=dtype))
        assert value.dtype == torch.float32
        values.append(value.item())
    assert len(set(values)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_that_leave_no_negative(name):
    neighbours = {"start": 1, "end": 1, "shape": "linear"}
    for views in (1, 2):
        finite_loss(build(name, neighbours=neighbours), embeddings_of(6, views), torch.linspace(20, 90, 6))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_loss_waits_for_the_device(name):
    """Tensors without data raise as soon as the host asks for a value or for a shape that depends on one."""
    embeddings, labels = (
        torch.randn(8, 2, 4, device="meta", requires_grad=True),
        torch.randn(8, device="meta"),
    )
    variants: list[dict] = [{}, {"chunk_rows": 4}]
    variants += [
        {"neighbours": {"end": 3, "shape": "linear", "metric": metric}} for metric in ("cosine", "manhattan")
    ]
    variants += [{"reference": "dynlocrep"}] if name in KERNELLED else []
    variants += [{"bin_width": 2.0}] if name == "supcon" else []
    for settings in variants:
        build(name, **settings)(embeddings, labels, 1.0).backward()
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        embeddings.sum().item()


def test_anchors_without_a_positive_are_dropped_and_counted():
    loss = build("supcon")
    finite_loss(loss, embeddings_of(4, 1), torch.tensor([1, 1, 2, 3]))
    assert loss.diagnostics["anchors_used"] == 2
    assert loss.diagnostics["anchors_dropped"] == 2
    value, gradient = finite_loss(loss, embeddings_of(4, 1), torch.arange(4))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_errors_that_name_the_loss(name):
    loss = build(name)
    with pytest.raises(UserError, match=rf"{name}: embeddings must be .*\(4, 8\)"):
        loss(torch.randn(4, 8), torch.zeros(4), 0.5)
    with pytest.raises(UserError, match=rf"{name}: labels must have shape \(B,\) = \(4,\), got \(3,\)"):
        loss(torch.randn(4, 2, 8), torch.zeros(3), 0.5)


@pytest.mark.parametrize("name", [*KERNELLED, "rank_n_contrast"])
def test_missing_labels_are_an_error(name):
    with pytest.raises(UserError, match=f"{name} needs a label"):
        build(name)(torch.randn(4, 2, 8), None, 0.5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("simcrl", {}, "unknown loss 'simcrl'; did you mean 'simclr'"),
        ("simclr", {"kernel": "rbf"}, "simclr: 'kernel' cannot act"),
        ("simclr", {"normalise": "total"}, "'normalise' cannot act"),
        ("supcon", {"kernel": "rbf"}, "'kernel' cannot act"),
        ("y_aware", {"temprature": 0.1}, "'temprature' cannot act on this loss; did you mean 'temperature'"),
        ("rank_n_contrast", {"width": 2}, "'width' cannot act"),
        ("y_aware", {"kernel": "equal", "width": 2}, "width cannot act with kernel 'equal'"),
        ("y_aware", {"kernel": "triangle"}, "y_aware: kernel: .*got 'triangle'"),
        ("y_aware", {"reference": "dynlocrep", "normalise": "anchor"}, "means normalise 'total', got 'anchor'"),
        ("y_aware", {"reference": "dynlocrep", "neighbours": {"end": 4, "step": 1}}, "neighbours cannot act"),
        ("exponential", {"reference": "barbano", "neighbours": {"end": 4, "step": 1}}, "neighbours cannot act"),
        ("exponential", {"reference": "rnc"}, "reference: .*got 'rnc'"),
        ("exponential", {"reference": "barbano", "logit_offset": "none"}, "means logit_offset 'self'"),
        ("exponential", {"neighbours": {"end": 4}}, "a staircase needs step"),
        ("exponential", {"neighbours": {"end": 0, "shape": "linear"}}, "end must be a whole count, or a fraction"),
        ("exponential", {"neighbours": {"end": 2.5, "shape": "linear"}}, "got 2.5"),
        ("exponential", {"neighbours": {"end": 4, "shape": "linear", "step": 2}}, "act only with shape 'staircase'"),
        ("rank_n_contrast", {"reference": "rnc", "neighbours": {"end": 4, "step": 1}}, "neighbours cannot act"),
        ("supcon", {"bin_width": 0}, "bin_width: .*greater than 0"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_act_is_an_error(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["temperature", "width"])
def test_temperature_and_width_must_stay_above_0(setting):
    loss = build("y_aware", **{setting: {"shape": "linear", "start": 1.0, "end": 0.0}})
    finite_loss(loss, embeddings_of(4), torch.arange(4.0), 0.9)
    with pytest.raises(UserError, match=f"{setting} of y_aware must be above 0, got 0.0 at progress=1"):
        loss(embeddings_of(4), torch.arange(4.0), 1.0)


def test_settings_survive_json_and_build_the_same_loss():
    adapter = TypeAdapter(ObjectiveSettings)
    for name in [*NAMES, "l1", "mse"]:
        settings = adapter.validate_python({"name": name})
        again = adapter.validate_json(settings.model_dump_json())
        assert again == settings
        plain = settings.model_dump(mode="json", exclude={"name"})
        assert repr(build(name, **plain)) == repr(settings.build())
    with pytest.raises(ValidationError, match=r"simclr\.kernel\n  Extra inputs are not permitted "):
        adapter.validate_python({"name": "simclr", "kernel": "rbf"})


def test_the_length_of_the_run_is_filled_in():
    halving = {"shape": "step", "rate": 0.5, "step": 1}
    settings = {"neighbours": {"end": 2, "step": 1}, "temperature": halving | {"start": 0.1}}
    loss = build("exponential", epochs=4, width=halving | {"start": 4.0}, **settings)
    finite_loss(loss, embeddings_of(8), torch.arange(8.0), 1.0)
    assert loss.diagnostics["neighbours"] == 3
    assert loss.diagnostics["temperature"].item() == pytest.approx(0.0125)
    with pytest.raises(UserError, match="epochs is None"):
        build("exponential", **settings)(embeddings_of(8), torch.arange(8.0), 1.0)


def test_repr_shows_every_part():
    loss = build(
        "exponential",
        temperature={"shape": "linear", "start": 1.0, "end": 0.1},
        kernel="cauchy",
        width=3.5,
        normalise="total",
        chunk_rows=64,
        neighbours={"end": 4, "shape": "linear", "metric": "manhattan"},
    )
    text = repr(loss)
    assert text.startswith("PairwiseLoss(exponential, Parts(")
    # the name of every part, as the first word of what a comma or bracket begins
    assert {part.name for part in fields(loss.parts)} <= set(re.findall(r"[(, ](\w+)=", text))
    for shown in (
        "temperature=Linear(shape='linear', start=1.0, end=0.1)",
        "kernel=<function cauchy ",
        "width=Constant(shape='constant', value=3.5)",
        "neighbours=Neighbours(start=None, end=4, shape='linear', metric='manhattan', ",
        "normalise='total'",
        "chunk_rows=64",
    ):
        assert shown in text


def test_regression_baselines():
    predicted = torch.tensor([[[41.0], [43.0]], [[60.0], [50.0]]], requires_grad=True)
    ages = torch.tensor([40, 60])
    assert build("l1")(predicted, ages, 0.5).item() == pytest.approx((1 + 3 + 0 + 10) / 4)
    assert build("mse")(predicted, ages, 0.5).item() == pytest.approx((1 + 9 + 0 + 100) / 4)
    with pytest.raises(UserError, match="l1 compares predictions"):
        build("l1")(torch.randn(2, 2, 3), ages, 0.5)
    assert math.isfinite(build("l1")(predicted[:0], ages[:0], 0.5).item())
