"""Writing a cohort: volume by volume with `CohortWriter`, or from shards that are already written (`finish_cohort`)."""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.files.writing import replacing, writing_to
from core.volumes.cohort.description import (
    DESCRIPTION,
    FORMAT,
    MANIFEST,
    REJECTS,
    SHARDS,
    CohortDescription,
    Spacing,
)
from core.volumes.cohort.formats import Compression, Storage, StoredType
from core.volumes.cohort.reader import COLUMNS, scale_column
from core.volumes.cohort.shards import (
    ENDINGS,
    Fact,
    Written,
    check_storage,
    map_column,
    write_shard,
)
from core.volumes.cohort.stored import StoredVoxels, encode, encode_label
from core.volumes.images.nifti import Volume

UNFINISHED = "unfinished"
"""Folder with the state of an unfinished ingest; removed when the cohort is complete."""
SHARD_BYTES, MOST_IN_MEMORY = 64 * 10**6, 64
"""How large a shard becomes, about, and how many volumes a writer keeps in memory for one, at most."""
OWN_FILES = {DESCRIPTION, MANIFEST, SHARDS, REJECTS, UNFINISHED, "quality.html"}
RESERVED = {"row", *COLUMNS, "offset", "label_offset", "label_checksum"}
"""Columns that a source must not have; those of `scale_column` and `map_column` neither."""


