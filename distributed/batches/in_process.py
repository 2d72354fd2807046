"""Volumes without Ray: from the memory of this process, or from the shards.

All implementations of `Volumes` give the same bytes for the same rows; they differ in speed and in what they need.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.volumes.cohort.moments import Moments, volume_moments
from core.volumes.cohort.reader import Boxes, Cohort, shape_of
from distributed.batches.plan import Rows

Stored = npt.NDArray[Any]
"""Volumes (n, C, X, Y, Z) in the type that the cohort stores."""
Maps = npt.NDArray[np.int16]
"""Maps of classes (n, X, Y, Z)."""


class Volumes(Protocol):
    """The volumes of a cohort and its maps of classes, wherever they are."""

    def read(self, rows: Rows, out: Stored | None = None, boxes: Boxes | None = None) -> Stored:
        """The stored volumes (n, C, X, Y, Z) of `rows`, in their order; in `out` if it is given and this is faster.

        With `boxes`, one for each row, only this part of them.

        Raises:
            UserError: a volume is damaged; the message names the shard, the row and the subject.
        """

    def read_map(self, name: str, rows: Rows, out: Maps | None = None, boxes: Boxes | None = None) -> Maps:
        """The maps `name` (n, X, Y, Z) of `rows`, as `read` gives volumes.

        Raises:
            UserError: as `read`; or one of the scans has no such map.
        """

    def moments(self, rows: Rows) -> Moments:
        """Moments (n, C, 3) of the real values of `rows`, from which intensity statistics are computed."""


@dataclass(frozen=True)
class InMemory:
    """A cohort in the memory of this process: for `train` without Ray, and for debugging."""

    volumes: Stored
    scales: npt.NDArray[np.float32]
    maps: Mapping[str, Mapping[int, Maps]] = field(default_factory=dict)
    """By name and row the maps (X, Y, Z)."""

    @classmethod
    def of(cls, cohort: Cohort, maps: Sequence[str] = ()) -> InMemory:
        """Read the whole cohort in its stored type, and these `maps` of the scans that have them."""
        rows = np.arange(len(cohort))
        having = {name: np.flatnonzero(cohort.has_map(name)) for name in maps}
        held = {
            name: dict(zip(several.tolist(), cohort.read_map(name, several), strict=True))
            for name, several in having.items()
        }
        return cls(cohort.read_stored(rows), cohort.scales(rows), held)

    def read(self, rows: Rows, out: Stored | None = None, boxes: Boxes | None = None) -> Stored:
        """See `Volumes.read`."""
        return gather([self.volumes[row] for row in rows], out, boxes)

    def read_map(self, name: str, rows: Rows, out: Maps | None = None, boxes: Boxes | None = None) -> Maps:
        """See `Volumes.read_map`; the maps that are held."""
        held = self.maps.get(name, {})
        absent = next((row for row in rows.tolist() if row not in held), None)
        if absent is not None:
            raise no_map(name, absent)
        return gather([held[row] for row in rows.tolist()], out, boxes)

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return np.stack([volume_moments(self.volumes[row], self.scales[row]) for row in rows])


@dataclass(frozen=True)
class Direct:
    """A cohort whose shards every worker reads itself."""

    address: str
    known: Moments
    """Moments (rows, C, 3) of the whole cohort."""

    def read(self, rows: Rows, out: Stored | None = None, boxes: Boxes | None = None) -> Stored:
        """See `Volumes.read`."""
        return opened(self.address).read_stored(rows, out=out, boxes=boxes)

    def read_map(self, name: str, rows: Rows, out: Maps | None = None, boxes: Boxes | None = None) -> Maps:
        """See `Volumes.read_map`."""
        return opened(self.address).read_map(name, rows, out=out, boxes=boxes)

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return self.known[rows]


def gather(whole: Sequence[Stored], out: Stored | None = None, boxes: Boxes | None = None) -> Stored:
    """The arrays as one, in `out` if given: new memory pages cost more than the copy. With `boxes` their parts."""
    parts = whole
    if boxes is not None:
        shape_of(boxes, whole[0].shape[-3:])
        parts = [each[..., *box] for each, box in zip(whole, boxes, strict=True)]
    if out is None:
        return np.stack(parts)
    for place, part in enumerate(parts):
        np.copyto(out[place], part)
    return out


def no_map(name: str, row: int) -> UserError:
    """What is said where a map is not held."""
    return UserError(f"row {row} of the cohort has no map '{name}'")


def read_with_moments(cohort: Cohort, rows: Rows) -> tuple[Stored, Moments]:
    """The stored volumes of `rows`, and their moments (n, C, 3)."""
    volumes, scales = cohort.read_stored(rows), cohort.scales(rows)
    moments = [volume_moments(volume, scale) for volume, scale in zip(volumes, scales, strict=True)]
    return volumes, np.stack(moments)


def bytes_of_a_volume(cohort: Cohort) -> int:
    """Bytes of one stored volume."""
    return np.dtype(cohort.description.dtype).itemsize * int(np.prod(cohort.volume_shape))


def bytes_of_a_map(cohort: Cohort) -> int:
    """Bytes of one stored map."""
    return np.dtype(np.int16).itemsize * int(np.prod(cohort.description.shape))


def bytes_of_a_cohort(cohort: Cohort, maps: Sequence[str] = ()) -> int:
    """Bytes of all its volumes, and of these `maps`."""
    of_maps = sum(int(cohort.has_map(name).sum()) for name in maps) * bytes_of_a_map(cohort)
    return bytes_of_a_volume(cohort) * len(cohort) + of_maps


@functools.lru_cache(maxsize=4)
def opened(address: str) -> Cohort:
    """The cohort at `address`, opened once per process."""
    return Cohort.open(address)
