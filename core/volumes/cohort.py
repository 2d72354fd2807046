"""A cohort: a folder of preprocessed volumes, and one table row for each subject.

    cohort.json        what it is (`CohortDescription`); written last, so its presence means "complete"
    manifest.parquet   one row per subject: where its volume lies, age, sex, site, checksum, origin
    shards/00000.h5 …  dataset "volumes" (n, C, X, Y, Z), one volume per chunk

Volumes are (C, X, Y, Z) in RAS order: X runs from left to right. 0 is background outside the brain.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import UserError
from core.volumes.shards import checksum, fingerprint, read_shard, replacing, widen, write_shard, writing_to

FORMAT = 1
DESCRIPTION, MANIFEST, SHARDS = "cohort.json", "manifest.parquet", "shards"
COLUMNS = ("subject", "shard", "position", "age", "sex", "site", "checksum", "source")
OWN_FILES = {DESCRIPTION, MANIFEST, SHARDS, "rejects.csv"}

StoredType = Literal["float16", "float32"]


class CohortDescription(BaseModel):
    """What `cohort.json` says: everything that holds for all volumes of a cohort."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    channels: tuple[str, ...] = Field(description="what each channel shows, such as T1w or stiffness")
    shape: tuple[int, int, int] = Field(description="voxels along X, Y, Z")
    spacing: float = Field(description="edge of a voxel in mm", gt=0)
    affine: tuple[tuple[float, ...], ...] = Field(description="4 x 4, voxel index to RAS mm of the grid")
    dtype: StoredType = Field(description="how voxels are stored; `read` always gives float32")
    preprocessing: dict[str, Any] = Field(description="settings of the pipeline that made the volumes")
    preprocessing_hash: str
    hash: str = Field(description="of every subject, age and stored byte, and of the preprocessing")
    source: str = Field(description="the folder or generator that the volumes come from")
    synthetic: bool = Field(description="true for phantoms: no number from them speaks about people")
    versions: dict[str, str] = Field(description="of the packages that wrote the cohort")
    provenance: dict[str, str] = Field(default={}, description="further facts on how it was made")
    format: int = FORMAT


