"""Where scans come from: one module per layout, all giving a `Listing`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from core.errors import UserError
from core.lookup import look_up
from core.volumes.sources.bids import list_bids
from core.volumes.sources.cases import list_cases
from core.volumes.sources.decathlon import list_decathlon
from core.volumes.sources.files import name_in
from core.volumes.sources.frames import split_frames
from core.volumes.sources.images import read_image, read_image_geometry
from core.volumes.sources.labels import Wanted
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan
from core.volumes.sources.mre import list_mre
from core.volumes.sources.openbhb import list_openbhb
from core.volumes.sources.recognise import recognised
from core.volumes.sources.table import list_table

__all__ = [
    "SOURCES", "ImageFile", "Listing", "Reject", "Scan", "list_scans", "read_image", "read_image_geometry",
]  # fmt: skip

SOURCES: dict[str, Callable[[Path, Wanted], Listing]] = {
    "bids": list_bids,
    "table": list_table,
    "openbhb": list_openbhb,
    "mre": list_mre,
    "decathlon": list_decathlon,
    "cases": list_cases,
}


def list_scans(
    source: str | Path,
    *,
    kind: str | None = None,
    channels: Sequence[str] | None = None,
    maps: Sequence[str] = (),
    mask: str | None = None,
    age_column: str | None = "age",
    is_age_asked: bool = False,
    root: Path | None = None,
    split: str | None = None,
) -> Listing:
    """The scans that `source` holds, in order of (subject, session), and the subjects that are left out.

    `kind` is a key of `SOURCES`; None: what `recognised` finds. `channels` names the images that make a
    scan, needed wherever there are several kinds; `maps` and `mask` what goes with them. Whatever a scan lacks beside
    its images, an age, a class or a map, is unknown, and the scan is kept. `root` is where relative paths of a list
    begin. The layout decides what the names mean: a suffix (bids, cases), a column (table), a quantity (mre, openbhb),
    a key (decathlon). With `split` the volumes of a 4-D image are channels of this name; see `split_frames`.

    No voxel is read; `read_image` checks the content of a file. Raises UserError where the source as a whole
    cannot be used.
    """
    source = Path(source)
    wanted = Wanted(
        tuple(channels) if channels else None,
        tuple(maps),
        mask or None,
        age_column or None,
        is_age_asked,
        root,
    )
    if twice := [name for name, n in Counter(wanted.maps).items() if n > 1]:
        raise UserError(f"map '{twice[0]}' is asked for twice; each is needed once")
    if wanted.channels and (twice := [name for name, n in Counter(wanted.channels).items() if n > 1]):
        raise UserError(f"channel '{twice[0]}' is asked for twice; each is needed once")
    listing = look_up(SOURCES, kind or recognised(source), "layout")(source, wanted)
    if split is not None:
        listing = split_frames(listing, split)
    return replace(
        listing,
        scans=_with_same_columns(sorted(listing.scans, key=lambda scan: (scan.subject, scan.session))),
        rejects=tuple(
            map(_in_one_line, sorted(listing.rejects, key=lambda reject: (reject.subject, reject.file)))
        ),
        notes=(*listing.notes, *_unknown(listing, wanted), *_shared_images(listing)),
    )


def _unknown(listing: Listing, wanted: Wanted) -> Iterator[str]:
    """What is not known of some of the scans."""
    scans = listing.scans
    without = [scan.subject for scan in scans if math.isnan(scan.age)]
    if wanted.age_column and 0 < len(without) < len(scans):
        yield f"the age of {len(without)} of {len(scans)} scans is unknown, such as that of {without[0]}"
    for name in wanted.maps:
        lacking = [scan.subject for scan in scans if name not in scan.maps]
        if scans and len(lacking) == len(scans):
            raise UserError(f"{listing.source} has no map '{name}' of any scan")
        if lacking:
            yield f"{len(lacking)} of {len(scans)} scans have no map '{name}', such as {lacking[0]}"


def _in_one_line(reject: Reject) -> Reject:
    """The reject without line breaks, which a quoted value of a table may contain."""
    return Reject(*(" ".join(text.splitlines()) for text in (reject.subject, reject.file, reject.reason)))


def _with_same_columns(scans: Sequence[Scan]) -> tuple[Scan, ...]:
    """Every scan with all further columns of the source, in one order: NaN or "" where it has no value."""
    columns = {name: value for scan in scans for name, value in scan.extra.items()}
    unknown = {name: math.nan if isinstance(value, float) else "" for name, value in columns.items()}
    return tuple(replace(scan, extra=unknown | scan.extra) for scan in scans)


def _shared_images(listing: Listing) -> Iterator[str]:
    """A note if two scans have the same image: a mistake in a table, or one brain under two names."""
    users: dict[ImageFile, set[str]] = defaultdict(set)
    for scan in listing.scans:
        for file in scan.images:
            users[file].add(scan.subject)
    shared = {file: sorted(subjects) for file, subjects in users.items() if len(subjects) > 1}
    if shared:
        file, subjects = next(iter(shared.items()))
        yield (
            f"LEAK: {len(shared)} images belong to more than one subject, such as "
            f"{name_in(listing.source, file.path)} ({', '.join(subjects[:4])})"
        )
