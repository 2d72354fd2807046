"""Every network that can be trained, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import cast

from torch import nn

from core.errors import UserError
from core.lookup import did_you_mean, look_up
from core.models.encoders import (
    ResNetEncoder,
    SFCNEncoder,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnext50,
    resnext101,
    resnext152,
    resnext200,
    sfcn,
)
from core.models.heads import ProjectionHead, RegressionHead
from core.models.reconstruction import ReconstructionDecoder
from core.models.settings import ModelSettings
from core.models.swin import SwinEncoder, SymmetrySwinEncoder, swin, swin_symmetry
from core.models.swin_unetr import swin_unetr, swin_unetr_symmetry
from core.models.unet import groupnorm_unet, res_unet

__all__ = [
    "MODELS",
    "Encoder",
    "ModelSettings",
    "ProjectionHead",
    "ReconstructionDecoder",
    "RegressionHead",
    "build",
    "build_encoder",
    "build_projection_head",
]

# What turns volumes (B, C, X, Y, Z) into embeddings (B, embedding_dim).
Encoder = ResNetEncoder | SFCNEncoder | SwinEncoder | SymmetrySwinEncoder

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext50": resnext50,
    "resnext101": resnext101,
    "resnext152": resnext152,
    "resnext200": resnext200,
    "sfcn": sfcn,
    "swin": swin,
    "swin_symmetry": swin_symmetry,
    "res_unet": res_unet,
    "groupnorm_unet": groupnorm_unet,
    "swin_unetr": swin_unetr,
    "swin_unetr_symmetry": swin_unetr_symmetry,
}


def build(name: str, **settings: object) -> nn.Module:
    """A freshly initialised network; without settings it is the published one.

    Args:
        name: a key of `MODELS`.
        settings: keyword arguments of that entry; `in_channels` and `width` are understood by every one.

    Raises:
        UserError: for an unknown name or setting, with the nearest known one.
    """
    make = look_up(MODELS, name, "model")
    known = inspect.signature(make).parameters
    for setting in settings:
        if setting not in known:
            raise UserError(f"model '{name}' has no setting '{setting}'; {did_you_mean(setting, known)}")
    return make(**settings)


def build_encoder(settings: ModelSettings, in_channels: int = 1) -> Encoder:
    """The encoder that `settings` describe, for volumes of `in_channels` channels."""
    architecture = settings.model_dump(exclude={"name", "head", "readout"})
    return cast("Encoder", build(settings.name, in_channels=in_channels, **architecture))


def build_projection_head(settings: ModelSettings, embedding_dim: int) -> ProjectionHead:
    """The projection head that `settings` describe, for an encoder of `embedding_dim`."""
    return ProjectionHead(embedding_dim, settings.head.dimension, settings.head.kind)
