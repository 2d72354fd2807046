"""Overlays: columns and maps that were computed once from a cohort, beside its files, which never change.

    COHORT/derived/index.json              the names of the overlays
    COHORT/derived/NAME/overlay.json       what it is (`OverlayDescription`); written last
    COHORT/derived/NAME/columns.parquet    one row per scan: the columns, and `seen`
    COHORT/derived/NAME/maps/              a cohort of its own whose volumes are the map NAME, row by row

An opened cohort has the columns and maps of its overlays as if they were its own. Its hash stays the same; a run
records the overlays that it found.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import UserError
from core.files.places import beneath
from core.files.writing import replacing, write_text, writing_to
from core.volumes.cohort.description import read_file

DERIVED, INDEX, OVERLAY, VALUES, MAPS = "derived", "index.json", "overlay.json", "columns.parquet", "maps"
SEEN = "seen"
"""The column that says whether what computed a row was trained on this scan."""


class OverlayDescription(BaseModel):
    """What overlay.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    columns: tuple[str, ...]
    cohort: str = Field(description="hash of the cohort that it belongs to")
    hash: str = Field(description="of the columns")
    made_by: str = Field(description="what computed it, in words")
    maps: tuple[str, ...] = Field(default=(), description="the map that it adds, of its own name")
    command: str = Field(default="", description="as it was typed")


@dataclass(frozen=True)
class Overlay:
    """An overlay, and its values for every row of the manifest."""

    description: OverlayDescription
    values: pd.DataFrame
    """(N rows) of `OverlayDescription.columns`; NaN where nothing could be computed."""
    seen: npt.NDArray[np.bool_]
    """(N,): what is known of this scan was computed by a model that was trained on it."""


def read_overlays(location: str, manifest: pd.DataFrame, cohort_hash: str) -> dict[str, Overlay]:
    """The overlays of a cohort, by name.

    Raises:
        UserError: one is damaged, belongs to other scans, or has a column that is there already.
    """
    try:
        names = json.loads(read_file(location, f"{DERIVED}/{INDEX}"))
        if not isinstance(names, list):
            raise ValueError("it is no list of names")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{beneath(location, f'{DERIVED}/{INDEX}')} is damaged: {error}") from None
    found, taken = dict[str, Overlay](), set(map(str, manifest.columns))
    for name in map(str, names):
        place = beneath(location, f"{DERIVED}/{name}")
        try:
            text = read_file(location, f"{DERIVED}/{name}/{OVERLAY}")
            content = read_file(location, f"{DERIVED}/{name}/{VALUES}")
            description = OverlayDescription.model_validate_json(text)
            table = pd.read_parquet(io.BytesIO(content))
            values = table[list(description.columns)]
            seen = table[SEEN].to_numpy(bool)
        except FileNotFoundError:
            # Somebody has deleted it.
            continue
        except (OSError, ValueError, KeyError, ValidationError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{place} is damaged ({first}); delete it, and derive it again") from None
        if description.hash != _hash(content):
            raise UserError(f"{place}/{VALUES} was changed; delete {place}, and derive it again")
        if description.cohort != cohort_hash or len(table) != len(manifest):
            raise UserError(f"{place} belongs to other scans; delete it, and derive it again")
        if twice := taken & set(description.columns):
            raise UserError(f"{place} has the column {min(twice)}, which the cohort has already; delete one")
        taken |= set(description.columns)
        found[name] = Overlay(description, values.set_axis(manifest.index), seen)
    return found


def check_new(cohort: Path, name: str, columns: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an overlay that is there, or whose columns are.

    Raises:
        UserError: naming what is in the way, and what would help.
    """
    place = cohort / DERIVED / name
    if (place / OVERLAY).exists():
        raise UserError(f"{place} is there already; give another --name, or delete it")
    if twice := sorted(set(columns) & set(known)):
        raise UserError(
            f"{cohort} has a column {twice[0]} already; give --name, which then begins the names of the columns: "
            f"--name predicted makes predicted_{twice[0]}"
        )


def describe_overlay(
    name: str, values: pd.DataFrame, seen: npt.NDArray[np.bool_], cohort_hash: str, *, made_by: str, command: str = "",
    maps: tuple[str, ...] = (),
) -> tuple[OverlayDescription, bytes]:  # fmt: skip
    """What overlay.json is to say, and the content of its columns: `values` of all rows of a cohort in their order."""
    buffer = io.BytesIO()
    values.assign(**{SEEN: seen}).reset_index(drop=True).to_parquet(buffer, index=False)
    content = buffer.getvalue()
    description = OverlayDescription(
        name=name, columns=tuple(map(str, values.columns)), cohort=cohort_hash, hash=_hash(content),
        made_by=made_by, command=command, maps=maps,
    )  # fmt: skip
    return description, content


def write_overlay(cohort: Path, description: OverlayDescription, content: bytes) -> None:
    """Write an overlay of the cohort in a folder; after a stop at any moment it is there, or it is not."""
    place = cohort / DERIVED / description.name
    with writing_to(place):
        place.mkdir(parents=True, exist_ok=True)
        with replacing(place / VALUES) as path:
            path.write_bytes(content)
        index = cohort / DERIVED / INDEX
        known = json.loads(index.read_text()) if index.exists() else []
        # A folder that was deleted is forgotten.
        kept = [
            each
            for each in known
            if each != description.name and (cohort / DERIVED / str(each) / OVERLAY).exists()
        ]
        write_text(index, json.dumps([*kept, description.name]))
        write_text(place / OVERLAY, description.model_dump_json(indent=2))


def used_overlays(overlays: Mapping[str, Overlay], settings: object) -> dict[str, Overlay]:
    """The overlays of which a column, or a map, is named anywhere in settings, as JSON values."""
    words = set(_words_of(settings))
    return {
        name: each
        for name, each in overlays.items()
        if words & {*each.description.columns, *each.description.maps}
    }


def _words_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        # --choose NAME=A,B
        yield from value.partition("=")[2].split(",")
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _words_of(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _words_of(each)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
