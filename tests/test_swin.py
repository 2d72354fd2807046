from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from core.errors import UserError
from core.models import ProjectionHead, ReconstructionDecoder, build
from core.models.swin import SymmetryAttention
from core.volumes.images.mirror import mirror_image

PROJECTION = 768 * 512 + 512  # contrast and symmetry heads of spec.md C.2
GRID = (23, 28, 23)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    # MONAI's Swin cannot be made on the meta device
    plain, coarse, symmetric = build("swin"), build("swin", patch=4), build("swin_symmetry")
    with torch.device("meta"):
        decoder, head = ReconstructionDecoder(768), ProjectionHead(768, 512, "linear")
    assert (parameters(plain), parameters(coarse)) == (8_062_002, 8_064_690)
    assert parameters(symmetric.attention) == 9_451_776
    assert parameters(symmetric) + 2 * 768 + 2 == 17_515_316  # classifier of two classes
    assert (parameters(decoder), parameters(head)) == (10_638_385, PROJECTION)
    rotation = 4 * 768 + 4
    assert parameters(coarse) + 2 * 768 + 2 == 8_066_228  # plain classifier
    assert parameters(coarse) + PROJECTION == 8_458_418  # asymmetry embedder
    assert parameters(plain) + rotation + PROJECTION + parameters(decoder) == 19_097_191
    assert parameters(symmetric) + rotation + 2 * PROJECTION + parameters(decoder) == 28_942_695


def test_token_grids_are_the_published_ones() -> None:
    for patch, grid, tokens in [(2, (96, 96, 96), 27), (2, (178, 208, 178), 252), (4, (160, 160, 160), 27)]:
        encoder = build("swin", patch=patch, width=0.25).to("meta")
        features = encoder.feature_map(torch.empty(1, 1, *grid, device="meta"))
        assert features[0, 0].numel() == tokens


@pytest.mark.parametrize("name", ["swin", "swin_symmetry"])
def test_small_variants_train_on_odd_grids(name: str) -> None:
    encoder = build(name, in_channels=2, width=0.25)
    embedding = encoder(torch.randn(2, 2, *GRID))
    assert embedding.shape == (2, encoder.embedding_dim) == (2, 192)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


def test_pooling_is_the_mean_or_the_corner_of_the_same_features() -> None:
    encoder = build("swin", width=0.25).eval()
    volumes = torch.randn(1, 1, 40, 40, 40)
    features = encoder.feature_map(volumes)
    assert features.shape == (1, 192, 2, 2, 2)
    torch.testing.assert_close(encoder(volumes), features.flatten(2).mean(dim=2))
    encoder.pooling = "corner"
    torch.testing.assert_close(encoder(volumes), features.flatten(2)[:, :, 0])


def test_merging_sees_every_sub_lattice() -> None:
    """One voxel of each of the eight sub-lattices must reach the output; the legacy merging drops two."""
    reached = {}
    for merging in ("v2", "legacy"):
        downsample = build("swin", width=0.25, merging=merging).transformer.layers1[0].downsample
        tokens = torch.zeros(1, 2, 2, 2, 12, requires_grad=True)
        downsample.norm = torch.nn.Identity()
        downsample(tokens).sum().backward()
        reached[merging] = int((tokens.grad.abs().sum(dim=-1) > 0).sum())
    assert reached == {"v2": 8, "legacy": 6}


def attention_by_hand(
    weights: torch.nn.MultiheadAttention, query: torch.Tensor, memory: torch.Tensor
) -> torch.Tensor:
    """Multi-head attention of one subject, head by head, from softmax(q k' / sqrt(d)) v."""
    size = query.shape[1] // weights.num_heads
    w_q, w_k, w_v = weights.in_proj_weight.chunk(3)
    b_q, b_k, b_v = weights.in_proj_bias.chunk(3)
    q, k, v = query @ w_q.T + b_q, memory @ w_k.T + b_k, memory @ w_v.T + b_v
    heads = []
    for head in range(weights.num_heads):
        of_head = slice(head * size, (head + 1) * size)
        scores = q[:, of_head] @ k[:, of_head].T / size**0.5
        heads.append(torch.softmax(scores, dim=1) @ v[:, of_head])
    return torch.cat(heads, dim=1) @ weights.out_proj.weight.T + weights.out_proj.bias


