"""What `benchmarks/models.py` counts; what it times is not tested."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.models import build

models = pytest.importorskip("benchmarks.models", reason="run as `python -m pytest` from the repository")


@pytest.mark.parametrize("fitting", [0, 1, 2, 3, 37, 64, 100])
def test_the_largest_batch_is_found(fitting: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= fitting

    assert models.largest(fits, limit=100) == fitting
    assert max(asked) <= 100
    assert len(asked) == len(set(asked)) <= 14  # doubling, then halving


def test_kept_bytes_are_those_of_the_activations_each_once() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))
    # the input for the first layer; the hidden units for ReLU and for the second layer, one memory
    assert models.saved_bytes(model, torch.zeros(4, 5)) == 4 * (4 * 5 + 4 * 7)


def test_kept_bytes_need_no_memory_to_be_counted() -> None:
    model, volumes = build("resnet18", width=0.125), torch.zeros(2, 1, 23, 28, 23)
    real = models.saved_bytes(model, volumes)
    assert models.saved_bytes(model.to("meta"), volumes.to("meta")) == pytest.approx(real, rel=0.01)


def test_operations_are_those_of_the_convolutions() -> None:
    """2 · kernel · channels in · voxels out each; as much again for weights and for inputs, except the volume's."""
    forward: dict[nn.Module, int] = {}

    def count(module: nn.Conv3d, _: tuple[torch.Tensor], out: torch.Tensor) -> None:
        forward[module] = 2 * module.weight[0].numel() * out[0].numel()

    encoder = build("resnet18").to("meta")
    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    encoder(torch.empty(2, 1, 46, 55, 46, device="meta"))
    assert models.operations((46, 55, 46)) == 3 * sum(forward.values()) - forward[encoder.conv1]


def learns(variant: models.Variant, device: torch.device) -> bool:
    torch.manual_seed(0)
    step = models.variant_step(variant, 4, (23, 28, 23), device)
    first = step()
    return bool(min(step() for _ in range(4)) < 0.9 * first)


@pytest.mark.parametrize("variant", models.VARIANTS[:2], ids=lambda variant: variant.name)
def test_variants_of_full_precision_train(variant: models.Variant) -> None:
    assert learns(variant, torch.device("cpu"))


# On CPUs the weight gradient of small 3D convolutions in bfloat16 is wrong, or NaN: training refuses it there.
@pytest.mark.gpu
@pytest.mark.parametrize("variant", models.VARIANTS, ids=lambda variant: variant.name)
def test_variants_train_on_a_gpu(variant: models.Variant) -> None:
    assert learns(variant, torch.device("cuda"))
