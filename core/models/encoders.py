"""Volume encoders: (B, C, X, Y, Z) -> (B, embedding_dim)."""

from __future__ import annotations

from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck

from core.errors import UserError


class ResNetEncoder(ResNet):
    """MONAI's residual network without a classifier, which knows the length of its embedding.

    (B, C, X, Y, Z) float -> (B, embedding_dim). In training mode every batch normalisation needs more than
    one value per channel, so volumes of less than 33 voxels a side need a batch of at least two.
    """

    embedding_dim: int


def _resnet(
    block: type[ResNetBlock] | type[ResNetBottleneck], layers: list[int], in_channels: int, width: float
) -> ResNetEncoder:
    """He et al. 2016 in 3D, as in BrainAge_DynLocRep: 7³ stem of stride 2, max-pool, stages of 64 to 512."""
    planes = [int(channels * width) for channels in (64, 128, 256, 512)]
    if planes[0] < 1:
        raise UserError(
            f"width {width} leaves no channels in the first stage (64 x width); use at least 1/64"
        )
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
    return _resnet(ResNetBottleneck, [3, 4, 6, 3], in_channels, width)


def resnet101(in_channels: int = 1, width: float = 1.0) -> ResNetEncoder:
    """ResNet-101 (bottlenecks, expansion 4), 85,201,216 parameters at width 1 with one channel."""
    return _resnet(ResNetBottleneck, [3, 4, 23, 3], in_channels, width)