@pytest.mark.parametrize("pre_norm", [False, True])
def test_symmetry_attention_is_the_published_formula(pre_norm: bool) -> None:
    block = SymmetryAttention(48, heads=12, pre_norm=pre_norm).eval()
    layer = block.layers[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, mirrored = torch.randn(1, 48, 2, 3, 2), torch.randn(1, 48, 2, 3, 2)
    x, m = features[0].flatten(1).T, mirrored[0].flatten(1).T

    def ffn(tokens: torch.Tensor) -> torch.Tensor:
        return layer.linear2(F.gelu(layer.linear1(tokens)))

    if pre_norm:
        normal = layer.norm1(x)
        x = x + attention_by_hand(layer.self_attn, normal, normal)
        x = x + attention_by_hand(layer.multihead_attn, layer.norm2(x), m)
        x = x + ffn(layer.norm3(x))
    else:
        x = layer.norm1(x + attention_by_hand(layer.self_attn, x, x))
        x = layer.norm2(x + attention_by_hand(layer.multihead_attn, x, m))
        x = layer.norm3(x + ffn(x))
    torch.testing.assert_close(block(features, mirrored)[0].flatten(1).T, x, rtol=1e-4, atol=1e-5)


def test_symmetry_attention_follows_a_mirror_of_the_token_grid() -> None:
    """Exchanging left and right of what goes in exchanges them in what comes out, and nothing else."""
    block = SymmetryAttention(24, layers=2).eval()
    features, mirrored = torch.randn(2, 24, 4, 3, 2), torch.randn(2, 24, 4, 3, 2)
    flipped = block(features.flip(2), mirrored.flip(2))
    torch.testing.assert_close(flipped, block(features, mirrored).flip(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        block(features, mirrored.flip(2)), block(features, mirrored), rtol=1e-4, atol=1e-5
    )


def test_a_mirrored_brain_with_its_mirror_image_is_the_pair_exchanged() -> None:
    encoder = build("swin_symmetry", width=0.25).eval()
    volumes = torch.randn(2, 1, *GRID)
    first, second = encoder.feature_maps(volumes)
    of_mirror = encoder.feature_maps(mirror_image(volumes), volumes)
    torch.testing.assert_close(of_mirror, (second, first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(volumes), encoder(volumes, mirror_image(volumes)))
    assert not torch.allclose(encoder(volumes), encoder(volumes, volumes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_symmetry_attention_survives_half_precision(dtype: torch.dtype) -> None:
    block = SymmetryAttention(48).eval()
    features, mirrored = torch.randn(2, 48, 3, 3, 3), torch.randn(2, 48, 3, 3, 3)
    full = block(features, mirrored)
    half = block.to(dtype)(features.to(dtype), mirrored.to(dtype))
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)
    constant = torch.full((1, 48, 3, 3, 3), 0.5, dtype=dtype)  # no variance: the epsilon is all there is
    assert torch.isfinite(block(constant, constant)).all()


def test_more_layers_start_from_different_weights() -> None:
    first, second = SymmetryAttention(24, layers=2).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("kind", ["interpolated", "transposed", "large_kernel"])
def test_decoders_return_to_the_encoders_grid(kind: str) -> None:
    encoder = build("swin", width=0.25)
    decoder = ReconstructionDecoder(encoder.embedding_dim, out_channels=2, kind=kind)
    volume = decoder(encoder.feature_map(torch.randn(1, 1, 33, 40, 23)), (33, 40, 23))
    assert volume.shape == (1, 2, 33, 40, 23)
    with pytest.raises(ValueError, match=r"do not reach the grid \(65, 32, 32\)"):
        decoder(torch.zeros(1, 192, 2, 1, 1), (65, 32, 32))


def test_a_decoder_cuts_what_lies_outside_the_volume_as_soon_as_it_can() -> None:
    features, grid = torch.randn(1, 192, 2, 2, 1), (40, 33, 32)
    local = ReconstructionDecoder(192, kind="transposed")  # each of its voxels depends on one feature alone
    torch.testing.assert_close(local(features, grid), local.layers(features)[:, :, :40, :33, :32])
    whole = ReconstructionDecoder(192, kind="interpolated")
    torch.testing.assert_close(whole(features, (64, 64, 32)), whole.layers(features))
    normed: list[tuple[int, ...]] = []
    for module in whole.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.register_forward_hook(lambda _, given, __: normed.append(tuple(given[0].shape[2:])))
    whole(features, grid)
    assert normed == [(2, 2, 1), (3, 3, 2), (5, 5, 4), (10, 9, 8), (20, 17, 16)]


def test_width_must_suit_the_heads() -> None:
    with pytest.raises(UserError, match=r"width 0\.3 must be a multiple of 1/4"):
        build("swin", width=0.3)


def test_unknown_choices_are_answered() -> None:
    with pytest.raises(UserError, match=r"unknown merging 'v1'; known: legacy, v2"):
        build("swin", width=0.25, merging="v1")
    with pytest.raises(ValueError, match="pooling must be 'mean' or 'corner', got 'max'"):
        build("swin", width=0.25, pooling="max")(torch.zeros(1, 1, 32, 32, 32))