class _Places(NamedTuple):
    """The columns that reading needs, as arrays: looking up a data frame would cost more than the read."""

    shard: npt.NDArray[np.object_]
    position: npt.NDArray[np.int64]
    checksum: npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Cohort:
    """A complete cohort on disk. Holds no open file: safe to pickle, fork and share between threads."""

    folder: Path
    description: CohortDescription
    manifest: pd.DataFrame
    """Columns `COLUMNS` and any further ones of the source; the RangeIndex "row" is what `read` takes."""

    @classmethod
    def open(cls, folder: str | Path) -> Cohort:
        """The cohort in `folder`; UserError if there is none, or it is incomplete, damaged or too new."""
        folder = Path(folder)
        description = _read_description(folder)
        try:
            manifest = pd.read_parquet(folder / MANIFEST).rename_axis(index="row")
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(f"{folder / MANIFEST} is missing or damaged; make the cohort again") from error
        if missing := [column for column in COLUMNS if column not in manifest]:
            raise UserError(f"{folder / MANIFEST} lacks the columns {missing}; make the cohort again")
        return cls(folder, description, manifest)

    def __len__(self) -> int:
        return len(self.manifest)

    def read(self, rows: Sequence[int] | npt.NDArray[Any], *, verify: bool = True) -> npt.NDArray[np.float32]:
        """Volumes (n, C, X, Y, Z) float32 of the manifest's `rows`, in the order asked, repeats allowed.

        Each shard is opened once per call and read in storage order. With `verify` every volume is held
        against its checksum (0.4 ms for 91x109x91 in float16, about as long as reading it). UserError
        names shard, row and subject of a damaged volume.
        """
        wanted = self._checked(rows)
        volumes = np.empty((len(wanted), *self.volume_shape), dtype=np.float32)
        for shard, places in self._by_shard(wanted):
            for place, stored in zip(places, self._stored(shard, wanted[places]), strict=True):
                if verify and checksum(stored) != self._places.checksum[wanted[place]]:
                    raise self._damaged(wanted[place], "its checksum does not match")
                widen(stored, volumes[place])
        return volumes

    @property
    def volume_shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z)."""
        return (len(self.description.channels), *self.description.shape)

    @cached_property
    def _places(self) -> _Places:
        return _Places(*(self.manifest[name].to_numpy(dtype=kind) for name, kind in
                         (("shard", object), ("position", np.int64), ("checksum", object))))  # fmt: skip

    def _checked(self, rows: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            wrong = next(row for row in wanted if not 0 <= row < len(self))
            raise UserError(f"{self.folder} has rows 0 to {len(self) - 1}, but row {wrong} was asked for")
        return wanted

    def _by_shard(self, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """Each shard with the places in `wanted` that it fills, in storage order."""
        shards = self._places.shard[wanted]
        for shard in sorted(set(shards)):
            places = np.flatnonzero(shards == shard)
            yield shard, places[np.argsort(self._places.position[wanted[places]], kind="stable")]

    def _stored(self, shard: str, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
        """Volumes of one shard as stored, with errors that name the subject."""
        done = 0
        try:
            for stored in read_shard(self.folder / SHARDS / shard, self._places.position[rows].tolist()):
                if stored.shape != self.volume_shape or stored.dtype != self.description.dtype:
                    raise self._damaged(rows[done], f"it holds {stored.dtype} {stored.shape}")
                yield stored
                done += 1
        except (OSError, KeyError, IndexError, ValueError, RuntimeError) as error:
            reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise self._damaged(rows[done], reason.splitlines()[0]) from error

    def _damaged(self, row: np.int64, reason: str) -> UserError:
        shard, subject = self.folder / SHARDS / self._places.shard[row], self.manifest["subject"].iloc[row]
        return UserError(
            f"damaged volume: shard {shard}, row {row}, subject {subject}: {reason}; make the cohort again"
        )


def _read_description(folder: Path) -> CohortDescription:
    path = folder / DESCRIPTION
    if not path.is_file():
        if (folder / SHARDS).is_dir():
            raise UserError(f"{folder} is an incomplete cohort (no {DESCRIPTION}); make it again")
        raise UserError(f"{folder} is not a cohort (no {DESCRIPTION}); make one with `phantom` or `ingest`")
    try:
        fields = json.loads(path.read_text())
        if isinstance(fields, dict) and int(fields.get("format", FORMAT)) > FORMAT:
            raise UserError(
                f"{path} has format {fields['format']}, this version reads up to {FORMAT}; update brainsweep"
            )
        return CohortDescription.model_validate(fields)
    except (OSError, ValidationError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); make the cohort again") from error


class CohortWriter:
    """Writes a cohort volume by volume, holding one shard in memory; use it as a context manager.

    A cohort that was not finished has no `cohort.json`: `Cohort.open` refuses it, and the next writer
    starts over in its place. After the block, `Cohort.open(folder)` gives the cohort.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        channels: Sequence[str],
        shape: Sequence[int],
        spacing: float,
        affine: npt.ArrayLike,
        dtype: StoredType = "float16",
        preprocessing: Mapping[str, Any] | None = None,
        source: str = "",
        synthetic: bool = False,
        volumes_per_shard: int = 64,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        settings = dict(preprocessing or {})
        self.folder = Path(folder)
        self.description = CohortDescription(
            name=name,
            channels=tuple(channels),
            shape=tuple(int(size) for size in shape),  # pydantic wants three
            spacing=float(spacing),
            affine=tuple(tuple(float(value) for value in row) for row in np.asarray(affine)),
            dtype=dtype,
            preprocessing=settings,
            preprocessing_hash=fingerprint(settings),
            hash="",
            source=source,
            synthetic=synthetic,
            versions=_versions(),
            provenance=dict(provenance or {}),
        )
        self._volumes_per_shard = volumes_per_shard
        self._waiting: list[npt.NDArray[Any]] = []
        self._records: list[dict[str, Any]] = []
        self._subjects: set[str] = set()

    @property
    def count(self) -> int:
        """Volumes added so far."""
        return len(self._records)

    def __enter__(self) -> Self:
        prepare_folder(self.folder)
        return self

    def add(
        self,
        volume: npt.NDArray[Any],
        /,
        *,
        subject: str,
        age: float,
        sex: str = "",
        site: str = "",
        source: str = "",
        **extra: Any,
    ) -> None:
        """Append one volume (C, X, Y, Z) with its labels; `extra` become further columns of the manifest.

        Raises UserError, naming the subject, for a wrong shape, voxels that are not finite or do not fit
        the stored type, an age that is not a number, a subject that is already there, or a full disk.
        """
        if subject in self._subjects:
            raise UserError(f"subject {subject} was added twice; a cohort has one row per subject")
        if not math.isfinite(age):
            raise UserError(f"subject {subject} has age {age}; it must be a number of years")
        if taken := sorted(set(extra) & {"row", *COLUMNS}):
            raise UserError(f"subject {subject}: {taken} are columns of the manifest itself; rename them")
        stored = self._as_stored(volume, subject)
        self._records.append({
            "subject": subject, "shard": self._shard_name, "position": len(self._waiting), "age": float(age),
            "sex": sex, "site": site, "checksum": checksum(stored), "source": source, **extra,
        })  # fmt: skip
        self._subjects.add(subject)
        self._waiting.append(stored)
        if len(self._waiting) == self._volumes_per_shard:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if not self._records:
                _discard(self.folder)
                raise UserError(f"no volume was added to {self.folder}; a cohort needs at least one")
            self._finish()
        else:
            _discard(self.folder)

    @property
    def _shard_name(self) -> str:
        return f"{len(self._records) // self._volumes_per_shard:05d}.h5"

    def _as_stored(self, volume: npt.NDArray[Any], subject: str) -> npt.NDArray[Any]:
        expected = (len(self.description.channels), *self.description.shape)
        if volume.shape != expected:
            raise UserError(f"subject {subject}: volume must have shape {expected}, got {volume.shape}")
        if not np.isfinite(volume).all():
            raise UserError(f"subject {subject}: {np.sum(~np.isfinite(volume))} voxels are NaN or infinite")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(volume, dtype=self.description.dtype)
        if not np.isfinite(stored).all():
            limit = np.finfo(stored.dtype).max
            raise UserError(
                f"subject {subject}: {np.abs(volume).max():g} is above {limit:g}, the largest "
                f"{self.description.dtype}; store the cohort as float32"
            )
        return stored

    def _flush(self) -> None:
        with writing_to(self.folder):
            write_shard(self.folder / SHARDS / self._records[-1]["shard"], np.stack(self._waiting))
        self._waiting.clear()

    def _finish(self) -> None:
        if self._waiting:
            self._flush()
        manifest = pd.DataFrame(self._records).rename_axis(index="row")
        description = self.description.model_copy(
            update={"hash": _cohort_hash(manifest, self.description.preprocessing_hash)}
        )
        with writing_to(self.folder):
            with replacing(self.folder / MANIFEST) as temporary:
                manifest.to_parquet(temporary)
            with replacing(self.folder / DESCRIPTION) as temporary:
                temporary.write_text(description.model_dump_json(indent=2) + "\n")


def prepare_folder(folder: Path) -> None:
    """Make an empty cohort folder: clears an unfinished cohort away, refuses a folder of anything else."""
    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} already holds a complete cohort; choose another folder or delete it")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in OWN_FILES:  # what a killed process left; see `replacing`
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        if foreign := sorted({entry.name for entry in folder.iterdir()} - OWN_FILES):
            raise UserError(f"{folder} holds other files, such as {foreign[0]}; choose an empty folder")
        _discard(folder)
        (folder / SHARDS).mkdir(parents=True)


def _discard(folder: Path) -> None:
    """Remove what an unfinished writer left, and the folder where nothing else is in it."""
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _cohort_hash(manifest: pd.DataFrame, preprocessing_hash: str) -> str:
    """sha256 over what training sees: subjects, ages, stored bytes and the preprocessing that made them."""
    rows = manifest[["subject", "age", "sex", "site", "checksum"]].to_numpy().tolist()
    return fingerprint({"preprocessing": preprocessing_hash, "rows": rows})


def _versions() -> dict[str, str]:
    packages = ("numpy", "scipy", "nibabel", "h5py", "pandas", "pyarrow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
