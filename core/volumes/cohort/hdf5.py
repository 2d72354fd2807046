"""Shards as HDF5 files: one dataset per column, one volume per chunk."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

import h5py

# registers the filters that reading needs, too
import hdf5plugin
import numpy as np

from core.files.places import OpenFile
from core.volumes.cohort.stored import StoredVoxels

FILTERS: dict[str, Mapping[str, object]] = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
    "zstd": hdf5plugin.Zstd(clevel=3),
    "blosc": hdf5plugin.Blosc(cname="zstd", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE),
}


def pack(
    columns: Mapping[str, Sequence[StoredVoxels]], compression: str
) -> tuple[memoryview, dict[str, list[int]]]:
    """The bytes of a file that holds each column as a dataset (n, …), and the byte at which each volume begins.

    Equal volumes give equal bytes. The second value is empty with compression. The file is built in memory,
    because on a full disk HDF5 ends the whole process (segmentation fault on closing, h5py 3.16), while a
    plain write raises an error.
    """
    image = io.BytesIO()
    offsets: dict[str, list[int]] = {}
    with h5py.File(image, "w") as file:
        for name, arrays in columns.items():
            shape = arrays[0].shape
            dataset = file.create_dataset(
                name,
                shape=(len(arrays), *shape),
                dtype=arrays[0].dtype,
                chunks=(1, *shape),
                track_times=False,  # a time stamp would make equal cohorts differ
                **FILTERS[compression],
            )
            for position, array in enumerate(arrays):
                dataset[position] = array
            if compression == "none":
                file.flush()
                starts = [(position, *(0 for _ in shape)) for position in range(len(arrays))]
                offsets[name] = [dataset.id.get_chunk_info_by_coord(start).byte_offset for start in starts]
    return image.getbuffer(), offsets


def unpack(file: OpenFile, column: str, positions: Sequence[int]) -> Iterator[StoredVoxels]:
    """The arrays of a column at `positions`, decompressed; OSError, KeyError, … where the file is damaged."""
    with h5py.File(file, "r") as opened:
        # Others may have written the file: links, external storage and virtual data sets read other files.
        is_own = isinstance(opened.get(column, getlink=True), h5py.HardLink)
        dataset = opened[column] if is_own else None
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise OSError(f"'{column}' is not stored in the file itself")
        for position in positions:
            yield np.asarray(dataset[position])
