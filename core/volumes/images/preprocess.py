"""The settings of the pipeline from a scan to the grid of the cohort, and the scale of the network's input.

There is one pipeline (`prepare.prepare_scan` runs it): canonical RAS -> brain mask -> registration to MNI152 or
centring -> resampling to spacing and grid -> intensity. `Preprocessing` holds its settings; every cohort
records their hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nibabel.affines import apply_affine, voxel_sizes
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.lookup import look_up
from core.volumes.images.intensity import FAINTEST, Intensity, parse_intensity
from core.volumes.images.nifti import Affine

PIPELINE_VERSION = 2  # increase it whenever the same settings give other voxels

Side = Annotated[int, Field(ge=1, le=1024)]

FIELD_OF_VIEW = (182.0, 218.0, 182.0)
"""Extent in mm of the MNI152 grid: 91 x 109 x 91 voxels of 2 mm."""
FIELD_CENTRE = (0.0, -18.0, 18.0)
"""Centre of the MNI152 grid in MNI mm."""


Edge = Annotated[float, Field(ge=0.5, le=20)]
Spacing = float | tuple[float, float, float]


def default_shape(spacing: Spacing) -> tuple[int, int, int]:
    """The smallest grid that covers the MNI152 field of view: 4 mm gives (46, 55, 46)."""
    edges = np.broadcast_to(spacing, 3).tolist()
    x, y, z = (math.ceil(extent / edge - 1e-9) for extent, edge in zip(FIELD_OF_VIEW, edges, strict=True))
    return x, y, z


def grid_affine(
    spacing: Spacing, shape: tuple[int, int, int], centre: npt.ArrayLike = FIELD_CENTRE
) -> Affine:
    """Affine (4, 4) of an RAS grid of `shape` voxels of `spacing` mm around `centre` (mm)."""
    edges = np.broadcast_to(np.asarray(spacing, dtype=np.float64), 3)
    affine = np.diag([*edges, 1.0])
    affine[:3, 3] = np.asarray(centre) - edges * (np.asarray(shape) - 1) / 2
    return affine


class Preprocessing(BaseModel):
    """Settings of the pipeline; equal settings give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing: Edge | tuple[Edge, Edge, Edge] = Field(
        default=4.0, description="edge of a voxel in mm, or its edges along X, Y and Z"
    )
    shape: tuple[Side, Side, Side] = Field(
        default=None,
        validate_default=True,
        description="voxels along X, Y, Z; by default what covers the MNI152 field of view",
    )
    mask: Literal["file"] | None = Field(
        default=None,
        description="what is brain. file: the mask that comes with each scan; null: what is not background",
    )
    intensity: str = Field(
        default="zscore",
        description="raw, zscore, hu (Hounsfield units), percentile:LOW,HIGH, window:LOW,HIGH or a window's name, "
        "such as window:ct; always inside the brain of each volume (core.volumes.images.intensity)",
    )
    registration: Literal["affine"] | None = Field(
        default=None,
        description="affine: lay each brain over the MNI152 template, so that the grid is in MNI mm; "
        "null: leave it as it lies",
    )
    midline: bool = Field(
        default=False,
        description="align each head with its mirror image, so that the middle of the grid is the mid-sagittal plane",
    )
    interpolation: Literal["linear", "bspline"] = Field(
        default="linear",
        description="of images. linear: after smoothing by the blur of coarser voxels, without darkening the brain's "
        "edge; bspline: cubic, as system B. Maps always have the class of the nearest voxel",
    )
    centre: Literal["auto", "brain", "world"] = Field(
        default="auto",
        validate_default=True,
        description="what lies in the middle of the grid. brain: the middle of the subject's own brain, for "
        "native space; world: the middle of the MNI152 field of view, for images already in MNI space; auto: "
        "decided once for a cohort, world if every image covers the MNI152 field of view",
    )

    @field_validator("shape", mode="before")
    @classmethod
    def _fill_shape(cls, shape: object, info: ValidationInfo[object]) -> object:
        return default_shape(info.data.get("spacing", 4.0)) if shape is None else shape

    @field_validator("midline")
    @classmethod
    def _midline_acts(cls, midline: bool, info: ValidationInfo[object]) -> bool:
        """A registered brain lies in a symmetric template."""
        if midline and info.data.get("registration") is not None:
            raise ValueError(
                "midline cannot act with registration, which lays the brain over a symmetric template; leave one out"
            )
        return midline

    @field_validator("centre")
    @classmethod
    def _settle_centre(cls, centre: str, info: ValidationInfo[object]) -> str:
        """A registered brain lies in MNI space."""
        if info.data.get("registration") is None:
            return centre
        if centre == "brain":
            raise ValueError(
                "centre 'brain' cannot act with registration, which lays the brain over MNI152; leave it"
            )
        return "world"

    @field_validator("intensity")
    @classmethod
    def _spell_out(cls, intensity: str) -> str:
        try:
            return str(parse_intensity(intensity))
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def scaling(self) -> Intensity:
        """The parsed `intensity`."""
        return parse_intensity(self.intensity)

    @property
    def settings(self) -> dict[str, object]:
        """The settings that a cohort records: fields and version of the pipeline, as plain JSON values."""
        fields = self.model_dump(mode="json")
        if self.interpolation == "linear":
            # Cohorts of format 2 do not have it, and theirs are the same voxels.
            del fields["interpolation"]
        if not self.midline:
            del fields["midline"]
        return {**fields, "version": PIPELINE_VERSION}

    @property
    def hash(self) -> str:
        """sha256 of the settings as canonical JSON."""
        return fingerprint(self.settings)

    @property
    def affine(self) -> Affine:
        """Affine (4, 4) of the cohort's common grid: voxel to mm, MNI mm where images were in MNI space."""
        return grid_affine(self.spacing, self.shape)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Preprocessing:
        """The pipeline that a cohort recorded; UserError if this version would give other voxels."""
        if "phantom" in settings:
            raise UserError(
                "the cohort is of phantoms, which are made on their grid: there is no preprocessing to repeat"
            )
        fields = dict(settings)
        if (made_by := fields.pop("version", None)) != PIPELINE_VERSION:
            raise UserError(
                f"the cohort was made by preprocessing version {made_by}, this is {PIPELINE_VERSION}; "
                "ingest it again"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            what = ".".join(map(str, first["loc"]))
            raise UserError(
                f"the cohort's preprocessing setting '{what}': {first['msg']}; ingest it again"
            ) from None


def covers_template_field(shape: tuple[int, ...], affine: Affine) -> bool:
    """Whether a volume lies in the MNI152 field of view: its axes along the world's, its centre within 5 mm.

    NIfTI's own space codes do not show it: most tools write "aligned" for both. The operator centres a
    scanner's field of view on the magnet, so it has MNI's centre, 18 mm behind and above, only by chance.
    """
    directions = affine[:3, :3] / voxel_sizes(affine)
    along_axes = np.allclose(np.abs(directions).max(axis=0), 1, atol=1e-4)
    centre = apply_affine(affine, (np.asarray(shape[:3]) - 1) / 2)
    return bool(along_axes and np.linalg.norm(centre - FIELD_CENTRE) <= 5)


class IntensityStatistics(NamedTuple):
    """Mean and standard deviation of the non-zero voxels, one value per channel."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]


def fit_intensity_statistics(
    volumes: Iterable[npt.NDArray[np.float16 | np.float32 | np.int16]],
) -> IntensityStatistics:
    """Statistics over the non-zero voxels of all `volumes`, each (C, X, Y, Z), read one at a time.

    Fit them on the training subjects alone. In float64; volumes are merged by Chan et al.'s update
    (1979), which does not cancel where the mean is far larger than the SD. UserError where no channel
    or volume is given, or the voxels of a channel do not differ.
    """
    count = mean = squares = np.zeros(0)
    for volume in volumes:
        channels = [np.asarray(channel)[np.asarray(channel) != 0].astype(np.float64) for channel in volume]
        if count.size == 0:
            count = mean = squares = np.zeros(len(channels))
        new = np.array([channel.size for channel in channels])
        shift = np.array([channel.mean() if channel.size else 0.0 for channel in channels]) - mean
        spread = np.array([channel.var() * channel.size if channel.size else 0.0 for channel in channels])
        total = np.maximum(count + new, 1)
        squares = squares + spread + np.where(new > 0, shift**2 * count * new / total, 0)
        mean, count = mean + np.where(new > 0, shift * new / total, 0), count + new
    sd = np.sqrt(squares / np.maximum(count, 1))
    if sd.size == 0 or (sd == 0).any():
        raise UserError("intensity statistics need volumes whose non-zero voxels differ in every channel")
    return IntensityStatistics(tuple(mean.tolist()), tuple(sd.tolist()))


def normalise(
    volumes_ncxyz: torch.Tensor,
    mode: str,
    statistics: IntensityStatistics | None = None,
) -> torch.Tensor:
    """Volumes (N, C, X, Y, Z) on the scale of the network's input; zeros stay 0, the input is not changed.

    none: as stored. per_volume: mean 0 and SD 1 over the non-zero voxels of each volume and channel.
    training: with the `statistics` of the training subjects, which keeps differences between subjects. window:LOW,HIGH
    (or a name, such as window:ct_brain): from 0 to 1 between both ends, clipped.
    """
    if mode.startswith("window:"):
        window = parse_intensity(mode)
        values = ((volumes_ncxyz.float() - window.low) / (window.high - window.low)).clamp(FAINTEST, 1)
        return (values * (volumes_ncxyz != 0)).to(volumes_ncxyz.dtype)
    how = look_up(
        {"none": _as_is, "per_volume": _per_volume, "training": _by_training}, mode, "normalisation"
    )
    return how(volumes_ncxyz, statistics)


def _as_is(volumes_ncxyz: torch.Tensor, _: IntensityStatistics | None) -> torch.Tensor:
    return volumes_ncxyz


def _per_volume(volumes_ncxyz: torch.Tensor, _: IntensityStatistics | None) -> torch.Tensor:
    mask = volumes_ncxyz != 0
    values = volumes_ncxyz.float()
    count = mask.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
    centred = (values - values.sum(dim=(2, 3, 4), keepdim=True) / count) * mask
    sd = (centred.square().sum(dim=(2, 3, 4), keepdim=True) / count).sqrt()
    return (centred / torch.where(sd > 0, sd, 1)).to(volumes_ncxyz.dtype)


def _by_training(volumes_ncxyz: torch.Tensor, statistics: IntensityStatistics | None) -> torch.Tensor:
    channels = volumes_ncxyz.shape[1]
    if statistics is None or len(statistics.mean) != channels:
        given = "none were given" if statistics is None else f"those given are for {len(statistics.mean)}"
        raise UserError(f"normalisation 'training' needs statistics for {channels} channels, {given}")
    mean, sd = (
        torch.tensor(values, device=volumes_ncxyz.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for values in statistics
    )
    return ((volumes_ncxyz.float() - mean) / sd * (volumes_ncxyz != 0)).to(volumes_ncxyz.dtype)
