from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets import resnet18 as monai_resnet18
from safetensors.torch import save_file
from torch import nn

from core.errors import UserError
from core.models import build
from core.models.weights import (
    Freeze,
    freeze,
    load_part,
    load_weights,
    rates_by_layer,
    read_weights,
    train_unfrozen,
)


def encoder(in_channels: int = 1, width: float = 0.125) -> torch.nn.Module:
    return build("resnet18", in_channels=in_channels, width=width)


def test_the_same_architecture_loads_whole() -> None:
    torch.manual_seed(1)
    source = encoder()
    target = encoder()
    report = load_weights(target, source.state_dict())
    assert report.loaded == tuple(source.state_dict())
    assert report.adapted == report.missing == report.unused == report.mismatched == ()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    assert str(report) == f"{len(report.loaded)} loaded"


def test_an_encoder_loads_from_a_whole_models_weights_of_parallel_training() -> None:
    source, target = encoder(), encoder()
    whole = {f"module.encoder.{name}": value for name, value in source.state_dict().items()}
    whole["module.head.layers.0.weight"] = torch.zeros(3)
    report = load_weights(target, whole)
    assert report.unused == ("module.head.layers.0.weight",)
    assert report.missing == ()
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_what_does_not_fit_is_named_and_left_alone() -> None:
    source, target = encoder(), encoder()
    weights = source.state_dict()
    del weights["bn1.bias"]
    weights["layer1.0.bn1.weight"] = torch.zeros(5)
    weights["fc.weight"] = torch.zeros(2, 2)
    before = target.layer1[0].bn1.weight.clone()
    report = load_weights(target, weights)
    assert report.missing == ("bn1.bias",)
    assert report.mismatched == ("layer1.0.bn1.weight: (5,) in the file, (8,) here",)
    assert report.unused == ("fc.weight",)
    assert torch.equal(target.layer1[0].bn1.weight, before)
    assert "1 missing (bn1.bias), 1 unused (fc.weight), 1 mismatched" in str(report)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (4, 2), (3, 1)])
