"""The formats that a cohort can be stored in."""

from __future__ import annotations

from typing import Literal

StoredType = Literal["float16", "float32", "int16"]
"""How voxels are stored; int16 with a scale for each volume and channel."""
Storage = Literal["hdf5", "parquet"]
"""The file format of the shards."""
Compression = Literal["none", "gzip", "zstd", "blosc"]
