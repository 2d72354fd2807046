"""Where scans come from: one module per layout, all giving a `Listing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from core.lookup import look_up
from core.volumes.sources.bids import list_bids
from core.volumes.sources.labels import Wanted
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

__all__ = ["SOURCES", "ImageFile", "Listing", "Reject", "Scan", "list_scans"]

SOURCES: dict[str, Callable[[Path, Wanted], Listing]] = {
    "bids": list_bids,
}


def list_scans(
    source: str | Path,
    *,
    kind: str | None = None,
    channels: Sequence[str] | None = None,
    label: str | None = None,
    mask: str | None = None,
    age_column: str | None = "age",
) -> Listing:
    """The scans that `source` holds, and the subjects that are left out before a voxel is read."""
    wanted = Wanted(tuple(channels) if channels else None, label, mask, age_column)
    return look_up(SOURCES, kind or "bids", "layout")(Path(source), wanted)
