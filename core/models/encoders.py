"""Convolutional encoders of volumes: (B, C, X, Y, Z) -> (B, embedding_dim)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import nn
from torch.nn import functional as F

from core.errors import UserError

BOTTLENECK_LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3], 200: [3, 24, 36, 3]}


class ResNetEncoder(ResNet):
    """MONAI's residual network without a classifier, which knows the length of its embedding.

    (B, C, X, Y, Z) float -> (B, embedding_dim). In training mode every batch normalisation needs more than
    one value per channel, so volumes of less than 33 voxels a side need a batch of at least two.
    """

    embedding_dim: int

    def feature_map(self, volumes: torch.Tensor) -> torch.Tensor:
        """The last stage: (B, C, X, Y, Z) -> (B, E, x, y, z)."""
        features = self.act(self.bn1(self.conv1(volumes)))
        if not self.no_max_pool:
            features = self.maxpool(features)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return cast(torch.Tensor, features)

    def _downsample_basic_block(
        self, x: torch.Tensor, planes: int, stride: int, spatial_dims: int = 3
    ) -> torch.Tensor:
        """Shortcut A: every stride-th voxel, missing channels zero. MONAI's own stops the gradient here."""
        every = x[:, :, ::stride, ::stride, ::stride]
        return F.pad(every, (0, 0) * spatial_dims + (0, planes - every.shape[1]))


def _planes(first: int, width: float) -> list[int]:
    planes = [int(first * 2**stage * width) for stage in range(4)]
    if planes[0] < 1:
        raise UserError(
            f"width {width} leaves no channels in the first stage ({first} x width); use {1 / first} or more"
        )
    return planes


def _resnet(
    block: type[ResNetBlock] | type[ResNetBottleneck], layers: list[int], in_channels: int, width: float
) -> ResNetEncoder:
    """He et al. 2016 in 3D, as in BrainAge_DynLocRep: 7³ stem of stride 2, max-pool, stages of 64 to 512."""
    planes = _planes(64, width)
    encoder = ResNetEncoder(
        block,
        layers,
        planes,
        spatial_dims=3,
        n_input_channels=in_channels,
        conv1_t_size=7,
        conv1_t_stride=2,
        shortcut_type="B",
        feed_forward=False,
        bias_downsample=False,
    )
    encoder.embedding_dim = planes[-1] * block.expansion
    return encoder


def resnet18(in_channels: int = 1, width: float = 1.0) -> ResNetEncoder:
    """ResNet-18, 33,160,000 parameters at width 1 with one channel; `width` multiplies channel counts."""
    return _resnet(ResNetBlock, [2, 2, 2, 2], in_channels, width)


def resnet34(in_channels: int = 1, width: float = 1.0) -> ResNetEncoder:
    """ResNet-34, 63,469,632 parameters at width 1 with one channel."""
    return _resnet(ResNetBlock, [3, 4, 6, 3], in_channels, width)


def resnet50(in_channels: int = 1, width: float = 1.0) -> ResNetEncoder:
    """ResNet-50 (bottlenecks, expansion 4), 46,155,072 parameters at width 1 with one channel."""
    return _resnet(ResNetBottleneck, BOTTLENECK_LAYERS[50], in_channels, width)


def resnet101(in_channels: int = 1, width: float = 1.0) -> ResNetEncoder:
    """ResNet-101 (bottlenecks, expansion 4), 85,201,216 parameters at width 1 with one channel."""
    return _resnet(ResNetBottleneck, BOTTLENECK_LAYERS[101], in_channels, width)


