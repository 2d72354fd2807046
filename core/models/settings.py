"""What a run may say about its model, checked before anything is built."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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


class ResNetSettings(_Frozen):
    """Residual encoders of system A; the defaults are the published configuration."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    width: float = Field(
        default=1.0, ge=1 / 64, le=4.0, description="multiplies every channel count; 1 is 64 to 512 channels"
    )
    head: HeadSettings = HeadSettings()
    readout: Literal["encoder", "projection"] = Field(
        default="projection",
        description="what probes read: the encoder's embedding (B, embedding_dim) or the unit projection "
        "(B, head.dimension), which is the published choice",
    )


# A union discriminated on `name` as soon as a second family joins.
ModelSettings = ResNetSettings
