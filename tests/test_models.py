from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from monai.networks.nets import ResNet
from pydantic import TypeAdapter, ValidationError

from core.config import resolve
from core.errors import UserError
from core.models import (
    ModelSettings,
    ProjectionHead,
    RegressionHead,
    build,
    build_encoder,
    build_projection_head,
)
from core.tasks.brain_age import BrainAge


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# spec.md A.2: encoder and head of the reference, one channel
REFERENCE_COUNTS = {
    "resnet18": (33_160_000, 328_320),
    "resnet34": (63_469_632, 328_320),
    "resnet50": (46_155_072, 4_458_624),
    "resnet101": (85_201_216, 4_458_624),
}


@pytest.mark.parametrize("name", REFERENCE_COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        encoder = build(name)
        head = ProjectionHead(encoder.embedding_dim)
    assert (parameters(encoder), parameters(head)) == REFERENCE_COUNTS[name]


def test_resnet18_is_monais_own_network() -> None:
    settings = {"n_input_channels": 1, "feed_forward": False, "bias_downsample": False, "shortcut_type": "B"}
    theirs = ResNet("basic", [2, 2, 2, 2], [8, 16, 32, 64], conv1_t_stride=2, **settings).eval()
    ours = build("resnet18", width=0.125).eval()
    ours.load_state_dict(theirs.state_dict())
    volumes = torch.randn(2, 1, 23, 28, 23)
    torch.testing.assert_close(ours(volumes), theirs(volumes), rtol=0, atol=0)


def test_resnext_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        encoder = build("resnext50")
        assert parameters(encoder) + parameters(RegressionHead(encoder.embedding_dim)) == 25_870_465
        counts = [parameters(build(f"resnext{depth}")) for depth in (101, 152, 200)]
    assert [round(count / 1e6, 1) for count in counts] == [47.5, 65.4, 70.5]


def test_resnext_stem_keeps_the_slice_axis_whole() -> None:
    with torch.device("meta"):
        encoder = build("resnext50")
        features = encoder.layer1(encoder.conv1(torch.empty(1, 1, 64, 64, 64)))
        assert features.shape == (1, 256, 32, 32, 64)
        assert encoder.layer4(encoder.layer3(encoder.layer2(features))).shape == (1, 2048, 4, 4, 8)


def test_resnext_convolutions_have_their_cardinality() -> None:
    with torch.device("meta"):
        block = build("resnext50", cardinality=8, width=0.5).layer1[0]
    assert (block.conv2.groups, block.conv2.in_channels) == (8, 16)


def test_shortcut_a_lets_the_gradient_through() -> None:
    encoder = build("resnext50", width=0.25, cardinality=8, shortcut="A")
    entry = encoder.layer2[0]
    for parameter in entry.bn3.parameters():
        torch.nn.init.zeros_(parameter)  # silences the other branch
    features = torch.randn(2, 64, 5, 6, 5, requires_grad=True)
    out = entry(features)
    expected = torch.zeros(2, 128, 3, 3, 3)
    expected[:, :64] = features.detach()[:, :, ::2, ::2, ::2].clamp(min=0)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert features.grad.count_nonzero() == expected.count_nonzero()


def test_sfcn_is_the_published_stack() -> None:
    channels = [1, 32, 64, 128, 256, 256]
    convolutions = sum(27 * a * b + b for a, b in pairwise(channels)) + 256 * 64 + 64
    with torch.device("meta"):
        encoder = build("sfcn")
        assert encoder.stages[:5](torch.empty(1, 1, 160, 192, 160)).shape == (1, 256, 5, 6, 5)
    assert parameters(encoder) == convolutions + 2 * (sum(channels[1:]) + 64)


@pytest.mark.parametrize("name", ["sfcn", "resnext50"])
def test_small_variants_train_on_odd_grids(name: str) -> None:
    encoder = build(name, in_channels=2, width=0.25)
    embedding = encoder(torch.randn(2, 2, 23, 28, 23))
    assert embedding.shape == (2, encoder.embedding_dim)
    embedding.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


@pytest.mark.parametrize("shape", [(23, 28, 23), (17, 20, 33)])
def test_resnet_maps_odd_grids_to_embeddings_and_trains(shape: tuple[int, int, int]) -> None:
    encoder = build("resnet18", in_channels=2, width=0.125)
    embedding = encoder(torch.randn(3, 2, *shape))
    assert embedding.shape == (3, encoder.embedding_dim) == (3, 64)
    embedding.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


def test_resnet_bottleneck_reports_its_expanded_embedding() -> None:
    encoder = build("resnet50", width=0.0625).eval()
    assert encoder(torch.randn(1, 1, 23, 28, 23)).shape == (1, encoder.embedding_dim) == (1, 128)


def test_convolutions_start_from_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    weight = build("resnet18", width=0.5).layer4[1].conv2.weight
    fan_out = weight.shape[0] * 27
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch() -> None:
    encoder = build("resnet18", width=0.125)
    volumes = torch.randn(4, 1, 23, 28, 23)
    encoder(volumes)  # moves the running statistics
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(volumes)[2:3], encoder(volumes[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnext50", "sfcn", "swin", "swin_symmetry"])
def test_bfloat16_changes_embeddings_little_and_evaluation_not_by_batch(name: str) -> None:
    torch.manual_seed(0)
    encoder = build(name, width=0.25).eval()
    volumes = torch.randn(2, 1, 17, 20, 17)
    with torch.no_grad():
        full = encoder(volumes)
        torch.testing.assert_close(encoder(volumes[1:]), full[1:], rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = encoder(volumes).float()
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize(("kind", "dimension"), [("mlp", 5), ("linear", 5), ("none", 16)])
def test_projections_are_unit_vectors_in_float32(kind: str, dimension: int) -> None:
    head = ProjectionHead(16, dimension=5, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projection = head(torch.randn(7, 16))
    assert projection.dtype == torch.float32
    assert projection.shape == (7, dimension) == (7, head.dimension)
    torch.testing.assert_close(projection.norm(dim=1), torch.ones(7))


def test_mlp_head_is_two_layers_with_relu() -> None:
    head = ProjectionHead(6, dimension=4)
    embedding = torch.randn(3, 6)
    first, _, second = head.layers
    hidden = (embedding @ first.weight.T + first.bias).clamp(min=0)
    projection = hidden @ second.weight.T + second.bias
    torch.testing.assert_close(head(embedding), projection / projection.norm(dim=1, keepdim=True))


def test_probes_read_the_encoder_or_the_projection_of_the_same_network() -> None:
    volumes = torch.randn(2, 1, 23, 28, 23)
    read = {}
    for readout in ("encoder", "projection"):
        torch.manual_seed(0)
        settings = resolve({"model": {"name": "resnet18", "width": 0.125, "readout": readout}})
        model = BrainAge().build(settings, 1, {}).eval()
        read[readout] = model.embed(volumes)
    assert (read["encoder"].shape, read["projection"].shape) == ((2, 64), (2, 128))
    torch.testing.assert_close(model.encoder(volumes), read["encoder"])
    torch.testing.assert_close(model.head(read["encoder"]), read["projection"])


def test_regression_head_is_one_affine_map() -> None:
    head = RegressionHead(6)
    embedding = torch.randn(3, 6)
    torch.testing.assert_close(head(embedding), embedding @ head.layer.weight[0] + head.layer.bias)


def test_unknown_names_and_settings_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'resnet81'; did you mean 'resnet18'\?"):
        build("resnet81")
    with pytest.raises(UserError, match=r"model 'resnet18' has no setting 'widht'; did you mean 'width'\?"):
        build("resnet18", widht=0.5)
    with pytest.raises(UserError, match=r"width 0\.001 leaves no channels"):
        build("resnet18", width=0.001)


def test_settings_describe_encoder_and_head() -> None:
    settings = TypeAdapter(ModelSettings).validate_python(
        {"name": "resnet34", "width": 0.125, "head": {"kind": "linear", "dimension": 32}}
    )
    encoder = build_encoder(settings, in_channels=3)
    head = build_projection_head(settings, encoder.embedding_dim)
    assert encoder.conv1.weight.shape == (8, 3, 7, 7, 7)
    assert parameters(head) == 64 * 32 + 32


@pytest.mark.parametrize("name", ["resnet101", "resnext152", "sfcn"])
def test_the_name_alone_chooses_the_settings_and_the_published_network(name: str) -> None:
    settings = TypeAdapter(ModelSettings).validate_python({"name": name})
    with torch.device("meta"):
        assert parameters(build_encoder(settings)) == parameters(build(name))


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="widht"):
        TypeAdapter(ModelSettings).validate_python({"name": "resnet18", "widht": 1.0})
    with pytest.raises(ValidationError, match="resnet18"):
        TypeAdapter(ModelSettings).validate_python({"name": "resnet19"})
    with pytest.raises(ValidationError, match="cardinality"):
        TypeAdapter(ModelSettings).validate_python({"name": "resnet18", "cardinality": 8})
    with pytest.raises(ValidationError, match=r"multiple of 0\.25"):
        TypeAdapter(ModelSettings).validate_python({"name": "resnext50", "width": 0.3})
