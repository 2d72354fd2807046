"""Volumes without Ray: from the memory of this process, or from the shards.

All implementations of `Volumes` give the same bytes for the same rows; they differ in speed and in what they need.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.volumes.cohort.moments import Moments, volume_moments
from core.volumes.cohort.reader import Cohort
from distributed.batches.plan import Rows

Stored = npt.NDArray[Any]
"""Volumes (n, C, X, Y, Z) in the type that the cohort stores."""


class Volumes(Protocol):
    """The volumes of a cohort, wherever they are."""

    def read(self, rows: Rows, out: Stored | None = None) -> Stored:
        """The stored volumes (n, C, X, Y, Z) of `rows`, in their order; in `out` if it is given and this is faster.

        Raises:
            UserError: a volume is damaged; the message names the shard, the row and the subject.
        """

    def moments(self, rows: Rows) -> Moments:
        """Moments (n, C, 3) of the real values of `rows`, from which intensity statistics are computed."""


@dataclass(frozen=True)
class InMemory:
    """A cohort in the memory of this process: for `train` without Ray, and for debugging."""

    volumes: Stored
    scales: npt.NDArray[np.float32]

    @classmethod
    def of(cls, cohort: Cohort) -> InMemory:
        """Read the whole cohort in its stored type."""
        rows = np.arange(len(cohort))
        return cls(cohort.read_stored(rows), cohort.scales(rows))

    def read(self, rows: Rows, out: Stored | None = None) -> Stored:
        """See `Volumes.read`."""
        return gather([self.volumes[row] for row in rows], out)

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return np.stack([volume_moments(self.volumes[row], self.scales[row]) for row in rows])


@dataclass(frozen=True)
class Direct:
    """A cohort whose shards every worker reads itself."""

    address: str
    known: Moments
    """Moments (rows, C, 3) of the whole cohort."""

    def read(self, rows: Rows, out: Stored | None = None) -> Stored:
        """See `Volumes.read`."""
        return opened(self.address).read_stored(rows, out=out)

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return self.known[rows]


def gather(volumes: Sequence[Stored], out: Stored | None = None) -> Stored:
    """The `volumes` as one array (n, C, X, Y, Z), in `out` if given: new memory pages cost more than the copy."""
    if out is None:
        return np.stack(volumes)
    for place, volume in enumerate(volumes):
        np.copyto(out[place], volume)
    return out


def read_with_moments(cohort: Cohort, rows: Rows) -> tuple[Stored, Moments]:
    """The stored volumes of `rows`, and their moments (n, C, 3)."""
    volumes, scales = cohort.read_stored(rows), cohort.scales(rows)
    moments = [volume_moments(volume, scale) for volume, scale in zip(volumes, scales, strict=True)]
    return volumes, np.stack(moments)


def bytes_of_a_volume(cohort: Cohort) -> int:
    """Bytes of one stored volume."""
    return np.dtype(cohort.description.dtype).itemsize * int(np.prod(cohort.volume_shape))


@functools.lru_cache(maxsize=4)
def opened(address: str) -> Cohort:
    """The cohort at `address`, opened once per process."""
    return Cohort.open(address)
