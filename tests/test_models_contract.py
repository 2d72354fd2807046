"""What every network keeps, whatever it is made of: odd grids, training against evaluation, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core.models import MODELS, build

ODD = (1, 17, 20, 19)
# Batch norm of two values is their sign: where a network shrinks most, more voxels must be left.
ODD_LARGER = (1, 33, 36, 35)
# MONAI takes multiples of 32 only.
EVEN = (1, 96, 32, 32)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resnet18": ({"width": 1 / 16}, ODD_LARGER),
    "resnet34": ({"width": 1 / 16}, ODD_LARGER),
    "resnet50": ({"width": 1 / 16}, ODD_LARGER),
    "resnet101": ({"width": 1 / 16}, ODD_LARGER),
    "resnext50": ({"width": 0.25}, ODD),
    "resnext101": ({"width": 0.25, "cardinality": 8}, ODD),
    "resnext152": ({"width": 0.25, "cardinality": 8, "shortcut": "A"}, ODD),
    "resnext200": ({"width": 0.25, "cardinality": 8}, ODD),
    "sfcn": ({"width": 0.25}, ODD_LARGER),
    "swin": ({"width": 0.25}, (1, 33, 20, 19)),
    "swin_symmetry": ({"width": 0.25, "dropout": 0.0}, (1, 33, 20, 19)),
    "res_unet": ({"width": 1 / 16}, ODD),
    "groupnorm_unet": ({"width": 0.25, "in_channels": 1}, (1, 35, 46)),
    "swin_unetr": ({"width": 0.25, "in_channels": 1}, EVEN),
    "swin_unetr_symmetry": ({"width": 0.25, "in_channels": 1, "dropout": 0.0}, EVEN),
}

LARGE = ("swin_unetr", "swin_unetr_symmetry")  # seconds even when narrow
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in SMALL]


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A narrow network and a batch of two for it."""
    torch.manual_seed(0)
    settings, shape = SMALL[name]
    return build(name, **settings), torch.randn(2, *shape)


def test_every_model_is_here() -> None:
    assert set(SMALL) == set(MODELS)


@pytest.mark.parametrize("name", EACH)
def test_evaluation_with_the_statistics_of_a_batch_is_what_training_gave(name: str) -> None:
    """Batch norm is all that training and evaluation differ in, once nothing is dropped out."""
    model, volumes = small(name)
    batch_statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def measure(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        by_channel = inputs[0].transpose(0, 1).flatten(1).double()
        batch_statistics[norm] = (by_channel.mean(dim=1), by_channel.var(dim=1, correction=0))

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        trained = model(volumes)
        for norm, (mean, variance) in batch_statistics.items():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        for hook in hooks:
            hook.remove()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        evaluated = model.eval()(volumes)
    assert len(batch_statistics) == len(norms)
    torch.testing.assert_close(evaluated, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", EACH)
def test_bfloat16_trains_every_parameter(name: str) -> None:
    model, volumes = small(name)
    # oneDNN's bfloat16 gradient of 3³ weights is garbage where the first side is 2 (torch 2.13, AVX-512).
    # The large networks have no such side here, and are slow without it.
    with torch.backends.mkldnn.flags(enabled=name in LARGE):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(volumes)
        (out.float() * torch.randn(out.shape)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert [key for key, gradient in gradients.items() if not torch.isfinite(gradient).all()] == []


@pytest.mark.parametrize(
    "name", ["swin", "swin_symmetry", pytest.param("swin_unetr_symmetry", marks=pytest.mark.slow)]
)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    settings, shape = SMALL[name]
    volumes = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build(name, checkpointing=checkpointing, **settings)
        model(volumes).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("name", LARGE)
def test_swin_unetr_names_the_sides_it_cannot_take(name: str) -> None:
    model, _ = small(name)
    with pytest.raises(ValueError, match=r"\[32, 64, 33\]\)\) must be divisible"):
        model(torch.randn(1, 1, 32, 64, 33))
