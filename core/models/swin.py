"""3D Swin encoders, plain and symmetry-aware. B subjects, E embedding, T tokens; x, y, z the token grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from torch import nn
from torch.nn import functional as F

from core.errors import UserError
from core.lookup import look_up
from core.volumes.images.mirror import mirror_image

Pooling = Literal["mean", "corner"]


class LegacyPatchMerging(PatchMergingV2):
    """Patch merging as sa-swin's copy of MONAI had it, for weights that were trained with it.

    Of the eight sub-lattices of the token grid it takes two twice and two never. (MONAI's present "merging"
    takes all eight, in another order than version 2.)
    """

    SUB_LATTICES = (
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1),
    )  # fmt: skip

    def forward(self, tokens_bxyze: torch.Tensor) -> torch.Tensor:
        """(B, x, y, z, E) -> (B, x/2, y/2, z/2, 2E), odd grids padded with zeros at the far side."""
        x, y, z = tokens_bxyze.shape[1:4]
        even = F.pad(tokens_bxyze, (0, 0, 0, z % 2, 0, y % 2, 0, x % 2))
        merged = torch.cat([even[:, i::2, j::2, k::2] for i, j, k in self.SUB_LATTICES], dim=-1)
        reduced: torch.Tensor = self.reduction(self.norm(merged))
        return reduced


Merging = Literal["v2", "legacy"]
MERGING: Mapping[str, type[nn.Module]] = {"v2": PatchMergingV2, "legacy": LegacyPatchMerging}


class SwinEncoder(nn.Module):
    """MONAI's 3D Swin transformer, one vector per volume: (B, C, X, Y, Z) -> (B, embedding_dim)."""

    def __init__(
        self,
        in_channels: int,
        width: float,
        patch: int,
        window: int,
        pooling: Pooling,
        merging: Merging,
        checkpointing: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.transformer = SwinTransformer(
            in_chans=in_channels,
            embed_dim=feature_size(width),
            window_size=(window, window, window),
            patch_size=(patch, patch, patch),
            depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24),
            downsample=look_up(MERGING, merging, "merging"),
            use_checkpoint=checkpointing,
            drop_path_rate=drop_path,
        )
        self.embedding_dim = 16 * feature_size(width)

    def feature_map(self, volumes: torch.Tensor) -> torch.Tensor:
        """Last stage, normalised over channels: (B, C, X, Y, Z) -> (B, E, x, y, z)."""
        features_bexyz: torch.Tensor = self.transformer(volumes)[-1]
        return features_bexyz

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> (B, embedding_dim)."""
        return pool(self.feature_map(volumes), self.pooling)


def feature_size(width: float) -> int:
    """Channels of Swin's first stage, 48 x width; its 3, 6, 12 and 24 heads need a multiple of 12."""
    size = round(48 * width)
    if size < 12 or size % 12 or size != 48 * width:
        raise UserError(f"width {width} must be a multiple of 1/4 for Swin: 48 x width in steps of 12")
    return size


def pool(features_bexyz: torch.Tensor, pooling: Pooling, token: int = 0) -> torch.Tensor:
    """(B, E, x, y, z) -> (B, E): the mean over tokens, or one of the first, as published (spec.md C.2)."""
    if pooling == "corner":
        return features_bexyz.flatten(2)[:, :, token]
    if pooling == "mean":
        return features_bexyz.mean(dim=(2, 3, 4))
    raise ValueError(f"pooling must be 'mean' or 'corner', got '{pooling}'")


