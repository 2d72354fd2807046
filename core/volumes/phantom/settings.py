"""What a phantom cohort depends on. Imports nothing heavy: the command line makes its options of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

VERSION = 1  # increase it when the same settings give other brains
SPACINGS = {2.0: (91, 109, 91), 4.0: (46, 55, 46), 8.0: (23, 28, 23)}
"""Voxel edge in mm, and the voxels of the MNI field of view."""

Channel = Literal["stiffness", "t1w", "ct", "t1gd", "t2w", "flair"]
CHANNELS_OF_KIND: dict[str, tuple[Channel, ...]] = {
    "ageing": ("stiffness",), "tissue": ("t1w",), "lesions": ("t1w",), "ct": ("ct",),
    "contrasts": ("t1w", "t1gd", "t2w", "flair"),
}  # fmt: skip
"""What is made if no channels are asked for."""


class PhantomSettings(BaseModel):
    """Everything that a phantom cohort depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ageing", "tissue", "lesions", "ct", "contrasts"] = Field(
        default="ageing",
        description="ageing: healthy brains of all ages; tissue: the same T1-weighted, with a map of their tissues; "
        "lesions: half of them ill on one side, with a map of lesions; ct: heads with skull in Hounsfield units, half "
        "of them with a bleeding; contrasts: T1w, T1Gd, T2w and FLAIR, most with a tumour, of which few are labelled",
    )
    rung: int | None = Field(
        default=None,
        ge=1,
        le=5,
        description="of kinds lesions and ct: 1, large and plain to see (the default), to 5, invisible",
    )
    subjects: int = Field(default=96, ge=1, le=9999, description="how many brains")
    spacing: float = Field(default=4.0, description="voxel edge in mm: 2, 4 or 8")
    seed: int = Field(default=0, ge=0, description="another seed gives other brains")
    ages: Literal["clusters", "uniform"] = Field(
        default="clusters", description="18 to 90 years: young and old with few in between, or all ages alike"
    )
    sites: int = Field(
        default=3,
        ge=1,
        le=20,
        description="scanner sites, from mostly young to mostly old people",
    )
    channels: tuple[Channel, ...] = Field(
        default=None,
        validate_default=True,
        description="stiffness (kPa, the default), t1w (units of each scanner), or both; t1w alone of other kinds",
    )
    sex_effect: float = Field(
        default=0.0, ge=-0.3, le=0.3, description="share by which women's brains are stiffer than men's"
    )

    @field_validator("rung")
    @classmethod
    def _rung_of_lesions(cls, rung: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("kind") in ("lesions", "ct"):
            return rung or 1
        if rung is not None:
            raise ValueError(
                f"rung cannot act with kind {info.data.get('kind')}, got {rung}; use kind lesions"
            )
        return None

    @field_validator("channels", mode="before")
    @classmethod
    def _channels_of_kind(cls, channels: object, info: ValidationInfo) -> object:
        own = CHANNELS_OF_KIND[info.data.get("kind", "ageing")]
        if channels is None:
            return own
        # Of several contrasts some may do; kind ageing has both of its own.
        may_be = ("stiffness", "t1w") if own == ("stiffness",) else own
        named = (
            (channels,)
            if isinstance(channels, str)
            else tuple(channels)
            if isinstance(channels, Sequence)
            else ()
        )
        if wrong := [name for name in named if name not in may_be]:
            kind = info.data.get("kind")
            raise ValueError(f"channels must be of {','.join(may_be)} with kind {kind}, got {wrong[0]}")
        return channels

    @field_validator("spacing")
    @classmethod
    def _known_spacing(cls, spacing: float) -> float:
        if spacing not in SPACINGS:
            raise ValueError(f"spacing must be 2, 4 or 8 mm, got {spacing:g}")
        return spacing

    @field_validator("channels")
    @classmethod
    def _each_channel_once(cls, channels: tuple[Channel, ...]) -> tuple[Channel, ...]:
        if not channels or len(set(channels)) < len(channels):
            raise ValueError(f"channels must be named once each, got {channels}")
        return channels

    def identity(self) -> dict[str, object]:
        """The settings as a cohort records them."""
        recorded = self.model_dump(mode="json")
        if self.kind not in ("lesions", "ct"):
            del recorded["rung"]
        if self.kind == "ageing":
            # As before there were kinds: an ageing cohort of an older version is the same cohort.
            del recorded["kind"]
        return {"phantom": VERSION, **recorded}
