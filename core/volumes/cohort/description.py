"""What `cohort.json` says: everything that holds for all volumes of a cohort, and the names of its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import UserError
from core.files.places import beneath, is_url, open_file, shown
from core.volumes.cohort.formats import Compression, Storage, StoredType
from core.volumes.cohort.shards import map_column

FORMAT = 3
OLDEST_FORMAT = 2
LABEL = "label"
"""The name of the one map of format 2."""
DESCRIPTION, MANIFEST, SHARDS, REJECTS = "cohort.json", "manifest.parquet", "shards", "rejects.csv"

Spacing = float | tuple[float, float, float]
"""Edges of a voxel in mm: one number if all are equal."""

Side = Annotated[int, Field(ge=1, le=2048)]
"""Voxels along an axis; more than 2,048 are a damaged or planted file."""


class CohortDescription(BaseModel):
    """What `cohort.json` says: everything that holds for all volumes of a cohort."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    channels: tuple[str, ...] = Field(description="what each channel shows, such as T1w or stiffness")
    shape: tuple[Side, Side, Side] = Field(description="voxels along X, Y, Z")
    spacing: Annotated[float, Field(gt=0)] | tuple[float, float, float] = Field(
        description="edge of a voxel in mm, or its edges along X, Y and Z where they differ"
    )
    affine: tuple[tuple[float, ...], ...] = Field(description="4 x 4, voxel index to RAS mm of the grid")
    dtype: StoredType = Field(description="how voxels are stored; `read` always gives float32")
    storage: Storage = Field(default="hdf5", description="file format of the shards")
    compression: Compression = "none"
    labels: bool = Field(
        default=False, description="format 2: whether a map of classes goes with every volume"
    )
    maps: tuple[str, ...] = Field(default=(), description="names of the maps of classes that scans may have")
    preprocessing: dict[str, object] = Field(
        description="settings of the pipeline that made the volumes, as plain JSON values"
    )
    preprocessing_hash: str
    hash: str = Field(description="of every subject, age and stored byte, and of the preprocessing")
    source: str = Field(description="the folder or generator that the volumes come from")
    synthetic: bool = Field(description="true for phantoms: no number from them speaks about people")
    versions: dict[str, str] = Field(description="of the packages that wrote the cohort")
    provenance: dict[str, str] = Field(default={}, description="further facts on how it was made")
    digests: dict[str, str] = Field(default={}, description="sha256 of every other file of the cohort")
    digest: str = Field(default="", description="sha256 of cohort.json itself with these digits left out")
    format: int = Field(default=FORMAT, description="version of this layout")

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps of classes that scans of this cohort may have."""
        return (*self.maps, LABEL) if self.labels else self.maps

    @property
    def edges(self) -> tuple[float, float, float]:
        """Edges of a voxel along X, Y and Z in mm."""
        return edges_of(self.spacing)


def edges_of(spacing: Spacing) -> tuple[float, float, float]:
    """Edges of a voxel along X, Y and Z in mm."""
    return spacing if isinstance(spacing, tuple) else (spacing, spacing, spacing)


def spacing_in_words(spacing: Spacing) -> str:
    """`4 mm`, or `1 x 1 x 5 mm`."""
    return (
        f"{spacing:g} mm" if not isinstance(spacing, tuple) else f"{' x '.join(f'{e:g}' for e in spacing)} mm"
    )


def read_file(location: str, name: str) -> bytes:
    """All bytes of one file of a cohort."""
    with open_file(location, name) as file:
        return file.read()


def read_description(location: str) -> CohortDescription:
    """What cohort.json says; UserError if it is not there, is damaged or has another format."""
    path = beneath(location, DESCRIPTION)
    try:
        text = read_file(location, DESCRIPTION)
    except (FileNotFoundError, NotADirectoryError):
        if not is_url(location) and (Path(location) / SHARDS).is_dir():
            raise UserError(
                f"{shown(location)} is an incomplete cohort (no {DESCRIPTION}); run the same command again to finish it"
            ) from None
        raise UserError(
            f"{shown(location)} is not a cohort (no {DESCRIPTION}); make one with `phantom` or `ingest`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        fields = json.loads(text)
        made_by = int(fields.get("format", 1)) if isinstance(fields, dict) else FORMAT
        if made_by > FORMAT:
            raise UserError(
                f"{path} has format {made_by}, this version reads format {FORMAT}; update brainsweep"
            )
        if made_by < OLDEST_FORMAT:
            raise UserError(
                f"{path} has format {made_by}, this version reads format {OLDEST_FORMAT} to {FORMAT}; make the cohort "
                "again"
            )
        return CohortDescription.model_validate(fields)
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); make the cohort again") from error


def map_source(name: str) -> str:
    """The column of a manifest with the file of every scan's map `name`, as in `source`."""
    return f"{map_column(name)}_source"


def stored_voxel_ml(manifest: pd.DataFrame, edges: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """How much of a person is in a voxel of the grid, in mL, scan by scan (N,).

    A registered brain is stretched to the template, so its voxels are of another size than the edges say.
    """
    whole = float(np.prod(edges)) / 1000
    if "affine" not in manifest:
        return np.full(len(manifest), whole)
    return np.array(
        [
            whole if rows is None or len(rows) != 12 else _determinant(rows) / 1000
            for rows in manifest["affine"]
        ]
    )


def _determinant(rows: Sequence[float]) -> float:
    return abs(float(np.linalg.det(np.asarray(rows, dtype=np.float64).reshape(3, 4)[:, :3])))


def has_map(manifest: pd.DataFrame, name: str) -> npt.NDArray[np.bool_]:
    """Which rows (N,) of a manifest have the map `name`.

    Raises:
        UserError: none of them has; the message says which maps there are.
    """
    old = {LABEL: "label_checksum"} if "label_checksum" in manifest else {}
    known = old | {
        str(column).removeprefix(map_column("")).removesuffix("_checksum"): str(column)
        for column in manifest.columns
        if str(column).startswith(map_column("")) and str(column).endswith("_checksum")
    }
    if name not in known:
        there = f"it has {', '.join(known)}" if known else "it has none; ingest it with --maps"
        raise UserError(f"the cohort has no maps '{name}': {there}")
    having: npt.NDArray[np.bool_] = manifest[known[name]].fillna("").astype(str).to_numpy() != ""
    return having


def numbers_in_maps(manifest: pd.DataFrame, name: str) -> set[int] | None:
    """The numbers that the maps `name` of a cohort hold; None if its manifest does not say, as before version 0.4."""
    column = f"{map_column(name)}_numbers"
    if column not in manifest:
        return None
    return {int(number) for text in manifest[column].fillna("") for number in str(text).split(",") if number}