class SymmetryAttention(nn.Module):
    """Cross-attention between a brain and its mirror image, over all tokens of the last stage.

    a = LN(x + SelfAttention(x)); b = LN(a + CrossAttention(a, mirror)); y = LN(b + FFN(b)): torch's own
    `TransformerDecoderLayer`, with the mirror image as its memory and fused attention. Against the published
    BERT layer (spec.md C.2; 9,451,776 parameters with E = 768) it has one more dropout, inside the FFN, and
    a layer-norm epsilon of 1e-5, which half precision can represent. No position code: the block follows any
    reordering of either side's tokens.

    Args:
        embedding_dim: E, a multiple of `heads`.
        layers: how many blocks, each attending to the same mirror features.
        heads: attention heads.
        dropout: on attention weights, branches and inside the FFN.
        pre_norm: LN before each branch instead of after the sum, which trains without warm-up
            (Xiong et al. 2020).
    """

    def __init__(
        self,
        embedding_dim: int,
        layers: int = 1,
        heads: int = 12,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                embedding_dim,
                heads,
                dim_feedforward=4 * embedding_dim,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=pre_norm,
            )
            for _ in range(layers)
        )

    def forward(self, features_bexyz: torch.Tensor, mirrored_bexyz: torch.Tensor) -> torch.Tensor:
        """(B, E, x, y, z) of a volume and of its mirror image -> (B, E, x, y, z) of the volume."""
        tokens_bte = features_bexyz.flatten(2).transpose(1, 2)
        memory_bte = mirrored_bexyz.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens_bte = layer(tokens_bte, memory_bte)
        return tokens_bte.transpose(1, 2).reshape(features_bexyz.shape)


class SymmetrySwinEncoder(nn.Module):
    """One Swin for a brain and its mirror image, then `SymmetryAttention` from the one to the other."""

    layers_in_order = (
        "swin.transformer.patch_embed.",
        *(f"swin.transformer.layers{stage}." for stage in range(1, 5)),
        "attention.",
    )
    """What the names of its parameters begin with, from the first layer to the last."""

    def __init__(self, swin: SwinEncoder, attention: SymmetryAttention) -> None:
        super().__init__()
        self.swin = swin
        self.attention = attention
        self.embedding_dim = swin.embedding_dim

    def feature_maps(
        self, volumes: torch.Tensor, mirrored: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, E, x, y, z) of volumes and of their mirror images, before either has seen the other.

        Args:
            volumes: (B, C, X, Y, Z) in RAS order.
            mirrored: their left-right mirror images; those about the middle of each head if absent.
        """
        mirrored = mirror_image(volumes) if mirrored is None else mirrored
        both = self.swin.feature_map(torch.cat([volumes, mirrored]))
        return both[: len(volumes)], both[len(volumes) :]

    def feature_map(self, volumes: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """Features that have seen the mirror image: (B, C, X, Y, Z) -> (B, E, x, y, z)."""
        features_bexyz: torch.Tensor = self.attention(*self.feature_maps(volumes, mirrored))
        return features_bexyz

    def forward(self, volumes: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, X, Y, Z), with its mirror image, which is made if absent -> (B, E)."""
        return pool(self.feature_map(volumes, mirrored), self.swin.pooling)


def swin(
    in_channels: int = 1,
    width: float = 1.0,
    patch: int = 2,
    window: int = 7,
    pooling: Pooling = "mean",
    merging: Merging = "v2",
    checkpointing: bool = False,
    drop_path: float = 0.0,
) -> SwinEncoder:
    """3D Swin of sa-swin: 48 to 768 channels, depths 2, window 7, patch 2; 8,062,002 parameters.

    Args:
        in_channels: channels of the volumes.
        width: multiplies channel counts, in steps of 1/4.
        patch: side of a patch in voxels; 2 or 4 as published.
        window: side of an attention window in patches.
        pooling: "mean" over tokens, or the published "corner" token.
        merging: "v2", or "legacy", which repeats two of eight sub-lattices, for published weights.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        drop_path: probability of leaving a block out in training (Huang et al. 2016), rising from 0 with its depth.
    """
    return SwinEncoder(in_channels, width, patch, window, pooling, merging, checkpointing, drop_path)


def swin_symmetry(
    in_channels: int = 1,
    width: float = 1.0,
    patch: int = 2,
    window: int = 7,
    pooling: Pooling = "mean",
    merging: Merging = "v2",
    checkpointing: bool = False,
    layers: int = 1,
    dropout: float = 0.1,
    pre_norm: bool = False,
    drop_path: float = 0.0,
) -> SymmetrySwinEncoder:
    """Symmetry-aware Swin of sa-swin: `swin` and `SymmetryAttention`; 17,513,778 parameters."""
    encoder = SwinEncoder(in_channels, width, patch, window, pooling, merging, checkpointing, drop_path)
    attention = SymmetryAttention(encoder.embedding_dim, layers, dropout=dropout, pre_norm=pre_norm)
    return SymmetrySwinEncoder(encoder, attention)
