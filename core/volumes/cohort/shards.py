"""Shards: files of many volumes, written in one step, and read one volume at a time.

Without compression each volume lies in one piece in its file, in HDF5 as in Parquet: the manifest keeps its
offset, so reading a volume is one `seek` and one `readinto`, without a library and without a copy.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.files.places import OpenFile
from core.files.writing import replacing
from core.lookup import look_up
from core.volumes.cohort import hdf5, parquet
from core.volumes.cohort.formats import Compression, Storage, StoredType
from core.volumes.cohort.stored import StoredVoxels

ENDINGS: dict[str, str] = {"hdf5": "h5", "parquet": "parquet"}
COMPRESSIONS: dict[str, tuple[str, ...]] = {
    "hdf5": tuple(hdf5.FILTERS),
    "parquet": ("none", "gzip", "zstd"),
}
_PACK = {"hdf5": hdf5.pack, "parquet": parquet.pack}
_UNPACK: dict[str, Callable[[OpenFile, str, Sequence[int]], Iterator[StoredVoxels]]] = {
    "hdf5": hdf5.unpack,
    "parquet": parquet.unpack,
}

VOLUMES, LABELS = "volumes", "labels"
"""Columns of a shard: volumes, and the one map of classes of format 2."""
_WORDS = 1021  # a prime, so that two exchanged disk sectors do not meet in the same words


MOST_NUMBERS = 64
"""Of a map that a manifest keeps: more are no classes."""
Fact = str | int | float | list[float]
"""What one cell of the manifest holds; the list is an affine's."""


def map_column(name: str) -> str:
    """The column of a shard with the maps of this name."""
    return f"map_{name}"


KeptDtype = np.dtype[np.float16 | np.float32 | np.int16 | np.int32]


class Written(NamedTuple):
    """What a shard adds to the manifest."""

    rows: list[dict[str, Fact]]
    """For each volume `shard`, `position`, `checksum`, `offset`; for each map `map_NAME_checksum` ("" if the scan has
    none), `map_NAME_offset`."""
    digest: str
    """sha256 of the file."""


def checksum(stored: StoredVoxels) -> str:
    """Eight hexadecimal digits that tell whether the bytes of one stored volume are what was written.

    Rows of 1021 eight-byte words are combined by exclusive or; the checksum is the CRC-32 of the result and
    of the remaining bytes. This is ten times as fast as a CRC-32 of all bytes (40 against 4 GB/s), which would
    take longer than reading. A changed byte changes one byte of the result, so CRC-32 always finds it; other
    damage is missed with a probability of 2^-32, unless it repeats itself in the same words.
    """
    content = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    words = content[: content.size // (8 * _WORDS) * 8 * _WORDS].view(np.uint64).reshape(-1, _WORDS)
    folded = zlib.crc32(np.bitwise_xor.reduce(words, axis=0).data) if len(words) else 0
    return f"{zlib.crc32(content[words.nbytes :].data, folded):08x}"


def check_storage(storage: str, compression: str) -> None:
    """UserError for a storage that does not exist, or a compression that it does not have."""
    if compression not in look_up(COMPRESSIONS, storage, "format"):
        raise UserError(
            f"{storage} shards cannot be compressed by '{compression}'; known: {', '.join(COMPRESSIONS[storage])}"
        )


def write_shard(
    path: Path,
    volumes: Sequence[StoredVoxels],
    maps: Mapping[str, Sequence[npt.NDArray[np.int16] | None]],
    storage: Storage,
    compression: Compression,
) -> Written:
    """Write volumes (C, X, Y, Z) and their maps of classes (X, Y, Z) by name as one shard.

    A scan without a map has zeros in its place. Equal volumes give equal bytes. Raises OSError where `path` cannot be
    written (see `writing_to`).
    """
    nothing = np.zeros(volumes[0].shape[1:], dtype=np.int16)
    columns: dict[str, Sequence[StoredVoxels]] = {VOLUMES: volumes} | {
        map_column(name): [nothing if each is None else each for each in several]
        for name, several in maps.items()
    }
    image, offsets = _PACK[storage](columns, compression)
    with replacing(path) as temporary:
        temporary.write_bytes(image)
    facts: dict[str, Sequence[Fact]] = {"checksum": [checksum(volume) for volume in volumes]}
    if offsets:
        facts["offset"] = offsets[VOLUMES]
    for name, several in maps.items():
        facts[f"{map_column(name)}_checksum"] = ["" if each is None else checksum(each) for each in several]
        facts[f"{map_column(name)}_numbers"] = [
            "" if each is None else ",".join(map(str, np.unique(each)[:MOST_NUMBERS])) for each in several
        ]
        if offsets:
            facts[f"{map_column(name)}_offset"] = offsets[map_column(name)]
    rows: list[dict[str, Fact]] = [
        {
            "shard": path.name,
            "position": position,
            **{name: values[position] for name, values in facts.items()},
        }
        for position in range(len(volumes))
    ]
    return Written(rows, hashlib.sha256(image).hexdigest())


def kept_as(storage: str, dtype: StoredType) -> KeptDtype:
    """The type whose bytes lie in an uncompressed file for values of `dtype`."""
    kept = np.dtype(dtype)
    return parquet.ON_DISK.get(str(kept), kept) if storage == "parquet" else kept


def read_pieces(
    file: OpenFile, kept: KeptDtype, offsets: Sequence[int], targets: Iterator[StoredVoxels]
) -> Iterator[None]:
    """Fill one target after the other with the values, `kept` in the file, that begin at each offset.

    Raises EOFError if the file ends before.
    """
    for offset, target in zip(offsets, targets, strict=True):
        values = target if kept == target.dtype else np.empty(target.shape, dtype=kept)
        left = values.reshape(-1).view(np.uint8).data
        file.seek(offset)
        while left:
            if not (count := file.readinto(left)):
                raise EOFError("the file ends too early")
            left = left[count:]
        if values is not target:
            target[:] = values
        yield


def mapped(path: str) -> memoryview:
    """The content of a file as memory of this process; its pages are read when they are used.

    The files used last stay mapped, because mapping one takes longer than reading a slice. One that has changed, or
    has become shorter, is mapped anew; beyond the end of a file the memory does not exist.
    """
    found = os.stat(path)
    return _mapped(path, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=128)
def _mapped(path: str, size: int, changed: int, inode: int) -> memoryview:
    with open(path, "rb") as file:
        return (
            memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
        )


def read_compressed(
    file: OpenFile, storage: str, column: str, positions: Sequence[int], targets: Iterator[StoredVoxels]
) -> Iterator[None]:
    """Fill one target after the other with a column's array at each position, by the format's library."""
    for array, target in zip(_UNPACK[storage](file, column, positions), targets, strict=True):
        if array.shape != target.shape or array.dtype != target.dtype:
            raise ValueError(f"it holds {array.dtype} {array.shape}")
        target[:] = array
        yield
