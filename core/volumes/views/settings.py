"""The settings of random views of a volume."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.volumes.images.mirror import Direction

Side = Annotated[int, Field(ge=1, le=1024)]
Sides = Side | tuple[Side, Side, Side]


ALTERNATIVES = (
    ("rotate",), ("zoom",), ("translate",), ("flip", "flip_front_back", "flip_up_down"), ("eighth_turns",),
)  # fmt: skip
"""The settings of each change of which `one_of` takes one."""


class ViewSettings(BaseModel):
    """How views differ from the volume; the defaults change nothing, as in the published configuration.

    Voxels that are exactly 0 count as background. Crop, cutout, flips and intensities leave them exactly 0;
    a movement interpolates, so that a voxel is 0 where all eight neighbours of its source are; noise falls
    everywhere, as published, unless `noise_in` says brain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=2, ge=1, le=16, description="views of each volume (V)")
    crop: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of each side kept by a random crop, which is then centred in zeros on the full "
        "grid; the reference keeps about 0.9; none: no crop",
    )
    crop_size: Sides | None = Field(
        default=None,
        description="the same in voxels: one number for a cube, or one for each axis; a longer side than the "
        "grid's keeps all of it; reference 91 (of 91 x 109 x 91); instead of crop",
    )
    crop_place: Literal["random", "centre"] = Field(
        default="random", description="where a crop is taken from"
    )
    crop_on_class: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the random crops that are taken around a voxel of any class, where there are maps",
    )
    pad_to: Sides | None = Field(
        default=None,
        description="grid of the views in voxels, in whose middle the volume or its crop lies, an odd "
        "remainder on the far side; none: as the volume",
    )
    cutout: float = Field(
        default=0.0, ge=0, le=1, description="probability of zeroing one block; reference 0.5"
    )
    cutout_size: float = Field(
        default=0.35,
        gt=0,
        le=1,
        description="side of the cutout cube as a fraction of the grid's shortest side; reference 32 of 91",
    )
    noise: float = Field(
        default=0.0, ge=0, description="SD of additive Gaussian noise, in units of the volume; reference 0.05"
    )
    noise_in: Literal["everywhere", "brain"] = Field(
        default="everywhere", description="whether noise falls on the background too, as in the reference"
    )
    flip: float = Field(
        default=0.0, ge=0, le=1, description="probability of exchanging left and right; system C 0.5"
    )
    flip_front_back: float = Field(default=0.0, ge=0, le=1, description="probability; system C 0.5")
    flip_up_down: float = Field(default=0.0, ge=0, le=1, description="probability; system C 0.5")
    rotate: float = Field(
        default=0.0,
        ge=0,
        le=180,
        description="largest rotation about each of three axes, in degrees; system D 15",
    )
    rotate_about: Direction | None = Field(
        default=None,
        description="rotate about this direction alone: up_down turns axial slices in their plane, as system D does; "
        "none: about all three",
    )
    eighth_turns: Direction | None = Field(
        default=None,
        description="turn every view by 0 to 7 times 45 degrees about this direction; system D about up_down",
    )
    zoom: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="largest relative change of size, the same along all axes; system D 0.05",
    )
    translate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="largest movement along each axis, as a fraction of the grid's shortest side",
    )
    scale: float = Field(
        default=0.0, ge=0, lt=1, description="largest relative change of all intensities; system C 0.1"
    )
    shift: float = Field(
        default=0.0,
        ge=0,
        description="largest amount added to all intensities (brightness), in units of the volume; system C "
        "0.1, system D 0.5",
    )
    contrast: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="largest relative change of the distance of intensities to their mean; system D 0.3",
    )
    gamma: float = Field(
        default=0.0,
        ge=0,
        le=3,
        description="largest |log γ| of a power law between the lowest and the highest intensity",
    )

    crop_probability: float = Field(
        default=1.0, ge=0, le=1, description="share of the views that are cropped; the others are whole"
    )
    noise_probability: float = Field(default=1.0, ge=0, le=1, description="share of the views with noise")
    move_probability: float = Field(
        default=1.0, ge=0, le=1, description="share of the views that are rotated, zoomed and translated"
    )
    intensity_probability: float = Field(
        default=1.0, ge=0, le=1, description="share of the views whose intensities change; system C 0.5"
    )
    quarter_turns: Literal["left_right", "front_back", "up_down"] | None = Field(
        default=None,
        description="turn every view by 0 to 3 quarters about this direction, across which it must have equal sides; "
        "system C turns about left_right",
    )
    one_of: bool = Field(
        default=False,
        description="a view has only one of the changes rotation, size, translation, flips and eighth turns that are "
        "on, or none of them, all equally likely; system D",
    )

    @model_validator(mode="after")
    def _settings_act(self) -> ViewSettings:
        if self.crop is not None and self.crop_size is not None:
            raise ValueError(
                f"crop={self.crop:g} and crop_size={self.crop_size} exclude each other; give one"
            )
        if self.one_of and not self.alternatives:
            raise ValueError(
                f"one_of acts only with one of {', '.join(n for each in ALTERNATIVES for n in each)}"
            )
        if self.crop_place == "centre" and self.crop is None and self.crop_size is None:
            raise ValueError("crop_place acts only with crop or crop_size, got neither")
        return self

    @property
    def moves(self) -> bool:
        """Whether voxels are interpolated at new places."""
        return max(self.rotate, self.zoom, self.translate) > 0 or self.eighth_turns is not None

    @property
    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        """The changes that are on of which `one_of` takes one, each with the names of its settings."""
        return tuple(names for names in ALTERNATIVES if any(getattr(self, name) for name in names))

    def with_one_of(self, chance: float) -> ViewSettings:
        """The settings of a view that drew `chance` in [0, 1): of the alternatives at most one is on."""
        if not self.one_of:
            return self
        known = self.alternatives
        chosen = int(chance * (len(known) + 1))
        off = [name for place, names in enumerate(known) if place != chosen for name in names]
        return self.model_copy(update={name: type(self).model_fields[name].default for name in off})

    @property
    def flips(self) -> tuple[float, float, float]:
        """Probabilities of exchanging left and right, front and back, up and down."""
        return self.flip, self.flip_front_back, self.flip_up_down

    @property
    def recolours(self) -> bool:
        """Whether intensities inside the brain change together."""
        return max(self.scale, self.shift, self.contrast, self.gamma) > 0

    @property
    def change_nothing(self) -> bool:
        """Whether every view is the volume itself."""
        same_grid = self.crop in (None, 1.0) and self.crop_size is None and self.pad_to is None
        return (
            same_grid
            and self.quarter_turns is None
            and max(self.cutout, self.noise, *self.flips) == 0
            and not self.moves
            and not self.recolours
        )
