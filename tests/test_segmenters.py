from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from core.models import MODELS, build
from core.volumes.images.mirror import mirror_image


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_contract_of_names_is_kept() -> None:
    names = "resnet18 resnet34 resnet50 resnet101 resnext50 resnext101 resnext152 resnext200 sfcn swin "
    names += "swin_symmetry res_unet groupnorm_unet swin_unetr swin_unetr_symmetry"
    assert list(MODELS) == names.split()


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert parameters(build("res_unet")) == 24_322_148
        assert parameters(build("groupnorm_unet")) == 2_095_392
        assert parameters(build("groupnorm_unet").encoder) == 885_696
        assert parameters(build("groupnorm_unet").decoder) == 1_207_280
        assert parameters(build("groupnorm_unet", head="dense")) == 2_098_224
        assert parameters(build("groupnorm_unet", head="dense", levels=3)) == 2_056_064
        assert parameters(build("groupnorm_unet", head="global")) == 4_293_568


def test_swin_unetr_counts_are_the_published_ones() -> None:
    assert parameters(build("swin_unetr")) == 62_191_941
    assert parameters(build("swin_unetr_symmetry")) == 71_643_717


def test_res_unet_returns_every_grid_and_keeps_slices_apart_below() -> None:
    model = build("res_unet", in_channels=2, out_channels=3, width=0.125)
    volumes = torch.randn(2, 2, 23, 28, 17)
    logits = model(volumes)
    assert logits.shape == (2, 3, 23, 28, 17)
    logits.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    with torch.device("meta"):
        reference, x = build("res_unet"), torch.empty(1, 1, 64, 64, 64)
        for block in reference.down:
            x = block(x) if block is reference.down[0] else block(reference.pool(x))
        assert x.shape == (1, 512, 4, 4, 64)
        assert reference(torch.empty(1, 1, 64, 64, 64)).shape == (1, 4, 64, 64, 64)


def test_the_skip_of_a_residual_block_comes_after_the_last_relu() -> None:
    block = build("res_unet", width=0.125).down[0]
    for parameter in block.convolutions.parameters():
        torch.nn.init.zeros_(parameter)  # silences the convolutions
    volumes = torch.randn(1, 1, 4, 4, 4)
    expected = volumes * block.skip.weight.view(1, -1, 1, 1, 1)
    assert (expected < 0).any()
    torch.testing.assert_close(block(volumes), expected)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (2, 4, 70, 45)),
        ({"head": "dense", "levels": 5, "dimension": 8}, (2, 8, 70, 45)),
        ({"head": "dense", "levels": 3}, (2, 64, 17, 11)),
        ({"head": "global", "grid": (70, 45)}, (2, 128)),
    ],
)
def test_groupnorm_unet_heads_train_on_odd_grids(settings: dict, shape: tuple[int, ...]) -> None:
    model = build("groupnorm_unet", width=0.25, **settings)
    out = model(torch.randn(2, 2, 70, 45))
    assert out.shape == shape
    out.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_groupnorm_unet_treats_subjects_apart_in_training_too() -> None:
    model = build("groupnorm_unet", width=0.25)
    slices = torch.randn(3, 2, 32, 32)
    torch.testing.assert_close(model(slices)[1:2], model(slices[1:2]), rtol=1e-4, atol=1e-5)


def test_groupnorm_groups_hold_four_channels_and_layers_start_apart() -> None:
    model = build("groupnorm_unet")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_channels // norm.num_groups for norm in norms} == {4}
    first, second = model.encoder.stages[4][0][0].weight, model.encoder.stages[5][0][0].weight
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="levels 3 cannot serve head 'segmentation'"):
        build("groupnorm_unet", levels=3)
    with pytest.raises(UserError, match=r"width 0\.3 must be a multiple of 1/4"):
        build("groupnorm_unet", width=0.3)
    with pytest.raises(UserError, match=r"unknown head 'dens'; did you mean 'dense'\?"):
        build("groupnorm_unet", head="dens")


def test_symmetry_aware_swin_unetr_differs_from_the_plain_one_by_its_attention_only() -> None:
    plain = build("swin_unetr", in_channels=1, width=0.25).eval()
    symmetric = build("swin_unetr_symmetry", in_channels=1, width=0.25).eval()
    missing = symmetric.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert all(key.startswith("attention.") for key in missing.missing_keys)
    volumes = torch.randn(1, 1, 32, 64, 32)  # two deepest tokens: the norm of one would be zero
    with torch.no_grad():
        logits, without = symmetric(volumes), plain(volumes)
        assert not torch.allclose(logits, without)
        torch.testing.assert_close(symmetric(volumes, mirror_image(volumes)), logits)
        assert not torch.allclose(symmetric(volumes, volumes), logits)
        symmetric.attention.forward = lambda features, mirrored: features  # type: ignore[method-assign]
        torch.testing.assert_close(symmetric(volumes), without, rtol=1e-4, atol=1e-5)


def test_small_symmetry_aware_swin_unetr_trains() -> None:
    model = build("swin_unetr_symmetry", in_channels=1, out_channels=2, width=0.25, checkpointing=True)
    logits = model(torch.randn(1, 1, 32, 64, 32))
    assert logits.shape == (1, 2, 32, 64, 32)
    logits.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
