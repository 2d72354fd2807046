"""The volumes of a 4-D image, such as the echoes of one acquisition, as channels of a scan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from core.errors import UserError
from core.volumes.images.nifti import frames_of
from core.volumes.sources.files import checked_file
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan


def split_frames(listing: Listing, name: str) -> Listing:
    """The listing in which the one 4-D image of every scan is as many channels: NAME-1, NAME-2, …

    Scans whose image has another number of volumes than most are left out. Only headers are read.

    Raises:
        UserError: no image has several volumes, or images of several channels have.
    """
    counts: list[tuple[Scan, list[int]]] = []
    rejects = list(listing.rejects)
    for scan in listing.scans:
        try:
            counts.append((scan, [_frames(image) for image in scan.images]))
        except UserError as error:
            rejects.append(Reject(scan.subject, str(scan.images[0].path), str(error)))
    several = {place for _, found in counts for place, count in enumerate(found) if count > 1}
    if len(several) != 1:
        those = ", ".join(listing.channels[place] for place in sorted(several))
        raise UserError(
            f"{listing.source}: --split-4d needs one channel of 4-D images, and "
            f"{f'{those} have several volumes; choose with --channels' if several else 'every image is 3-D'}"
        )
    (place,) = several
    frames = Counter(found[place] for _, found in counts if found[place] > 1).most_common(1)[0][0]
    scans = []
    for scan, found in counts:
        image = scan.images[place]
        if found[place] != frames:
            reason = f"{image.path} has {found[place]} volumes, and most 4-D images have {frames}"
            rejects.append(Reject(scan.subject, str(image.path), reason))
            continue
        parts = tuple(replace(image, row=number) for number in range(frames))
        scans.append(replace(scan, images=(*scan.images[:place], *parts, *scan.images[place + 1 :])))
    names = tuple(f"{name}-{number + 1}" for number in range(frames))
    channels = (*listing.channels[:place], *names, *listing.channels[place + 1 :])
    return replace(listing, channels=channels, scans=tuple(scans), rejects=tuple(rejects))


def _frames(image: ImageFile) -> int:
    return 1 if image.path.suffix == ".npy" else frames_of(checked_file(image.path))
