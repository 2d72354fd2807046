"""A cohort: a folder of preprocessed volumes, and one table row for each scan.

    cohort.json        what it is (`CohortDescription`); written last, so its presence means "complete"
    manifest.parquet   one row per scan: where its volume lies, age, sex, site, checksum, origin
    rejects.csv        subjects that ingest left out, with the reason
    shards/00000.h5 …  or .parquet: columns "volumes" (n, C, X, Y, Z), and "map_NAME" (n, X, Y, Z) for each map

Format 2 had one map, the column "labels"; it is opened as it is, and its map is called `label`.

Volumes are (C, X, Y, Z) in RAS order: X runs from left to right. 0 is background outside the brain.
The folder may lie in an object store (`core.files.places`). `core.volumes.cohort.writer` writes cohorts.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError
from core.files.places import beneath, is_url, list_files, open_file, shown, upload
from core.volumes.cohort.description import (
    DESCRIPTION,
    LABEL,
    MANIFEST,
    SHARDS,
    CohortDescription,
    read_description,
    read_file,
)
from core.volumes.cohort.formats import StoredType
from core.volumes.cohort.overlay import DERIVED, MAPS, Overlay, read_overlays
from core.volumes.cohort.shards import (
    LABELS,
    VOLUMES,
    KeptDtype,
    checksum,
    kept_as,
    map_column,
    mapped,
    read_compressed,
    read_pieces,
)
from core.volumes.cohort.stored import StoredDtype, StoredVoxels, decode

COLUMNS = ("subject", "session", "shard", "position", "age", "sex", "site", "checksum", "source")

Rows = Sequence[int] | npt.NDArray[np.int64]
"""Rows of the manifest, (n,)."""
Box = tuple[slice, slice, slice]
"""A part of the grid: the voxels along X, Y and Z."""
Boxes = Sequence[Box]
"""For each row the part of it that is read; all of one shape."""
_DAMAGE = (OSError, EOFError, KeyError, IndexError, ValueError, RuntimeError)
"""What reading a damaged file raises; pyarrow's errors are ValueErrors."""


