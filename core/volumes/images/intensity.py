"""Grey values on one scale: as they are, z-scored, stretched between percentiles, or through a window.

A setting is one line of text, the same on the command line, in a cohort's description and in its hash:
`raw`, `zscore`, `percentile:0.1,99.9`, `window:-1000,1000`, the name of a window such as `window:ct`, or `hu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from core.errors import UserError
from core.lookup import did_you_mean

Values = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

FAINTEST = 2.0**-14
"""The value of a voxel of the brain in place of 0, which means background: float16's smallest normal number."""
MRI_PERCENTILES = (0.01, 99.9)
"""From contrast-guided pre-training (lunastra26's released code; spec.md D.1)."""
WINDOWS: dict[str, tuple[float, float]] = {
    "ct": (-1000, 1000),  # HU, air to bone: symmetry-aware pre-training (spec.md C.1)
    "ct_brain": (0, 80),  # HU, the radiologist's brain window: level 40, width 80
    # Pa at 50 Hz: above the 99.9th percentile of each of the 34 brains of MRE134 looked at (4080 to 9310 Pa)
    "stiffness": (0, 10_000),
}
KINDS = ("raw", "zscore", "percentile", "window", "hu")
HEAD_HU, DENSEST_HU = -500.0, 3071.0
"""Hounsfield units: half-way between air and water, where the head begins; and the largest that scanners store."""


@dataclass(frozen=True)
class Intensity:
    """How grey values are scaled; `low` and `high` are percentiles or ends of the window, NaN for the others."""

    kind: Literal["raw", "zscore", "percentile", "window", "hu"]
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return self.kind if math.isnan(self.low) else f"{self.kind}:{self.low:.12g},{self.high:.12g}"


def parse_intensity(text: str) -> Intensity:
    """The setting that a line of text means; UserError says what would be right.

    `window:mri` is a stretch between percentiles, because MR images have no unit; other named windows
    are `WINDOWS`. `str()` of the result spells the numbers out: equal voxels, equal text.
    """
    kind, _, rest = text.strip().partition(":")
    if kind in ("raw", "zscore", "hu") and not rest:
        return Intensity("hu" if kind == "hu" else "raw" if kind == "raw" else "zscore")
    if kind == "percentile":
        low, high = _two_numbers(text, rest or "{},{}".format(*MRI_PERCENTILES))
        if not 0 <= low < high <= 100:
            raise UserError(f"intensity '{text}': percentiles must be 0 to 100, the lower one first")
        return Intensity("percentile", low, high)
    if kind == "window":
        if rest == "mri":
            return Intensity("percentile", *MRI_PERCENTILES)
        low, high = WINDOWS[rest] if rest in WINDOWS else _two_numbers(text, rest)
        if not low < high:
            raise UserError(f"intensity '{text}': the lower end of a window comes first")
        return Intensity("window", float(low), float(high))
    raise UserError(
        f"unknown intensity '{text}'; {did_you_mean(kind, KINDS)} Such as raw, zscore, hu, percentile:0.1,99.9, "
        f"window:-1000,1000, window:{', window:'.join(['mri', *WINDOWS])}"
    )


def _two_numbers(text: str, rest: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in rest.split(","))
    except ValueError:
        names = "" if text.startswith("percentile") else f", or one of {', '.join(['mri', *WINDOWS])}"
        raise UserError(
            f"intensity '{text}': two numbers are needed after the colon, such as 0.1,99.9{names}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"intensity '{text}': both numbers must be finite")
    return low, high


def foreground(voxels: Values, intensity: Intensity) -> Mask:
    """The foreground of an image without a mask: its voxels that are not 0.

    In Hounsfield units, however, 0 is water and air lies far below it: if any voxel lies at or below the lower
    end of a window, these voxels are the background instead. With `hu` it is the largest piece of what is denser than
    half-way between air and water, its cavities filled: the head with its skull, without the table.
    """
    if intensity.kind == "hu":
        return _head(voxels)
    if intensity.kind == "window":
        above = voxels > intensity.low
        if not above.all():
            return np.asarray(above)
    return np.asarray(voxels != 0)


def scale(voxels: Values, inside: Mask, intensity: Intensity) -> Values:
    """Scaled values inside, exactly 0 outside, and never 0 inside (`FAINTEST` instead).

    zscore: mean 0 and SD 1 inside. percentile: the two percentiles of the values inside become 0 and 1.
    window: its two ends become 0 and 1. Values beyond are clipped. Raises UserError where no voxel is inside,
    or where the scale needs values that differ and they do not.
    """
    values = voxels[inside].astype(np.float64)
    if values.size == 0:
        raise UserError("no voxel is inside the brain")
    if intensity.kind == "hu":
        return _hounsfield(voxels, inside)
    scaled = _scaled(values, intensity)
    result = np.zeros(voxels.shape, dtype=np.float32)
    result[inside] = _kept_from_zero(scaled.astype(np.float32), intensity)
    return result


def _head(voxels: Values) -> Mask:
    pieces, count = ndimage.label(voxels > HEAD_HU)
    if not count:
        raise UserError(
            f"no voxel is above {HEAD_HU:g} HU: are these Hounsfield units? A CT stores them by its slope and intercept"
        )
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(pieces == sizes.argmax()))


def _hounsfield(voxels: Values, inside: Mask) -> Values:
    """Whole Hounsfield units inside, of which 0 is 1, because 0 means background."""
    values = np.clip(np.rint(voxels), -DENSEST_HU, DENSEST_HU)
    return np.where(inside, np.where(values == 0, 1, values), 0).astype(np.float32)


def _scaled(values: npt.NDArray[np.float64], intensity: Intensity) -> npt.NDArray[np.float64]:
    if intensity.kind == "raw":
        return values
    if intensity.kind == "zscore":
        if _alike(values.min(), values.max()):
            raise UserError(
                "the voxels of the brain are all alike, so they have no z-score; use intensity raw"
            )
        return np.asarray((values - values.mean()) / values.std())
    low, high = intensity.low, intensity.high
    if intensity.kind == "percentile":
        low, high = (float(value) for value in np.percentile(values, [low, high]))
        if _alike(low, high):
            raise UserError(
                f"percentiles {intensity.low:g} and {intensity.high:g} of the brain are both {low:g}; "
                "nothing can be stretched between them"
            )
    return np.asarray(np.clip((values - low) / (high - low), 0, 1))


def _alike(low: float, high: float) -> bool:
    """Whether two values differ by no more than float32 rounds when a constant image is interpolated."""
    return bool(high - low <= 16 * np.finfo(np.float32).eps * max(abs(low), abs(high)))


def _kept_from_zero(values: Values, intensity: Intensity) -> Values:
    """The values without any 0; where the scale is known, also without any that float16 would round to 0."""
    if intensity.kind != "raw":
        return np.where(np.abs(values) < FAINTEST, np.copysign(np.float32(FAINTEST), values), values)
    zero = values == 0
    if not zero.any():
        return values
    # raw values can have any unit: the replacement must not be larger than the others
    smallest = np.abs(values[~zero]).min() if not zero.all() else 1.0
    return np.where(zero, np.float32(min(FAINTEST, smallest)), values)
