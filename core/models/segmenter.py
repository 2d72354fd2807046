"""Every segmenter as one kind of module: volumes of any size in, scores of every voxel out.

A network may need sides that are multiples of a number, or see one slice at a time; volumes are padded with zeros at
their far sides for it, and scores cut again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn
from torch.nn import functional as F

from core.errors import UserError
from core.models.settings import SegmenterSettings
from core.models.swin_unetr import SymmetrySwinUNETR, swin_unetr, swin_unetr_symmetry
from core.models.unet import GroupNormUNet, ResUNet, groupnorm_unet, res_unet
from core.volumes.images.mirror import mirror_image


class Segmenter(nn.Module):
    """A network for volumes (B, C, X, Y, Z) of any size.

    Args:
        network: (B, C, X, Y, Z) -> scores (B, K, X, Y, Z), or in training (B, D, K, X, Y, Z) of D depths.
        multiples: what sides along X, Y and Z must be multiples of.
        least: how long they must be.
        in_slices: whether the network is for slices (B, C, X, Y), and sees every slice across Z by itself.
    """

    def __init__(
        self,
        network: nn.Module,
        multiples: tuple[int, int, int],
        least: tuple[int, int, int],
        *,
        in_slices: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.multiples, self.least, self.in_slices = network, multiples, least, in_slices
        self.parts = _parts(network)
        """The names of the modules that are its encoder, decoder and head."""
        stages = [f"swinViT.layers{stage}." for stage in range(1, 5)]
        is_symmetric = isinstance(network, SymmetrySwinUNETR)
        self.layers_in_order = ("swinViT.patch_embed.", *stages, "attention.") if is_symmetric else ()
        """Of an encoder of several modules: what names in it begin with, from the first layer to the last."""

    def forward(
        self, volumes_bcxyz: torch.Tensor, mirrored_bcxyz: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores (B, K, X, Y, Z); of a network with deep supervision in training (B, D, K, X, Y, Z).

        `mirrored_bcxyz`: the mirror images, of a network that attends to them; made of the volumes if absent.
        """
        x, y, z = volumes_bcxyz.shape[2:]
        beyond = [
            max(side + (-side) % of, least) - side
            for side, of, least in zip((x, y, z), self.multiples, self.least, strict=True)
        ]
        around = (0, beyond[2], 0, beyond[1], 0, beyond[0])
        padded = F.pad(volumes_bcxyz, around)
        scores: torch.Tensor
        if isinstance(self.network, SymmetrySwinUNETR):
            mirrored = mirror_image(volumes_bcxyz) if mirrored_bcxyz is None else mirrored_bcxyz
            scores = self.network(padded, F.pad(mirrored, around))
        elif self.in_slices:
            slices_ncxy = padded.movedim(-1, 1).flatten(0, 1)
            scores = self.network(slices_ncxy).unflatten(0, (len(padded), -1)).movedim(1, -1)
        else:
            scores = self.network(padded)
        return scores[..., :x, :y, :z]


def build_segmenter(settings: SegmenterSettings, in_channels: int, classes: int) -> Segmenter:
    """The segmenter of these settings for so many channels and classes, the background among them."""
    own = settings.model_dump(exclude={"name"})
    if settings.name == "res_unet":
        return Segmenter(res_unet(in_channels, classes, **own), (1, 1, 1), (16, 16, 1))
    if settings.name == "groupnorm_unet":
        return Segmenter(
            groupnorm_unet(in_channels, classes, **own), (32, 32, 1), (32, 32, 1), in_slices=True
        )
    if settings.name == "dynunet":
        return Segmenter(dynunet(in_channels, classes, **own), (8, 8, 8), (16, 16, 16))
    make = swin_unetr_symmetry if settings.name == "swin_unetr_symmetry" else swin_unetr
    # With one voxel in the deepest stage its instance norm would have nothing to normalise.
    return Segmenter(cast(Any, make)(in_channels, classes, **own), (32, 32, 32), (64, 32, 32))


def dynunet(
    in_channels: int = 1, out_channels: int = 4, width: float = 1.0, depths: int = 3, residual: bool = True
) -> DynUNet:
    """MONAI's reimplementation of the U-Net of nnU-Net (Isensee et al. 2021), with residual blocks in its encoder.

    Four stages of 32 to 256 channels, instance norm, leaky ReLU. In training it gives the scores of `depths` stages,
    each brought to the full grid, stacked: (B, D, K, X, Y, Z).
    """
    filters = [round(channels * width) for channels in (32, 64, 128, 256)]
    if min(filters) < 1:
        raise UserError(f"width {width} leaves no channels in the first stage; use {1 / 32} or more")
    kernels: Sequence[int] = (3, 3, 3, 3)
    return DynUNet(
        3,
        in_channels,
        out_channels,
        kernel_size=kernels,
        strides=(1, 2, 2, 2),
        upsample_kernel_size=(2, 2, 2),
        filters=filters,
        deep_supervision=depths > 1,
        deep_supr_num=max(1, depths - 1),
        res_block=residual,
    )


def _parts(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the modules of encoder, decoder and head; the rest, skips among it, is of the decoder."""
    known = {
        SwinUNETR: (("swinViT",), ("out",)),
        SymmetrySwinUNETR: (("swinViT", "attention"), ("out",)),
        GroupNormUNet: (("encoder",), ("head",)),
        ResUNet: (("down",), ("out",)),
        DynUNet: (("input_block", "downsamples", "bottleneck"), ("output_block", "deep_supervision_heads")),
    }
    encoder, head = known[type(network)]
    # MONAI's DynUNet has all its layers again in these.
    rest = [name for name, _ in network.named_children() if name not in (*encoder, *head, "skip_layers")]
    head = tuple(name for name in head if hasattr(network, name))
    parts = {"encoder": encoder, "decoder": rest, "head": head}
    return {part: tuple(f"network.{name}" for name in names) for part, names in parts.items()}
