"""Shards as Parquet files: one fixed-shape tensor column per column, one row per row group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError

ON_DISK = {"int16": np.dtype("int32")}
"""What a type is kept as where the format has no such narrow one."""
_ONE_PAGE = 2**30  # bytes: no volume is divided into pages, so its values lie in one piece


def pack(
    columns: Mapping[str, Sequence[npt.NDArray[Any]]], compression: str
) -> tuple[memoryview, dict[str, list[int]]]:
    """The bytes of a file that holds each column as tensors, and where the values of each begin in them.

    Equal volumes give equal bytes. Places are given only without compression: then the values of one row
    are the last part of its column chunk (plain encoding, one page), as in memory but for `ON_DISK`.
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


def unpack(file: BinaryIO, column: str, positions: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """The arrays of a column at `positions`, decompressed; OSError, ValueError, … where the file is damaged."""
    opened = pq.ParquetFile(file)
    for position in positions:
        yield opened.read_row_group(position, columns=[column]).column(column).chunk(0).to_numpy_ndarray()[0]


def _tensor(array: npt.NDArray[Any]) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape)


def _as_arrow(array: npt.NDArray[Any]) -> pa.ExtensionArray:
    kind = _tensor(array)
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.ExtensionArray.from_storage(
        kind, pa.FixedSizeListArray.from_arrays(values, type=kind.storage_type)
    )


def _begin(image: pa.Buffer, chunk: pq.ColumnChunkMetaData, array: npt.NDArray[Any]) -> int:
    kept = np.ascontiguousarray(array, dtype=ON_DISK.get(str(array.dtype), array.dtype))
    begin = int(chunk.data_page_offset + chunk.total_uncompressed_size - kept.nbytes)
    if image[begin : begin + kept.nbytes] != pa.py_buffer(kept):
        raise UserError(
            f"a volume of {kept.nbytes / 1e6:,.0f} MB does not fit a Parquet page; use --format hdf5"
        )
    return begin
