"""Shards as Parquet files: one fixed-shape tensor column per column, one row per row group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from core.files.places import OpenFile
from core.volumes.cohort.stored import StoredVoxels

ON_DISK = {"int16": np.dtype("int32")}
"""The type in the file of values whose own type the format does not have."""
_ONE_PAGE = 2**30  # bytes: a volume is not divided into pages, so its values lie in one piece


def pack(
    columns: Mapping[str, Sequence[StoredVoxels]], compression: str
) -> tuple[memoryview, dict[str, list[int]]]:
    """The bytes of a file that holds each column as tensors, and the byte at which the values of each begin.

    Equal volumes give equal bytes. The second value is empty with compression; without, the values of one row
    are the last part of its column chunk (plain encoding, one page), as in memory except for `ON_DISK`.
    """
    schema = pa.schema(
        [pa.field(name, _tensor(arrays[0]), nullable=False) for name, arrays in columns.items()]
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        data_page_size=_ONE_PAGE,
    ) as writer:
        for row in zip(*columns.values(), strict=True):
            writer.write_batch(pa.record_batch([_as_arrow(array) for array in row], schema=schema))
    image = sink.getvalue()
    if compression != "none":
        return memoryview(image), {}
    groups = pq.read_metadata(pa.BufferReader(image))
    return memoryview(image), {
        name: [_begin(image, groups.row_group(row).column(place), array) for row, array in enumerate(arrays)]
        for place, (name, arrays) in enumerate(columns.items())
    }


def unpack(file: OpenFile, column: str, positions: Sequence[int]) -> Iterator[StoredVoxels]:
    """The arrays of a column at `positions`, decompressed; OSError, ValueError, … where the file is damaged."""
    opened = pq.ParquetFile(file)
    for position in positions:
        values = opened.read_row_group(position, columns=[column]).column(column).chunk(0)
        if not isinstance(values, pa.FixedShapeTensorArray):  # one flipped bit in the schema is enough
            raise ValueError(f"column {column!r} holds {values.type} instead of tensors")
        yield values.to_numpy_ndarray()[0]


def _tensor(array: StoredVoxels) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape)


def _as_arrow(array: StoredVoxels) -> pa.ExtensionArray:
    kind = _tensor(array)
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.ExtensionArray.from_storage(
        kind, pa.FixedSizeListArray.from_arrays(values, type=kind.storage_type)
    )


def _begin(image: pa.Buffer, chunk: pq.ColumnChunkMetaData, array: StoredVoxels) -> int:
    kept = np.ascontiguousarray(array, dtype=ON_DISK.get(str(array.dtype), array.dtype))
    begin = int(chunk.data_page_offset + chunk.total_uncompressed_size - kept.nbytes)
    if image[begin : begin + kept.nbytes] != pa.py_buffer(kept):
        raise UserError(
            f"a volume of {kept.nbytes / 1e6:,.0f} MB does not fit a Parquet page; use --format hdf5"
        )
    return begin
