from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.models import build
from core.models.weights import freeze, load_weights, read_weights, train_unfrozen


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
    report = load_weights(target, whole, prefix="encoder.")
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


def test_frozen_parts_do_not_move_and_their_statistics_stay() -> None:
    model = encoder()
    frozen = freeze(model, ["conv1", "bn1", "layer1."])
    assert {name.split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1"}
    train_unfrozen(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(torch.randn(2, 1, 17, 20, 17)).sum().backward()
    optimiser.step()
    for name, value in model.state_dict().items():
        if name.startswith(("conv1", "bn1", "layer1.")):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.layer2[0].bn1.running_mean, before["layer2.0.bn1.running_mean"])
    with pytest.raises(UserError, match=r"no parameter begins with 'layr1'; did you mean 'layer1'\?"):
        freeze(model, ["layr1"])


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
