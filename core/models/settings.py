"""What a run may say about its model, checked before anything is built."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from core.models.heads import HeadKind


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadSettings(_Frozen):
    """Projection head between encoder and contrastive objective."""

    kind: HeadKind = Field(
        default="mlp", description="mlp: two layers; linear: one; none: the embedding itself"
    )
    dimension: int = Field(
        default=128, ge=2, description="length of the projection, shape (B, dimension); unused by kind none"
    )


class _EncoderSettings(_Frozen):
    width: float = Field(
        default=1.0, ge=1 / 64, le=4.0, description="multiplies every channel count; 1 is published"
    )
    head: HeadSettings = HeadSettings()
    readout: Literal["encoder", "projection"] = Field(
        default="projection",
        description="what probes read: the encoder's embedding (B, embedding_dim) or the unit projection "
        "(B, head.dimension), which is the published choice",
    )


class ResNetSettings(_EncoderSettings):
    """Residual encoders of system A; the defaults are the published configuration."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"


class ResNeXtSettings(_EncoderSettings):
    """Grouped residual encoders of system B."""

    name: Literal["resnext50", "resnext101", "resnext152", "resnext200"] = "resnext50"
    cardinality: Literal[8, 16, 32] = Field(default=32, description="groups of each 3³ convolution")
    shortcut: Literal["A", "B"] = Field(
        default="B", description="where channels or strides change: zero channels (A) or a convolution (B)"
    )

    @field_validator("width")
    @classmethod
    def _whole_groups(cls, width: float) -> float:
        if (4 * width) % 1:
            raise ValueError("must be a multiple of 0.25 for ResNeXt, whose groups hold 32 channels")
        return width


class SFCNSettings(_EncoderSettings):
    """The simple fully convolutional network, the field's light baseline."""

    name: Literal["sfcn"] = "sfcn"


class _SwinFields(_EncoderSettings):
    patch: Literal[2, 4] = Field(default=2, description="side of a patch, in voxels")
    window: int = Field(default=7, ge=2, le=14, description="side of an attention window, in patches")
    pooling: Literal["mean", "corner"] = Field(
        default="mean", description="embedding from the tokens: their mean, or the published corner token"
    )
    merging: Literal["v2", "legacy"] = Field(
        default="v2",
        description="patch merging; legacy repeats two of eight sub-lattices, as published weights do",
    )
    checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability of leaving a block out, rising from 0 with its depth",
    )

    @field_validator("width")
    @classmethod
    def _whole_heads(cls, width: float) -> float:
        if (4 * width) % 1:
            raise ValueError("must be a multiple of 0.25 for Swin, whose heads need steps of 12 channels")
        return width


class SwinSettings(_SwinFields):
    """3D Swin of system C, without its mirror image."""

    name: Literal["swin"] = "swin"


class SymmetrySwinSettings(_SwinFields):
    """3D Swin of system C with cross-attention to the left-right mirror image."""

    name: Literal["swin_symmetry"] = "swin_symmetry"
    layers: int = Field(default=1, ge=1, le=4, description="cross-attention blocks")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="dropout inside the cross-attention blocks")
    pre_norm: bool = Field(default=False, description="layer norm before each branch; after the sum if false")


ModelSettings = Annotated[
    ResNetSettings | ResNeXtSettings | SFCNSettings | SwinSettings | SymmetrySwinSettings,
    Field(discriminator="name"),
]


class _SegmenterFields(_Frozen):
    width: float = Field(
        default=1.0, ge=1 / 64, le=4.0, description="multiplies every channel count; 1 is published"
    )


class ResUNetSettings(_SegmenterFields):
    """Residual 3D U-Net of system B; it keeps the slice axis whole."""

    name: Literal["res_unet"] = "res_unet"


class GroupNormUNetSettings(_SegmenterFields):
    """2D U-Net of system D, slice by slice across Z."""

    name: Literal["groupnorm_unet"] = "groupnorm_unet"

    @field_validator("width")
    @classmethod
    def _whole_groups(cls, width: float) -> float:
        if (4 * width) % 1:
            raise ValueError("must be a multiple of 0.25 for groupnorm_unet, whose groups hold 4 channels")
        return width


class DynUNetSettings(_SegmenterFields):
    """The U-Net of nnU-Net as MONAI has it, with residual blocks."""

    name: Literal["dynunet"] = "dynunet"
    depths: int = Field(
        default=3, ge=1, le=3, description="stages of the decoder that are supervised; 1: the last"
    )
    residual: bool = Field(default=True, description="residual blocks in the encoder")


class _SwinUNETRFields(_SegmenterFields):
    window: int = Field(default=7, ge=2, le=14, description="side of an attention window, in patches")
    merging: Literal["v2", "legacy"] = Field(
        default="v2",
        description="patch merging; legacy repeats two of eight sub-lattices, as published weights do",
    )
    checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")

    @field_validator("width")
    @classmethod
    def _whole_heads(cls, width: float) -> float:
        if (4 * width) % 1:
            raise ValueError(
                "must be a multiple of 0.25 for Swin UNETR, whose heads need steps of 12 channels"
            )
        return width


class SwinUNETRSettings(_SwinUNETRFields):
    """Swin UNETR of system C, without its mirror image."""

    name: Literal["swin_unetr"] = "swin_unetr"


class SymmetrySwinUNETRSettings(_SwinUNETRFields):
    """Swin UNETR whose deepest features attend to those of the left-right mirror image."""

    name: Literal["swin_unetr_symmetry"] = "swin_unetr_symmetry"
    layers: int = Field(default=1, ge=1, le=4, description="cross-attention blocks")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="dropout inside the cross-attention blocks")
    pre_norm: bool = Field(default=False, description="layer norm before each branch; after the sum if false")


SegmenterSettings = Annotated[
    ResUNetSettings | GroupNormUNetSettings | DynUNetSettings | SwinUNETRSettings | SymmetrySwinUNETRSettings,
    Field(discriminator="name"),
]


UNetSettings = ResUNetSettings | GroupNormUNetSettings | DynUNetSettings
"""Networks that segment, and have no encoder that another task knows."""
EncoderOrUNetSettings = Annotated[
    ResNetSettings | ResNeXtSettings | SFCNSettings | SwinSettings | SymmetrySwinSettings | UNetSettings,
    Field(discriminator="name"),
]


def encoder_of(settings: BaseModel) -> BaseModel:
    """The settings of the encoder alone: of Swin UNETR its Swin; others are encoders, or have one of their own kind."""
    plain = {"width", "window", "merging", "checkpointing"}
    if isinstance(settings, SymmetrySwinUNETRSettings):
        return SymmetrySwinSettings(**settings.model_dump(include=plain | {"layers", "dropout", "pre_norm"}))
    if isinstance(settings, SwinUNETRSettings):
        return SwinSettings(**settings.model_dump(include=plain))
    return settings
