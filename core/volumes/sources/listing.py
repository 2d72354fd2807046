"""The result of listing a source of any layout: usable scans, and subjects left out with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ImageFile:
    """One volume on disk: a NIfTI file, or one row of a NumPy array."""

    path: Path
    row: int | None = None
    """Index along the first axis of a `.npy` array, or along the fourth of a NIfTI file; None for a 3-D one."""
    affine: tuple[tuple[float, ...], ...] | None = None
    """4 x 4, voxel to RAS mm, where the file itself carries no geometry (`.npy`); None for NIfTI."""


@dataclass(frozen=True)
class Scan:
    """One visit of one subject: an image per channel, maps that go with them, and the labels."""

    subject: str
    images: tuple[ImageFile, ...]
    """One for each of the listing's `channels`, in that order."""
    session: str = ""
    """Distinguishes several scans of one subject (BIDS session and run); "" where there is one."""
    maps: dict[str, ImageFile] = field(default_factory=dict)
    """Maps of whole-number classes on the grid of the first image, by name; those that this scan has."""
    mask: ImageFile | None = None
    """Brain mask (non-zero is brain) on the grid of the first image."""
    age: float = math.nan
    """Years; NaN where the source does not say it."""
    sex: str = ""
    site: str = ""
    extra: dict[str, str | float] = field(default_factory=dict)
    """Further columns of the source's tables; a class label of a list file is the column "label"."""


@dataclass(frozen=True)
class Reject:
    """A subject that is left out, and why."""

    subject: str
    file: str
    """Relative to the source; "" where no file is the cause."""
    reason: str


@dataclass(frozen=True)
class Listing:
    """The usable scans of a source, in order of (subject, session), and those that fail before reading voxels."""

    source: Path
    kind: str
    """Name of the layout: a key of `core.volumes.sources.SOURCES`."""
    channels: tuple[str, ...]
    """What each image of a scan shows, such as T1w or stiffness."""
    scans: tuple[Scan, ...]
    rejects: tuple[Reject, ...]
    digest: str
    """sha256 over the source's tables and lists, so that changed labels are noticed."""
    notes: tuple[str, ...] = ()
    """Lines that the user should read, such as subjects found in two folds of a list."""
