"""The identity of a request to ingest: recognises its unfinished or complete cohort, so that two are never mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.files.fingerprint import fingerprint
from core.volumes.cohort.description import CohortDescription
from core.volumes.ingest.shards import relative
from core.volumes.sources.listing import ImageFile, Listing, Scan


def request_of(listing: Listing, description: CohortDescription) -> dict[str, str]:
    """The identity of a request by parts: settings, facts about the scans, and sizes of the files."""
    scans = [
        [scan.subject, scan.session, repr(scan.age), scan.sex, scan.site, sorted(map(repr, scan.extra.items())),
         [relative(file.path, listing.source) + f":{file.row}:{file.affine}" for file in _files(scan)]]
        for scan in listing.scans
    ]  # fmt: skip
    sizes = {relative(path, listing.source): _status(path)[0] for path in _paths(listing.scans)}
    settings = description.model_dump(mode="json", include={"dtype", "storage", "compression"})
    return {
        "source": description.source,
        "subjects or labels": fingerprint({"digest": listing.digest, "scans": scans}),
        "images": fingerprint(sizes),
        "settings": fingerprint({"preprocessing": description.preprocessing_hash, **settings}),
    }


def times_of(scans: Sequence[Scan]) -> str:
    """A hash of the times at which the files last changed; apart, because copied files differ only in this."""
    times = "".join(f"{path}:{_status(path)[1]}\n" for path in _paths(scans))
    return hashlib.sha256(times.encode()).hexdigest()


def newest_file(scans: Sequence[Scan]) -> tuple[int, str]:
    """The time (ns) at which the file that changed last was changed, and its path."""
    return max(((_status(path)[1], str(path)) for path in _paths(scans)), default=(0, ""))


def _files(scan: Scan) -> Iterator[ImageFile]:
    yield from scan.images
    yield from (file for _, file in sorted(scan.maps.items()))
    if scan.mask is not None:
        yield scan.mask


def _paths(scans: Sequence[Scan]) -> list[Path]:
    return sorted({file.path for scan in scans for file in _files(scan)})


def _status(path: Path) -> tuple[int, int]:
    """Bytes and time of the last change (ns); -1 and 0 for a file that does not exist."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns
