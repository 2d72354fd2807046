"""Convolutional segmenters: anisotropic 3D residual U-Net (system B), 2D group-norm U-Net (system D)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import UserError
from core.lookup import did_you_mean


class ResUNet(nn.Module):
    """3D residual U-Net of brainMRI: (B, C, X, Y, Z) -> logits (B, classes, X, Y, Z), any grid of 16 or more.

    Four levels are pooled in X and Y only; slices lie along Z, which stays whole.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _ResidualBlock(before, after) for before, after in pairwise((in_channels, *widths))
        )
        self.pool = nn.MaxPool3d((2, 2, 1))
        self.up = nn.ModuleList(_doubling(below, above) for above, below in pairwise(widths))
        self.merge = nn.ModuleList(_ResidualBlock(2 * above, above) for above in widths[:-1])
        self.out = nn.Conv3d(widths[0], out_channels, kernel_size=1)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> logits (B, classes, X, Y, Z)."""
        features = [self.down[0](volumes)]
        for block in self.down[1:]:
            features.append(block(self.pool(features[-1])))
        x = features.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            skip = features.pop()
            # With the size of the skip, odd sides come back as they were.
            x = F.relu(up(x, output_size=skip.shape[2:]))
            x = merge(torch.cat([skip, x], dim=1))
        logits: torch.Tensor = self.out(x)
        return logits


class _ResidualBlock(nn.Module):
    """(conv 3³, batch norm, ReLU) twice, plus a 1³ convolution of the input, added after the last ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv3d(before, after, kernel_size=3, padding=1),
            nn.BatchNorm3d(after),
            nn.ReLU(inplace=True),
            nn.Conv3d(after, after, kernel_size=3, padding=1),
            nn.BatchNorm3d(after),
            nn.ReLU(inplace=True),
        )
        self.skip = nn.Conv3d(before, after, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.convolutions(x) + self.skip(x)
        return output


def _doubling(below: int, above: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(below, above, kernel_size=(4, 4, 1), stride=(2, 2, 1), padding=(1, 1, 0))


def res_unet(in_channels: int = 1, out_channels: int = 4, width: float = 1.0) -> ResUNet:
    """Anisotropic 3D ResUNet, 24,322,148 parameters as published: one channel, background, CSF, GM and WM."""
    widths = tuple(max(1, int(channels * width)) for channels in (32, 64, 128, 256, 512))
    return ResUNet(in_channels, out_channels, widths)


GroupNormHead = Literal["segmentation", "dense", "global"]


class GroupNormEncoder(nn.Module):
    """Encoder of the 2D U-Net: (B, C, X, Y) -> six maps, from the full grid to a 32nd of it."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _two_convolutions(before, after) for before, after in pairwise((in_channels, *widths))
        )
        self.embedding_dim = widths[-1]

    def forward(self, slices: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, X, Y) -> maps (B, width, X / 2^level, Y / 2^level) of levels 0 to 5."""
        maps = [self.stages[0](slices)]
        for stage in self.stages[1:]:
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        return maps


class GroupNormDecoder(nn.Module):
    """The lowest `levels` steps up; five give the full grid, three a quarter of it (partial decoder)."""

    def __init__(self, widths: tuple[int, ...], levels: int) -> None:
        super().__init__()
        steps = [(below, above) for above, below in pairwise(widths)][::-1][:levels]
        self.up = nn.ModuleList(_convolution(below, above, kernel=2) for below, above in steps)
        self.merge = nn.ModuleList(_two_convolutions(2 * above, above) for _, above in steps)
        self.out_channels = steps[-1][1]

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """The encoder's maps -> (B, out_channels, X', Y')."""
        x = maps[-1]
        for up, merge, skip in zip(self.up, self.merge, maps[-2::-1], strict=False):
            x = up(F.interpolate(x, size=skip.shape[2:], mode="nearest"))
            x = merge(torch.cat([skip, x], dim=1))
        return x


class GroupNormUNet(nn.Module):
    """2D U-Net of system D with one of its heads.

    "segmentation": logits (B, classes, X, Y); "dense": local features (B, D, X', Y') for constrained
    contrastive learning; "global": one vector (B, 128), from the encoder alone. Encoder and decoder have the
    same names under every head, so that weights move from one to the next.
    """

    def __init__(self, encoder: GroupNormEncoder, decoder: GroupNormDecoder | None, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.head = head

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y), 32 or more a side -> the head's output."""
        maps = self.encoder(slices)
        output: torch.Tensor = self.head(maps[-1] if self.decoder is None else self.decoder(maps))
        return output


def groupnorm_unet(
    in_channels: int = 2,
    out_channels: int = 4,
    width: float = 1.0,
    head: GroupNormHead = "segmentation",
    levels: int = 5,
    dimension: int = 64,
    grid: tuple[int, int] = (160, 160),
) -> GroupNormUNet:
    """2D group-norm U-Net of contrast-guided pre-training (spec.md D.2).

    Args:
        in_channels: contrasts.
        out_channels: classes, for head "segmentation".
        width: multiplies channel counts, in steps of 1/4.
        head: 2,095,392 parameters as "segmentation", 2,098,224 as "dense" (2,056,064 with levels 3),
            4,293,568 as "global".
        levels: steps of the decoder, 1 to 5; "segmentation" needs all, "global" has none.
        dimension: length D of dense features.
        grid: size of the slices, which fixes the first layer of head "global".
    """
    if width <= 0 or (4 * width) % 1:
        raise UserError(f"width {width} must be a multiple of 1/4 for groupnorm_unet: groups hold 4 channels")
    if head not in get_args(GroupNormHead):
        raise UserError(f"unknown head '{head}'; {did_you_mean(head, get_args(GroupNormHead))}")
    if not 1 <= levels <= 5 or (head == "segmentation" and levels < 5):
        raise UserError(f"levels {levels} cannot serve head '{head}'; segmentation takes 5, dense 1 to 5")
    widths = tuple(int(channels * width) for channels in (16, 32, 64, 128, 128, 128))
    encoder = GroupNormEncoder(in_channels, widths)
    decoder = None if head == "global" else GroupNormDecoder(widths, levels)
    if decoder is None:
        last = _global_head(widths[-1] * (grid[0] // 32) * (grid[1] // 32))
    elif head == "dense":
        last = _dense_head(decoder.out_channels, dimension)
    else:
        last = _segmentation_head(decoder.out_channels, out_channels)
    model = GroupNormUNet(encoder, decoder, last)
    model.apply(_initialise)
    return model


def _initialise(module: nn.Module) -> None:
    """He et al. 2015, drawn anew for each layer."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _SameSize(nn.Conv2d):
    """A convolution whose output is as large as its input; of an even kernel the far side has a zero more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y) -> (B, C', X, Y)."""
        near = [(side - 1) // 2 for side in self.kernel_size]
        far = [side // 2 for side in self.kernel_size]
        return super().forward(F.pad(x, (near[1], far[1], near[0], far[0])))


def _convolution(before: int, after: int, kernel: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        _SameSize(before, after, kernel, bias=bias)
        if kernel % 2 == 0
        else nn.Conv2d(before, after, kernel, padding="same", bias=bias),
        nn.GroupNorm(max(1, after // 4), after),
        nn.ReLU(inplace=True),
    )


def _two_convolutions(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(_convolution(before, after, kernel=3), _convolution(after, after, kernel=3))


def _segmentation_head(before: int, classes: int) -> nn.Sequential:
    return nn.Sequential(_convolution(before, before, kernel=3), nn.Conv2d(before, classes, 1, bias=False))


def _dense_head(before: int, dimension: int) -> nn.Sequential:
    return nn.Sequential(
        _convolution(before, dimension, kernel=1, bias=False), nn.Conv2d(dimension, dimension, 1, bias=False)
    )


def _global_head(features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 128, bias=False)
    )