class ResNeXtBottleneck(ResNetBottleneck):
    """Bottleneck of Xie et al. 2017: its 3³ convolution works in `cardinality` separate groups."""

    expansion = 2

    def __init__(self, in_planes: int, planes: int, cardinality: int, stride: int = 1, **rest: Any) -> None:
        super().__init__(in_planes, planes, stride=stride, **rest)
        inner = cardinality * planes // 32
        self.conv1 = nn.Conv3d(in_planes, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(inner)
        self.conv2 = nn.Conv3d(
            inner, inner, kernel_size=3, stride=stride, padding=1, groups=cardinality, bias=False
        )
        self.bn2 = nn.BatchNorm3d(inner)
        self.conv3 = nn.Conv3d(inner, planes * self.expansion, kernel_size=1, bias=False)


def _resnext(
    depth: int, in_channels: int, width: float, cardinality: int, shortcut: Literal["A", "B"]
) -> ResNetEncoder:
    """ResNeXt of brainMRI: 7³ stem that keeps the slice axis whole, no max-pool, stages of 128 to 1024.

    Its arrays are (slice, row, column), ours (X, Y, Z) with slices along Z: stride (1, 2, 2) is (2, 2, 1).
    """
    planes = _planes(128, width)
    if planes[0] % 32:
        raise UserError(f"width {width} must be a multiple of 1/4 for ResNeXt: 128 x width in groups of 32")
    # MONAI makes the blocks; a partial is how the cardinality gets there.
    block: Any = partial(ResNeXtBottleneck, cardinality=cardinality)
    block.expansion = ResNeXtBottleneck.expansion
    encoder = ResNetEncoder(
        block,
        BOTTLENECK_LAYERS[depth],
        planes,
        spatial_dims=3,
        n_input_channels=in_channels,
        conv1_t_size=7,
        # MONAI means a tuple of any length.
        conv1_t_stride=(2, 2, 1),  # type: ignore[arg-type]
        no_max_pool=True,
        shortcut_type=shortcut,
        feed_forward=False,
        bias_downsample=False,
    )
    encoder.embedding_dim = planes[-1] * ResNeXtBottleneck.expansion
    return encoder


def resnext50(
    in_channels: int = 1, width: float = 1.0, cardinality: int = 32, shortcut: Literal["A", "B"] = "B"
) -> ResNetEncoder:
    """ResNeXt-50, 25,868,416 parameters as published (25,870,465 with a linear layer to one number)."""
    return _resnext(50, in_channels, width, cardinality, shortcut)


def resnext101(
    in_channels: int = 1, width: float = 1.0, cardinality: int = 32, shortcut: Literal["A", "B"] = "B"
) -> ResNetEncoder:
    """ResNeXt-101, 47.5 million parameters as published."""
    return _resnext(101, in_channels, width, cardinality, shortcut)


def resnext152(
    in_channels: int = 1, width: float = 1.0, cardinality: int = 32, shortcut: Literal["A", "B"] = "B"
) -> ResNetEncoder:
    """ResNeXt-152, 65.4 million parameters as published."""
    return _resnext(152, in_channels, width, cardinality, shortcut)


def resnext200(
    in_channels: int = 1, width: float = 1.0, cardinality: int = 32, shortcut: Literal["A", "B"] = "B"
) -> ResNetEncoder:
    """ResNeXt-200, 70.5 million parameters as published."""
    return _resnext(200, in_channels, width, cardinality, shortcut)


class SFCNEncoder(nn.Module):
    """The convolutions of the simple fully convolutional network (Peng et al. 2021), averaged over space.

    Five (conv 3³, batch norm, max-pool, ReLU), then a 1³ convolution to 64 channels: the field's light
    baseline. Pools round up, which changes nothing on the published 160x192x160 and lets grids of less than
    32 voxels through. (B, C, X, Y, Z) -> (B, embedding_dim).
    """

    def __init__(self, in_channels: int, width: float) -> None:
        super().__init__()
        channels = [in_channels, *(max(1, int(count * width)) for count in (32, 64, 128, 256, 256))]
        self.embedding_dim = max(1, int(64 * width))
        self.stages = nn.Sequential(
            *(_sfcn_stage(before, after) for before, after in pairwise(channels)),
            nn.Sequential(
                nn.Conv3d(channels[-1], self.embedding_dim, kernel_size=1),
                nn.BatchNorm3d(self.embedding_dim),
                nn.ReLU(inplace=True),
            ),
        )

    def feature_map(self, volumes: torch.Tensor) -> torch.Tensor:
        """The last stage: (B, C, X, Y, Z) -> (B, E, x, y, z)."""
        features_bexyz: torch.Tensor = self.stages(volumes)
        return features_bexyz

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> (B, embedding_dim)."""
        return self.feature_map(volumes).mean(dim=(2, 3, 4))


def _sfcn_stage(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(before, after, kernel_size=3, padding=1),
        nn.BatchNorm3d(after),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.ReLU(inplace=True),
    )


def sfcn(in_channels: int = 1, width: float = 1.0) -> SFCNEncoder:
    """Simple fully convolutional network, 2,950,336 parameters at width 1, before an age head."""
    return SFCNEncoder(in_channels, width)
