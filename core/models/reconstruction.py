"""Decoders that paint a volume back from the last feature map: (B, E, x, y, z) -> (B, C, X, Y, Z)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from core.errors import UserError
from core.models.settings import ModelSettings, ResNeXtSettings

ReconstructionKind = Literal["interpolated", "transposed", "large_kernel"]


def check_doublings(model: ModelSettings, task: str) -> None:
    """Refuse an encoder whose features are not 32 times coarser than the volume, which a task paints back."""
    if isinstance(model, ResNeXtSettings) or getattr(model, "patch", 2) != 2:
        raise UserError(
            f"{task} paints a volume in five doublings, and the features of {model.name} here are not 32 times "
            "coarser: use a ResNet, sfcn, or a Swin with model.patch=2"
        )


class ReconstructionDecoder(nn.Module):
    """Five doublings of the grid, from the features of a patch-2 Swin back to its input (Swin UNETR).

    Args:
        embedding_dim: E, a multiple of 16.
        out_channels: channels of the volume.
        kind: "interpolated": five times conv 3³, instance norm, leaky ReLU, trilinear doubling, then a 1³
            convolution (the published choice; 10,638,385 parameters with E = 768); "transposed": five 2³
            transposed convolutions; "large_kernel": one of 32³ with stride 32.
    """

    def __init__(
        self, embedding_dim: int, out_channels: int = 1, kind: ReconstructionKind = "interpolated"
    ) -> None:
        super().__init__()
        if embedding_dim % 16:
            raise UserError(
                f"a reconstruction decoder halves the channels of the features four times, and {embedding_dim} is no "
                "multiple of 16; use another model.width"
            )
        self.kind = kind
        self.layers = _decoder(embedding_dim, out_channels, kind)

    def forward(self, features_bexyz: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """(B, E, x, y, z) -> (B, C, X, Y, Z) of `grid`, which must not exceed 32 times the features' grid.

        An encoder pads odd grids at their far side, so that is where the volume is cut: after every doubling, for
        what lies outside costs time (at 40 voxels three quarters of 64) and would count in the instance norm.

        Raises:
            UserError: "interpolated" with features of one voxel, which instance norm would make 0.
        """
        if self.kind == "interpolated" and features_bexyz[0, 0].numel() == 1:
            raise UserError(
                f"a volume of {' x '.join(map(str, grid))} voxels leaves one voxel of features, which the decoder "
                "'interpolated' cannot normalise; use the decoder 'transposed', or larger volumes"
            )
        if any(32 * have < want for have, want in zip(features_bexyz.shape[2:], grid, strict=True)):
            raise ValueError(
                f"features of grid {tuple(features_bexyz.shape[2:])} do not reach the grid {grid}"
            )
        volume, coarse, factor = features_bexyz, 32, 32 if self.kind == "large_kernel" else 2
        for layer in self.layers if isinstance(self.layers, nn.Sequential) else [self.layers]:
            coarse = max(1, coarse // factor)
            x, y, z = (-(-side // coarse) for side in grid)
            volume = layer(volume)[:, :, :x, :y, :z]
        return volume


def _decoder(embedding_dim: int, out_channels: int, kind: ReconstructionKind) -> nn.Module:
    if kind == "large_kernel":
        return nn.ConvTranspose3d(embedding_dim, out_channels, kernel_size=32, stride=32)
    if kind == "transposed":
        channels = [embedding_dim // 2**stage for stage in range(5)] + [out_channels]
        return nn.Sequential(
            *(
                nn.ConvTranspose3d(before, after, kernel_size=2, stride=2)
                for before, after in pairwise(channels)
            )
        )
    if kind == "interpolated":
        channels = [embedding_dim // 2**stage for stage in range(5)] + [embedding_dim // 16]
        return nn.Sequential(
            *(_doubling(before, after) for before, after in pairwise(channels)),
            nn.Conv3d(channels[-1], out_channels, kernel_size=1),
        )
    raise ValueError(f"kind must be 'interpolated', 'transposed' or 'large_kernel', got '{kind}'")


def _doubling(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(before, after, kernel_size=3, padding=1),
        nn.InstanceNorm3d(after),
        nn.LeakyReLU(inplace=True),
        nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
    )
