"""Swin UNETR segmenters (system C), plain and symmetry-aware."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from monai.networks.nets.swin_unetr import SwinUNETR

from core.lookup import look_up
from core.models.swin import MERGING, Merging, SymmetryAttention, feature_size
from core.volumes.images.mirror import mirror_image


class _Settings(TypedDict):
    """What MONAI's Swin UNETR is told."""

    in_channels: int
    out_channels: int
    feature_size: int
    window_size: int
    # A class, which MONAI annotates as a module.
    downsample: Any
    use_checkpoint: bool


class SymmetrySwinUNETR(SwinUNETR):
    """Swin UNETR whose deepest features attend to those of the mirror image."""

    def __init__(self, attention: SymmetryAttention, **settings: Unpack[_Settings]) -> None:
        super().__init__(**settings)
        self.attention = attention

    def forward(self, volumes: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, X, Y, Z), sides multiples of 32 -> logits (B, classes, X, Y, Z).

        Args:
            volumes: whole volumes in RAS order, or windows of them.
            mirrored: the mirror image of each; needed for windows, whose counterpart lies on the other side
                (`core.evaluation.sliding_window`); made about the middle of each head if absent.
        """
        self._check_input_size(volumes.shape[2:])
        mirrored = mirror_image(volumes) if mirrored is None else mirrored
        both = self.swinViT(torch.cat([volumes, mirrored]), self.normalize)
        patches, first, second, third, deepest = [stage[: len(volumes)] for stage in both]
        deepest = self.attention(deepest, both[-1][len(volumes) :])
        x = self.decoder5(self.encoder10(deepest), third)
        x = self.decoder4(x, self.encoder4(second))
        x = self.decoder3(x, self.encoder3(first))
        x = self.decoder2(x, self.encoder2(patches))
        logits: torch.Tensor = self.out(self.decoder1(x, self.encoder1(volumes)))
        return logits


def swin_unetr(
    in_channels: int = 4,
    out_channels: int = 3,
    width: float = 1.0,
    merging: Merging = "v2",
    checkpointing: bool = False,
    window: int = 7,
) -> SwinUNETR:
    """MONAI's Swin UNETR, 62,191,941 parameters as published: four contrasts, three tumour regions."""
    return SwinUNETR(**_settings(in_channels, out_channels, width, merging, checkpointing, window))


def swin_unetr_symmetry(
    in_channels: int = 4,
    out_channels: int = 3,
    width: float = 1.0,
    merging: Merging = "v2",
    checkpointing: bool = False,
    layers: int = 1,
    dropout: float = 0.1,
    pre_norm: bool = False,
    window: int = 7,
) -> SymmetrySwinUNETR:
    """Symmetry-aware Swin UNETR of sa-swin, 71,643,717 parameters as published."""
    attention = SymmetryAttention(16 * feature_size(width), layers, dropout=dropout, pre_norm=pre_norm)
    return SymmetrySwinUNETR(
        attention, **_settings(in_channels, out_channels, width, merging, checkpointing, window)
    )


def _settings(
    in_channels: int, out_channels: int, width: float, merging: Merging, checkpointing: bool, window: int
) -> _Settings:
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "feature_size": feature_size(width),
        "window_size": window,
        "downsample": look_up(MERGING, merging, "merging"),
        "use_checkpoint": checkpointing,
    }