def test_equal_channels_give_the_same_response_after_adaptation(theirs: int, ours: int) -> None:
    source, target = encoder(theirs).eval(), encoder(ours).eval()
    report = load_weights(target, source.state_dict())
    assert report.adapted == ("conv1.weight",)
    volume = torch.randn(1, 1, 17, 20, 17)
    torch.testing.assert_close(
        target(volume.expand(-1, ours, -1, -1, -1)),
        source(volume.expand(-1, theirs, -1, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_every_convolution_of_the_input_is_adapted() -> None:
    source = build("swin_unetr", in_channels=1, width=0.25)
    report = load_weights(build("swin_unetr", in_channels=4, width=0.25), source.state_dict())
    assert len(report.adapted) == 3  # the patch embedding, and both branches of the first skip block
    assert report.mismatched == ()


def test_another_width_fits_nowhere() -> None:
    with pytest.raises(UserError, match="none of the 2 weights fits the model: it wants names like 'conv1"):
        load_weights(encoder(), {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(UserError, match=r"another size, bn1\.bias: \(16,\) in the file, \(8,\) here"):
        load_weights(encoder(), encoder(width=0.25).state_dict())


@pytest.mark.parametrize(
    ("which", "moves"), [("encoder", "head"), ("all_but_head", "head"), ("none", "both")]
)
def test_frozen_parts_do_not_move_and_their_statistics_stay(which: Freeze, moves: str) -> None:
    model = nn.Sequential()
    model.add_module("encoder", encoder())
    model.add_module("head", nn.Linear(64, 3))
    freeze(model, which)
    train_unfrozen(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(2, 1, 17, 20, 17)).sum().backward()
    optimiser.step()
    moved = {
        name.split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == ({"encoder", "head"} if moves == "both" else {moves})
    # Nothing is kept for what is frozen.
    assert len(optimiser.state) == sum(each.requires_grad for each in model.parameters())


def test_parts_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match=r"begin\.freeze=encoder cannot act: this model has no encoder"):
        freeze(encoder(), "encoder")
    with pytest.raises(
        UserError, match=r"begin\.take=encoder_and_decoder cannot act: this model has no decoder"
    ):
        load_part(nn.ModuleDict({"encoder": encoder()}), encoder().state_dict(), "encoder_and_decoder")


def test_weights_are_read_from_both_formats(tmp_path: Path) -> None:
    state = encoder().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        assert load_weights(encoder(), read_weights(tmp_path / name)).missing == ()


def test_files_without_weights_are_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x01")
    for name, message in [("empty.pt", "holds no state dict"), ("broken.safetensors", "cannot read weights")]:
        with pytest.raises(UserError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def renamed(weights: dict[str, torch.Tensor], *changes: tuple[str, str]) -> dict[str, torch.Tensor]:
    for pattern, other in changes:
        weights = {re.sub(pattern, other, name): value for name, value in weights.items()}
    return weights


VIDEO = (
    (r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"(layer\d\.\d)\.conv(\d)\.", r"\1.conv\2.0."),
    (r"(layer\d\.\d)\.bn(\d)\.", r"\1.conv\2.1."),
)  # fmt: skip
"""From our names of a ResNet to those of torchvision's 3D ResNets."""


def layouts() -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Files as others write them, by name: the encoder that they are of, and the state dict.

    Those of A and C are made here from what spec.md says of their codes: an encoder with a projection head, saved with
    the names of data-parallel training, and MONAI's Swin as `swinViT` beside the heads of the pretext tasks.
    """
    ours, head = (
        encoder(width=0.25).state_dict(),
        {"head.0.weight": torch.zeros(4, 8), "head.0.bias": torch.zeros(4)},
    )
    swin = build("swin", width=0.25).state_dict()
    vit = renamed(swin, (r"^transformer\.", "swinViT."))
    pretext = {"rotation_head.weight": torch.zeros(4, 8), "contrastive_head.weight": torch.zeros(8, 8)}
    return {
        "bare": ("resnet18", ours),
        "ours": ("resnet18", {f"encoder.{name}": value for name, value in ours.items()} | head),
        "A, parallel whole": (
            "resnet18",
            {f"module.encoder.{name}": value for name, value in ours.items()} | head,
        ),
        "A, parallel encoder": (
            "resnet18",
            {f"encoder.module.{name}": value for name, value in ours.items()} | head,
        ),
        "torchvision": ("resnet18", renamed(ours, *VIDEO) | {"fc.weight": torch.zeros(4, 8)}),
        "C, pre-training": ("swin", vit | pretext),
        "C, parallel": ("swin", {f"module.{name}": value for name, value in (vit | pretext).items()}),
        "MONAI Swin UNETR": (
            "swin",
            SwinUNETR(1, 3, feature_size=12, use_v2=False, downsample="mergingv2").state_dict(),
        ),
    }


@pytest.mark.parametrize("layout", layouts())
def test_files_of_other_codes_are_matched_by_name_and_every_weight_of_the_encoder_is_theirs(
    layout: str,
) -> None:
    torch.manual_seed(1)
    network, weights = layouts()[layout]
    torch.manual_seed(2)
    model = nn.ModuleDict({"encoder": build(network, width=0.25), "head": nn.Linear(2, 2)})
    before = model["head"].weight.clone()
    report = load_part(model, weights, "encoder")
    assert report.missing == report.mismatched == ()
    assert report.of_model == 1
    assert report.of_file > 0.99
    sums = sorted(
        float(value.double().sum())
        for name, value in weights.items()
        if value.ndim > 1 and "head" not in name
    )
    for value in model["encoder"].state_dict().values():
        assert value.ndim <= 1 or float(value.double().sum()) in sums
    assert torch.equal(model["head"].weight, before)


def test_monais_resnet_is_ours() -> None:
    theirs = monai_resnet18(spatial_dims=3, n_input_channels=1, num_classes=2)
    model = nn.ModuleDict({"encoder": build("resnet18")})
    report = load_part(model, theirs.state_dict(), "encoder")
    assert (report.missing, report.mismatched, report.of_model) == ((), (), 1)
    assert torch.equal(model["encoder"].layer3[1].conv2.weight, theirs.layer3[1].conv2.weight)


def test_a_swin_encoder_goes_into_a_swin_unetr_whole() -> None:
    for source, target, expected in (
        ("swin", "swin_unetr", 126),
        ("swin_symmetry", "swin_unetr_symmetry", 144),
    ):
        trained, segmenter = build(source, width=0.25), build(target, in_channels=1, width=0.25)
        report = load_weights(
            segmenter, {f"encoder.{name}": each for name, each in trained.state_dict().items()}
        )
        assert len(report.loaded) == expected
        assert report.unused == ()
        name = "layers3.0.blocks.0.attn.qkv.weight"
        inner = trained.transformer if source == "swin" else trained.swin.transformer
        assert torch.equal(segmenter.swinViT.state_dict()[name], inner.state_dict()[name])


def test_a_file_that_would_be_mostly_unused_is_refused() -> None:
    model = nn.ModuleDict({"encoder": encoder()})
    weights = encoder().state_dict()
    with pytest.raises(UserError, match=r"only \d+% of the part that it starts would be used"):
        load_part(
            model,
            {name: value for name, value in weights.items() if name.startswith(("conv1", "layer1"))},
            "encoder",
        )
    with pytest.raises(UserError, match=r"only \d+% of the weights in the file would be used"):
        load_part(model, {"more.weight": torch.zeros(2_000_000), **weights}, "encoder")
    report = load_part(model, renamed(weights, (r"^", "net/")), "encoder", ["net/="])
    assert report.missing == ()


def test_rates_fall_from_the_last_layer_to_the_first() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(2, 2)})
    assert rates_by_layer(model, 1.0, 1.0) == {}
    rates = rates_by_layer(model, 0.5, 0.1)
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} == rates.keys()
    expected = {"conv1": 4, "bn1": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.5 * 0.1 ** expected[name.split(".")[1]])


def test_pickled_code_in_a_file_of_weights_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": {"conv1.weight": torch.zeros(2)}, "args": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot read weights from"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
