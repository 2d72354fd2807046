"""Segmenters as networks of dense features, for contrasts of patches, and of whole images beside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from core.models.heads import ProjectionHead
from core.models.segmenter import Segmenter, build_segmenter
from core.models.settings import GroupNormUNetSettings, SegmenterSettings
from core.models.unet import GroupNormUNet, groupnorm_unet

VECTOR = 128
"""Length of the vector of a whole image."""
SLICES_TOGETHER = 32
"""Slices of whole volumes in one call of a network in 2D, where nothing is trained."""


class DenseModel(nn.Module):
    """A network whose last layer gives features of voxels, and maybe a vector of the whole image.

    Its encoder, decoder and head have the places that a segmenter of the same kind gives them, so that a segmentation
    can begin with them.

    Args:
        network: a segmenter with as many classes as features, or the 2D U-Net with its dense head.
        width: channels of what the vector of an image is made of: the last map of the encoder in 2D, features in 3D.
        is_global: whether there is such a vector.
    """

    def __init__(self, network: Segmenter | GroupNormUNet, width: int, *, is_global: bool) -> None:
        super().__init__()
        self.in_slices = isinstance(network, GroupNormUNet)
        if isinstance(network, GroupNormUNet):
            self.encoder, self.decoder, self.head = network.encoder, network.decoder, network.head
            self.parts: dict[str, tuple[str, ...]] = {
                name: (name,) for name in ("encoder", "decoder", "head")
            }
        else:
            self.whole = network
            self.parts = {
                part: tuple(f"whole.{name}" for name in names) for part, names in network.parts.items()
            }
        self.vector = ProjectionHead(width, VECTOR) if is_global else None

    def forward(self, images: torch.Tensor, kind: Literal["dense", "global", "encoder"]) -> torch.Tensor:
        """Images (N, C, H, W) or volumes (N, C, X, Y, Z) -> features (N, D, …), or unit vectors (N, 128).

        encoder: the deepest features of the encoder in 2D; of volumes the same as dense.
        """
        found = self._forward(images, kind)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Parallel training wants a gradient of every parameter in every step.
            return found + 0 * torch.stack([each.sum() for each in self.parameters()]).sum()
        return found

    def of_volumes(
        self, volumes_bcxyz: torch.Tensor, kind: Literal["dense", "encoder"], together: int = SLICES_TOGETHER
    ) -> torch.Tensor:
        """The features (B, D, x, y, Z) of whole volumes, in 2D of slices across Z, `together` in one call."""
        if not self.in_slices:
            features: torch.Tensor = self(volumes_bcxyz, kind)
            return features
        slices_ncxy = volumes_bcxyz.movedim(-1, 1).flatten(0, 1)
        found = torch.cat([self(part, kind) for part in slices_ncxy.split(together)])
        whole: torch.Tensor = found.unflatten(0, (len(volumes_bcxyz), -1)).movedim(1, -1)
        return whole

    def _forward(self, images: torch.Tensor, kind: str) -> torch.Tensor:
        if self.in_slices:
            maps = self.encoder(_padded(images))
            if kind == "encoder":
                return _cut(maps[-1], images)
            if kind == "global":
                assert self.vector is not None
                vector: torch.Tensor = self.vector(maps[-1].flatten(2).mean(dim=2))
                return vector
            decoder: nn.Module = self.decoder  # type: ignore[assignment]
            features: torch.Tensor = self.head(decoder(maps))
            return _cut(features, images)
        dense: torch.Tensor = self.whole(images)
        if dense.ndim == images.ndim + 1:
            # With deep supervision in training: the last depth alone.
            dense = dense[:, 0]
        if kind != "global":
            return dense
        assert self.vector is not None
        of_volume: torch.Tensor = self.vector(dense.flatten(2).mean(dim=2))
        return of_volume


def build_dense_model(
    settings: SegmenterSettings, in_channels: int, dimension: int, levels: int, *, is_global: bool
) -> DenseModel:
    """The network of these settings with `dimension` features; `levels` of the decoder act in 2D only."""
    if isinstance(settings, GroupNormUNetSettings):
        network = groupnorm_unet(
            in_channels, width=settings.width, head="dense", levels=levels, dimension=dimension
        )
        return DenseModel(network, network.encoder.embedding_dim, is_global=is_global)
    return DenseModel(build_segmenter(settings, in_channels, dimension), dimension, is_global=is_global)


def mean_inside(features_bdxyz: torch.Tensor, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
    """The mean features (B, D) of the brain; the features may be coarser than the volumes (B, C, X, Y, Z)."""
    inside_b1xyz = (volumes_bcxyz != 0).any(dim=1, keepdim=True).float()
    coarse_b1xyz = nn.functional.interpolate(inside_b1xyz, size=features_bdxyz.shape[2:], mode="nearest")
    total_bd = (features_bdxyz * coarse_b1xyz).flatten(2).sum(dim=2)
    return total_bd / coarse_b1xyz.flatten(1).sum(dim=1).clamp(min=1)[:, None]


def _padded(images_nchw: torch.Tensor) -> torch.Tensor:
    """Zeros at the far sides, so that both are multiples of 32."""
    h, w = images_nchw.shape[2:]
    return nn.functional.pad(images_nchw, (0, -w % 32, 0, -h % 32))


def _cut(features_ndhw: torch.Tensor, images_nchw: torch.Tensor) -> torch.Tensor:
    """The part of the features that is of the image, where the decoder gives a coarser grid a part of it, too."""
    h, w = images_nchw.shape[2:]
    factor = (h + -h % 32) // features_ndhw.shape[2]
    return features_ndhw[:, :, : -(-h // factor), : -(-w // factor)]