@dataclass(frozen=True)
class _Column:
    """What is needed to read one column of the shards; arrays, because a data frame would take longer than reading."""

    name: str
    shape: tuple[int, ...]
    dtype: StoredDtype
    kept: KeptDtype
    """The type in the file, where that is not compressed."""
    checksum: npt.NDArray[np.object_]
    offset: npt.NDArray[np.int64] | None
    """Where each row begins in its shard; None where shards are compressed."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """A complete cohort. It holds no open file: it can be pickled, forked and shared between threads."""

    location: str
    """A folder, or a URL such as s3://bucket/cohort."""
    description: CohortDescription
    manifest: pd.DataFrame
    """Columns `COLUMNS` and any further ones of the source; the RangeIndex "row" is what `read` takes.

    `age` is NaN where it is unknown; `session` distinguishes several scans of a subject, "" where there is one.
    Behind them stand the columns of its overlays.
    """
    overlays: Mapping[str, Overlay] = field(default_factory=dict)
    """By name; see `core.volumes.cohort.overlay`."""

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """The cohort at `location`; UserError if there is none, or it is incomplete, damaged or too new."""
        location = str(location)
        description = read_description(location)
        path = beneath(location, MANIFEST)
        try:
            manifest = pd.read_parquet(io.BytesIO(read_file(location, MANIFEST))).rename_axis(index="row")
        except _DAMAGE as error:
            raise UserError(f"{path} is missing or damaged; make the cohort again") from error
        if missing := [column for column in COLUMNS if column not in manifest]:
            raise UserError(f"{path} lacks the columns {missing}; make the cohort again")
        for column, kinds, what in (("position", "iu", "whole numbers"), ("age", "fiu", "numbers")):
            if manifest[column].dtype.kind not in kinds:
                raise UserError(
                    f"{path} is damaged: its column '{column}' does not hold {what}; make the cohort again"
                )
        for column in ("subject", "shard", "checksum"):
            if not manifest[column].map(lambda value: isinstance(value, str)).all():
                raise UserError(
                    f"{path} is damaged: its column '{column}' does not hold text; make the cohort again"
                )
        overlays = read_overlays(location, manifest, description.hash)
        manifest = pd.concat([manifest, *(each.values for each in overlays.values())], axis=1)
        return cls(location, description, manifest.rename_axis(index="row"), overlays)

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def folder(self) -> Path:
        """Its folder on this machine; UserError for a cohort in an object store."""
        if is_url(self.location):
            raise UserError(f"{shown(self.location)} is not a folder of this machine; copy the cohort to one")
        return Path(self.location)

    @property
    def address(self) -> str:
        """The absolute folder or the URL: opens the cohort in any process of this machine."""
        return self.location if is_url(self.location) else str(self.folder.resolve())

    @property
    def is_plain(self) -> bool:
        """Whether a volume is a piece of a local file, so that reading it needs no network and no decompression."""
        return self.description.compression == "none" and not is_url(self.location)

    @property
    def volume_shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z)."""
        return (len(self.description.channels), *self.description.shape)

    def read(self, rows: Rows, *, verify: bool = True) -> npt.NDArray[np.float32]:
        """Volumes (n, C, X, Y, Z) float32 of the manifest's `rows`, in the order asked, repeats allowed.

        Each shard is opened once per call and read in storage order. With `verify` every volume is compared
        with its checksum (0.05 ms for 91x109x91 in float16, a tenth of reading it). UserError names
        shard, row and subject of a damaged volume.
        """
        wanted, column = self._checked(rows), self._volumes
        volumes = np.empty((len(wanted), *column.shape), dtype=np.float32)
        scratch = np.empty(column.shape, dtype=column.dtype)
        scales = self._scales
        for place in self._fill(column, wanted, lambda _: scratch, verify):
            decode(scratch, None if scales is None else scales[wanted[place]], volumes[place])
        return volumes

    def read_stored(
        self,
        rows: Rows,
        *,
        verify: bool = True,
        out: StoredVoxels | None = None,
        boxes: Boxes | None = None,
    ) -> StoredVoxels:
        """As `read`, but (n, C, X, Y, Z) in the stored type; multiplied by `scales` they are what `read` returns.

        They are written into `out` if given: memory that was used before is twice as fast as new pages. With `boxes`
        only this part of each volume is read from plain shards; no checksum can be compared then. From other shards a
        volume is read once for all its boxes, if its rows stand side by side.
        """
        return self._read_column(self._volumes, self._checked(rows), verify, out, boxes)

    def has_map(self, name: str) -> npt.NDArray[np.bool_]:
        """Which rows (N,) of the manifest have the map `name`; UserError if the cohort has none of this name."""
        if name in self._derived:
            checksums = self.manifest[f"{map_column(name)}_checksum"].fillna("")
            return np.array([bool(each) for each in checksums], dtype=bool)
        return np.array([bool(each) for each in self._map(name).checksum], dtype=bool)

    def read_map(
        self,
        name: str,
        rows: Rows,
        *,
        verify: bool = True,
        out: npt.NDArray[np.int16] | None = None,
        boxes: Boxes | None = None,
    ) -> npt.NDArray[np.int16]:
        """The maps of classes `name`, (n, X, Y, Z) int16, of `rows`, as `read_stored` reads volumes.

        Raises:
            UserError: the cohort has no such map, or one of the scans has none.
        """
        if name in self._derived:
            into = None if out is None else out[:, None]
            of_overlay = self._derived[name].read_stored(rows, verify=verify, out=into, boxes=boxes)
            return cast("npt.NDArray[np.int16]", of_overlay[:, 0])
        column, wanted = self._map(name), self._checked(rows)
        absent = [row for row in wanted if not column.checksum[row]]
        if absent:
            subject = self.manifest["subject"].iloc[absent[0]]
            raise UserError(f"{shown(self.location)}: {subject} has no map '{name}'")
        return cast("npt.NDArray[np.int16]", self._read_column(column, wanted, verify, out, boxes))

    def scales(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Factors (n, C) from stored to real values: 1, except for int16 volumes that were not whole numbers."""
        wanted = self._checked(rows)
        ones = np.ones((len(wanted), self.volume_shape[0]), dtype=np.float32)
        return ones if self._scales is None else self._scales[wanted]

    def rows_of(self, file: str) -> npt.NDArray[np.int64]:
        """The rows that lie in a file below the location, such as shards/00000.h5."""
        return np.flatnonzero(self._shards == file.removeprefix(f"{SHARDS}/"))

    def copy_to(self, url: str) -> Self:
        """Copy the cohort into an object store, cohort.json last, and open it there."""
        upload(self.folder, url, last=DESCRIPTION)
        return self.open(url)

    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for _, size in list_files(self.location))

    @cached_property
    def _shards(self) -> npt.NDArray[np.object_]:
        return self.manifest["shard"].to_numpy(dtype=object)

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        return self.manifest["position"].to_numpy(dtype=np.int64)

    @cached_property
    def _scales(self) -> npt.NDArray[np.float32] | None:
        names = [scale_column(channel) for channel in self.description.channels]
        return self.manifest[names].to_numpy(np.float32) if self.description.dtype == "int16" else None

    @cached_property
    def _volumes(self) -> _Column:
        return self._column(VOLUMES, self.volume_shape, self.description.dtype, "checksum", "offset")

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps of classes that scans may have, also those of overlays."""
        return (*self.description.map_names, *self._derived)

    @cached_property
    def _derived(self) -> dict[str, Cohort]:
        """The maps of overlays by name: cohorts whose volumes they are."""
        return {
            name: Cohort.open(beneath(self.location, f"{DERIVED}/{overlay}/{MAPS}"))
            for overlay, each in self.overlays.items()
            for name in each.description.maps
        }

    def _map(self, name: str) -> _Column:
        known = self.map_names
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none; ingest it with --maps"
            raise UserError(f"{shown(self.location)} has no maps '{name}': {there}")
        if name not in self._maps:
            is_old = name == LABEL and self.description.labels
            stored, beginning = (LABELS, "label") if is_old else (map_column(name), map_column(name))
            self._maps[name] = self._column(
                stored, self.description.shape, "int16", f"{beginning}_checksum", f"{beginning}_offset"
            )
        return self._maps[name]

    @cached_property
    def _maps(self) -> dict[str, _Column]:
        return {}

    def _read_column(
        self,
        column: _Column,
        wanted: npt.NDArray[np.int64],
        verify: bool,
        out: StoredVoxels | None,
        boxes: Boxes | None,
    ) -> StoredVoxels:
        cut = column.shape if boxes is None else (*column.shape[:-3], *shape_of(boxes, column.shape[-3:]))
        shape = (len(wanted), *cut)
        if boxes is not None and len(boxes) != len(wanted):
            raise ValueError(f"{len(boxes)} boxes cannot be read from {len(wanted)} rows")
        stored = np.empty(shape, dtype=column.dtype) if out is None else out
        if stored.shape != shape or stored.dtype != column.dtype:
            raise ValueError(f"out must be {column.dtype} {shape}, got {stored.dtype} {stored.shape}")
        if boxes is None:
            self._read_into(stored, column, wanted, verify)
        elif column.offset is None or is_url(self.location):
            self._cut_out(stored, column, wanted, boxes)
        else:
            self._read_boxes(stored, column, wanted, boxes)
        return stored

    def _cut_out(
        self, stored: StoredVoxels, column: _Column, wanted: npt.NDArray[np.int64], boxes: Boxes
    ) -> None:
        """Fill `stored` with boxes of whole volumes, each of which is read once while its row stays the same."""
        whole = np.empty((1, *column.shape), dtype=column.dtype)
        for place, (row, box) in enumerate(zip(wanted, boxes, strict=True)):
            if place == 0 or row != wanted[place - 1]:
                self._read_into(whole, column, wanted[place : place + 1], verify=True)
            stored[place] = whole[0][..., *box]

    def _read_boxes(
        self, stored: StoredVoxels, column: _Column, wanted: npt.NDArray[np.int64], boxes: Boxes
    ) -> None:
        """Fill `stored` with boxes of plain shards, of which only the pages are read in which a box lies.

        No detour by shard: looking a slice up must not take longer than copying it.
        """
        assert column.offset is not None
        size, contents = math.prod(column.shape) * column.kept.itemsize, dict[str, memoryview]()
        for into, row, offset, box in zip(stored, wanted, column.offset[wanted].tolist(), boxes, strict=True):
            try:
                shard = self._shards[row]
                if shard not in contents:
                    contents[shard] = mapped(os.path.join(self.location, SHARDS, shard))
                if not 0 <= offset <= len(contents[shard]) - size:
                    raise EOFError("the file ends too early")
                into[...] = np.ndarray(column.shape, column.kept, contents[shard], offset)[..., *box]
            except _DAMAGE as error:
                reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
                raise self._damaged(row, reason.splitlines()[0]) from error

    def _column(
        self, name: str, shape: tuple[int, ...], dtype: StoredType, checksums: str, offsets: str
    ) -> _Column:
        needed = [checksums] if self.description.compression != "none" else [checksums, offsets]
        if missing := [column for column in needed if column not in self.manifest]:
            raise UserError(
                f"{beneath(self.location, MANIFEST)} lacks the columns {missing}; make the cohort again"
            )
        offset = self.manifest[offsets].to_numpy(dtype=np.int64) if len(needed) == 2 else None
        return _Column(
            name=name,
            shape=shape,
            dtype=np.dtype(dtype),
            kept=kept_as(self.description.storage, dtype),
            checksum=self.manifest[checksums].to_numpy(dtype=object),
            offset=offset,
        )

    def _read_into(
        self, stored: StoredVoxels, column: _Column, wanted: npt.NDArray[np.int64], verify: bool
    ) -> None:
        for _ in self._fill(column, wanted, lambda place: stored[place], verify):
            pass

    def _checked(self, rows: Rows) -> npt.NDArray[np.int64]:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            wrong = next(row for row in wanted if not 0 <= row < len(self))
            raise UserError(
                f"{shown(self.location)} has rows 0 to {len(self) - 1}, but row {wrong} was asked for"
            )
        return wanted

    def _fill(
        self,
        column: _Column,
        wanted: npt.NDArray[np.int64],
        target: Callable[[int], StoredVoxels],
        verify: bool,
    ) -> Iterator[int]:
        """Fill `target(place)` with the row at each place of `wanted`, shard by shard; yields the place."""
        for shard, places in self._by_shard(wanted):
            rows, done = wanted[places], 0
            targets = (target(place) for place in places)
            try:
                with open_file(self.location, f"{SHARDS}/{shard}") as file:
                    if column.offset is not None:
                        filling = read_pieces(file, column.kept, column.offset[rows].tolist(), targets)
                    else:
                        positions = self._positions[rows].tolist()
                        filling = read_compressed(
                            file, self.description.storage, column.name, positions, targets
                        )
                    for place, _ in zip(places, filling, strict=True):
                        if verify and checksum(target(place)) != column.checksum[wanted[place]]:
                            raise self._damaged(wanted[place], "its checksum does not match")
                        yield place
                        done += 1
            except _DAMAGE as error:
                reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
                raise self._damaged(rows[done], reason.splitlines()[0]) from error

    def _by_shard(self, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """Each shard with the places in `wanted` that it fills, in storage order."""
        shards = self._shards[wanted]
        for shard in sorted(set(shards)):
            places = np.flatnonzero(shards == shard)
            yield shard, places[np.argsort(self._positions[wanted[places]], kind="stable")]

    def _damaged(self, row: np.int64, reason: str) -> UserError:
        shard = beneath(self.location, f"{SHARDS}/{self._shards[row]}")
        subject = self.manifest["subject"].iloc[row]
        return UserError(
            f"damaged volume: shard {shard}, row {row}, subject {subject}: {reason}; make the cohort again"
        )


def shape_of(boxes: Boxes, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels along X, Y and Z of each of `boxes` on a grid (X, Y, Z); the whole grid if there is none.

    Raises:
        ValueError: they differ in shape, leave out voxels, or reach beyond the grid.
    """
    shape: tuple[int, ...] | None = None
    for box in boxes:
        x, y, z = box
        own = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
        for cut, side in zip(box, grid, strict=True):
            if not 0 <= cut.start < cut.stop <= side or cut.step not in (None, 1):
                raise ValueError(f"{cut} is no part of {side} voxels")
        if shape not in (None, own):
            raise ValueError(f"all boxes must have one shape, got {shape} and {own}")
        shape = own
    return grid if shape is None else shape


def scale_column(channel: str) -> str:
    """The column of the manifest with the factors of a channel stored as int16."""
    return f"scale_{channel}"