def describe_cohort(
    *,
    name: str,
    channels: Sequence[str],
    shape: Sequence[int],
    spacing: Spacing,
    affine: npt.ArrayLike,
    dtype: StoredType = "float16",
    storage: Storage = "hdf5",
    compression: Compression = "none",
    maps: Sequence[str] = (),
    preprocessing: Mapping[str, object] | None = None,
    source: str = "",
    synthetic: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> CohortDescription:
    """The description of a cohort that is still to be written; UserError for an unknown storage."""
    check_storage(storage, compression)
    settings = dict(preprocessing or {})
    return CohortDescription(
        name=name,
        channels=tuple(channels),
        shape=tuple(int(size) for size in shape),  # pydantic wants three
        spacing=spacing if isinstance(spacing, tuple) else float(spacing),
        affine=tuple(tuple(float(value) for value in row) for row in np.asarray(affine)),
        dtype=dtype,
        storage=storage,
        compression=compression,
        maps=tuple(maps),
        preprocessing=settings,
        preprocessing_hash=fingerprint(settings),
        hash="",
        source=source,
        synthetic=synthetic,
        versions=_versions(),
        provenance=dict(provenance or {}),
        format=FORMAT,
    )


def volume_bytes(description: CohortDescription) -> int:
    """Bytes of one stored volume and its maps."""
    voxels = math.prod(description.shape)
    per_voxel = len(description.channels) * np.dtype(description.dtype).itemsize + 2 * len(
        description.map_names
    )
    return voxels * per_voxel


class ShardInMemory:
    """The volumes and maps of one shard, in the stored type, before they are written."""

    def __init__(self, description: CohortDescription) -> None:
        self.description = description
        self._volumes: list[StoredVoxels] = []
        self._maps: dict[str, list[npt.NDArray[np.int16] | None]] = {name: [] for name in description.maps}
        self._rows: list[dict[str, Fact]] = []

    def __len__(self) -> int:
        return len(self._volumes)

    def add(
        self, volume: Volume, maps: Mapping[str, npt.NDArray[np.int16]], facts: Mapping[str, Fact]
    ) -> None:
        """Append a volume (C, X, Y, Z), those of the cohort's maps (X, Y, Z) that it has, and its columns.

        Raises UserError, without naming the subject, for what does not fit the cohort or the stored type.
        """
        expected = (len(self.description.channels), *self.description.shape)
        if volume.shape != expected:
            raise UserError(f"volume must have shape {expected}, got {volume.shape}")
        for name, classes in maps.items():
            if name not in self._maps:
                raise UserError(f"this cohort has no maps '{name}', only {', '.join(self._maps) or 'none'}")
            if classes.shape != self.description.shape:
                raise UserError(f"map '{name}' must have shape {self.description.shape}, got {classes.shape}")
        scales = [scale_column(channel) for channel in self.description.channels]
        ours = {
            f"{map_column(name)}_{end}" for name in self._maps for end in ("checksum", "numbers", "offset")
        }
        if taken := sorted(set(facts) & (RESERVED.difference(COLUMNS) | set(scales) | ours)):
            raise UserError(f"{taken} are columns of the manifest itself; rename them")
        stored, scale = encode(volume, self.description.dtype)
        encoded = {name: encode_label(classes) for name, classes in maps.items()}
        for name, several in self._maps.items():
            several.append(encoded.get(name))
        factors = dict(zip(scales, scale.tolist(), strict=True)) if self.description.dtype == "int16" else {}
        self._volumes.append(stored)
        self._rows.append({**facts, **factors})

    def write(self, shards: Path, index: int) -> Written:
        """Write shard number `index` into the folder `shards`; its rows are whole rows of the manifest."""
        path = shards / f"{index:05d}.{ENDINGS[self.description.storage]}"
        written = write_shard(
            path, self._volumes, self._maps, self.description.storage, self.description.compression
        )
        rows = [in_order({**facts, **place}) for facts, place in zip(self._rows, written.rows, strict=True)]
        return written._replace(rows=rows)


def in_order(row: Mapping[str, Fact]) -> dict[str, Fact]:
    """A row of the manifest with its own columns first."""
    return {name: row[name] for name in COLUMNS} | dict(row)


class CohortWriter:
    """Writes a cohort volume by volume, holding one shard in memory; use it as a context manager.

    A cohort that was not finished has no `cohort.json`: `Cohort.open` refuses it, and the next writer
    starts over in its place. After the block, `Cohort.open(folder)` gives the cohort. Takes the arguments
    of `describe_cohort`.
    """

    def __init__(
        self, folder: str | Path, *, volumes_per_shard: int | None = None, **description: Any
    ) -> None:
        self.folder = Path(folder)
        self.description = describe_cohort(**description)
        fitting = min(max(SHARD_BYTES // volume_bytes(self.description), 1), MOST_IN_MEMORY)
        self._volumes_per_shard = fitting if volumes_per_shard is None else volumes_per_shard
        self._waiting = ShardInMemory(self.description)
        self._written: list[Written] = []
        self._scans: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        prepare_folder(self.folder)
        return self

    def add(
        self,
        volume: Volume,
        /,
        *,
        subject: str,
        age: float = math.nan,
        session: str = "",
        sex: str = "",
        site: str = "",
        source: str = "",
        maps: Mapping[str, npt.NDArray[np.int16]] | None = None,
        **extra: Fact,
    ) -> None:
        """Append one volume (C, X, Y, Z) with its facts; `extra` become further columns of the manifest.

        `age` is NaN where it is unknown; `maps` (X, Y, Z) by name are those of the cohort's that this scan has.
        Raises UserError, naming the subject, for a wrong shape, voxels that are not finite or do not fit
        the stored type, an infinite age, a scan that is already there, or a full disk.
        """
        scan = f"subject {subject}" + (f", session {session}" if session else "")
        if (subject, session) in self._scans:
            raise UserError(f"{scan} was added twice; sessions tell scans of one subject apart")
        if math.isinf(age):
            raise UserError(f"{scan} has age {age}; it must be a number of years, or NaN if unknown")
        if taken := sorted(set(extra) & RESERVED):
            raise UserError(f"{scan}: {taken} are columns of the manifest itself; rename them")
        facts: dict[str, Fact] = {
            "subject": subject, "session": session, "age": float(age), "sex": sex, "site": site,
            "source": source, **extra,
        }  # fmt: skip
        try:
            self._waiting.add(volume, maps or {}, facts)
        except UserError as error:
            raise UserError(f"{scan}: {error}") from error
        self._scans.add((subject, session))
        if len(self._waiting) == self._volumes_per_shard:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if not self._scans:
                discard_shards(self.folder)
                raise UserError(f"no volume was added to {self.folder}; a cohort needs at least one")
            if len(self._waiting):
                self._flush()
            finish_cohort(self.folder, self.description, self._written)
        else:
            discard_shards(self.folder)

    def _flush(self) -> None:
        with writing_to(self.folder):
            self._written.append(self._waiting.write(self.folder / SHARDS, len(self._written)))
        self._waiting = ShardInMemory(self.description)


def finish_cohort(folder: Path, description: CohortDescription, written: Sequence[Written]) -> None:
    """Make a complete cohort of shards that lie in `folder`/shards: write its manifest, then `cohort.json`."""
    manifest = pd.DataFrame([row for shard in written for row in shard.rows]).rename_axis(index="row")
    with writing_to(folder):
        with replacing(folder / MANIFEST) as temporary:
            manifest.to_parquet(temporary)
        others = [name for name in (MANIFEST, REJECTS) if (folder / name).exists()]
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in others}
        digests |= {f"{SHARDS}/{shard.rows[0]['shard']}": shard.digest for shard in written if shard.rows}
        content = _hash_of_content(manifest, description.preprocessing_hash)
        whole = description.model_copy(update={"hash": content, "digests": digests, "digest": ""})
        own = hashlib.sha256(_rendered(whole)).hexdigest()
        with replacing(folder / DESCRIPTION) as temporary:
            temporary.write_bytes(_rendered(whole.model_copy(update={"digest": own})))


def prepare_folder(folder: Path) -> None:
    """Make an empty cohort folder: removes an unfinished cohort; UserError for a folder with other files."""
    claim_folder(folder)
    with writing_to(folder):
        discard_shards(folder)
        (folder / SHARDS).mkdir(parents=True)


def claim_folder(folder: Path) -> None:
    """Make `folder`, or take one that holds nothing but an unfinished cohort, which stays as it is."""
    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} already holds a complete cohort; choose another folder or delete it")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in OWN_FILES:
            # files of a killed process; see `replacing`
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        if foreign := sorted({entry.name for entry in folder.iterdir()} - OWN_FILES):
            raise UserError(f"{folder} holds other files, such as {foreign[0]}; choose an empty folder")


def discard_shards(folder: Path) -> None:
    """Remove the files of an unfinished writer, and the folder if it is then empty."""
    for name in (SHARDS, UNFINISHED):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _rendered(description: CohortDescription) -> bytes:
    return (description.model_dump_json(indent=2) + "\n").encode()


def _hash_of_content(manifest: pd.DataFrame, preprocessing_hash: str) -> str:
    """sha256 over what training sees: subjects, ages, stored bytes and the preprocessing that made them."""
    seen = ["subject", "session", "age", "sex", "site", "checksum"]
    columns = map(str, manifest.columns)
    ours = ("label_checksum", "scale_", "map_")
    seen += [
        name
        for name in columns
        if name.startswith(ours) and not name.endswith(("_numbers", "_offset", "_source"))
    ]
    rows = manifest[seen].astype({"age": object}).where(manifest[seen].notna(), None).to_numpy().tolist()
    return fingerprint({"preprocessing": preprocessing_hash, "rows": rows})


def _versions() -> dict[str, str]:
    packages = ("numpy", "scipy", "nibabel", "SimpleITK", "h5py", "hdf5plugin", "pandas", "pyarrow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
