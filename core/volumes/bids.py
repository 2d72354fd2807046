"""What a BIDS-like folder holds: participants.tsv, and one NIfTI file per subject somewhere under sub-*/."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from core.errors import UserError
from core.lookup import did_you_mean
from core.volumes.cohort import COLUMNS

PARTICIPANTS = "participants.tsv"
MISSING = {"", "n/a", "na", "nan", "none"}
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}
OLDEST = 130.0  # years

PLACEMENT = ("coverage", "origin_x", "origin_y", "origin_z")
"""Columns that ingest adds: where each subject's grid lies (`core.volumes.ingest`)."""


@dataclass(frozen=True)
class Scan:
    """One image of one subject, with the subject's labels."""

    subject: str
    path: Path
    age: float
    sex: str
    site: str
    extra: dict[str, str | float]
    """Further columns of participants.tsv."""


@dataclass(frozen=True)
class Reject:
    """A subject that is left out, and why."""

    subject: str
    file: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The usable scans of a folder, in order of subject, and the subjects that fail before reading voxels."""

    source: Path
    suffix: str
    scans: tuple[Scan, ...]
    rejects: tuple[Reject, ...]
    participants_hash: str


def list_scans(source: str | Path, suffix: str | None = None, age_column: str = "age") -> Listing:
    """Match participants.tsv with the images named *_SUFFIX.nii or .nii.gz.

    Raises UserError where the folder as a whole cannot be used: it, participants.tsv, the age column or
    the images are missing, or there are several kinds of image and no `suffix` says which.
    """
    source = Path(source)
    participants = _read_participants(source, age_column)
    images = _images(source)
    suffix = _checked_suffix(source, images, suffix)
    labels = {str(subject): rows for subject, rows in participants.groupby("subject")}
    scans, rejects = [], []
    for subject in sorted({*labels, *images}):
        paths = [path for path in images.get(subject, []) if _suffix(path) == suffix]
        try:
            path = _only_path(source, subject, paths, suffix)
            scans.append(_scan(subject, path, labels.get(subject, participants[:0]), age_column))
        except UserError as error:
            file = str(paths[0].relative_to(source)) if paths else ""
            rejects.append(Reject(subject, file, str(error)))
    digest = hashlib.sha256((source / PARTICIPANTS).read_bytes()).hexdigest()
    return Listing(source, suffix, tuple(scans), tuple(rejects), digest)


def _scan(subject: str, path: Path, labels: pd.DataFrame, age_column: str) -> Scan:
    """The subject's image with the labels of its one row; UserError if they cannot be used."""
    if len(labels) != 1:
        listed = f"is listed {len(labels)} times in" if len(labels) else "has no row in"
        raise UserError(f"{subject} {listed} {PARTICIPANTS}; one row is needed")
    row = {str(name): value for name, value in labels.iloc[0].items()}
    sex, site = _text(row.get("sex", "")), _text(row.get("site", ""))
    own = {"participant_id", "subject", "sex", "site", age_column}
    extra = {_free_name(name): value for name, value in row.items() if name not in own}
    return Scan(subject, path, _age(row[age_column]), SEXES.get(sex.lower(), sex), site, extra)


def _read_participants(source: Path, age_column: str) -> pd.DataFrame:
    """participants.tsv, with a column `subject` that always carries the prefix sub-; labels are still text."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; a BIDS-like folder with {PARTICIPANTS} is needed")
    path = source / PARTICIPANTS
    if not path.is_file():
        found = sorted(entry.name for entry in source.iterdir())[:8]
        raise UserError(f"{path} does not exist; {source} holds {', '.join(found) if found else 'nothing'}")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is not a tab-separated table: {str(error).splitlines()[0]}") from error
    for column, hint in (("participant_id", ""), (age_column, " or name another with --age-column")):
        if column not in table:
            raise UserError(
                f"{path} has no column '{column}', only {', '.join(map(repr, table.columns))} "
                f"(tab-separated){hint}; {did_you_mean(column, table.columns)}"
            )
    names = table["participant_id"].str.strip().str.removeprefix("sub-")
    known = table.assign(subject="sub-" + names)[names != ""].reset_index(drop=True)
    own = ["participant_id", "subject", "sex", "site", age_column]
    return known.assign(**{name: _numbers_or_text(known[name]) for name in known.columns.difference(own)})


def _images(source: Path) -> dict[str, list[Path]]:
    """All NIfTI files under each sub-* folder, sorted. Linked folders are not entered: they may loop."""
    images = {
        folder.name: sorted(
            path for path in folder.rglob("*.nii*") if path.name.endswith((".nii", ".nii.gz"))
        )
        for folder in sorted(source.glob("sub-*"))
        if folder.is_dir()
    }
    if not any(images.values()):
        raise UserError(
            f"{source} has no images: NIfTI files (.nii or .nii.gz) are needed under sub-*/, one per subject"
        )
    return images


def _suffix(path: Path) -> str:
    """The BIDS suffix: sub-01_ses-1_T1w.nii.gz has suffix T1w; sub-01.nii.gz, with none, is an "image"."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return "image" if "_" not in stem and stem.startswith("sub-") else stem.rsplit("_", 1)[-1]


def _checked_suffix(source: Path, images: dict[str, list[Path]], suffix: str | None) -> str:
    found = Counter(_suffix(path) for paths in images.values() for path in paths)
    listed = ", ".join(f"{name} ({count})" for name, count in found.most_common(12))
    if suffix is None and len(found) > 1:
        raise UserError(f"{source} has several kinds of image: {listed}; choose one with --suffix")
    if suffix is not None and suffix not in found:
        raise UserError(f"{source} has no image with suffix '{suffix}'; it has {listed}")
    return suffix or next(iter(found))


def _only_path(source: Path, subject: str, paths: list[Path], suffix: str) -> Path:
    if not paths:
        raise UserError(f"{subject} has no image {subject}/**/*_{suffix}.nii[.gz]")
    if len(paths) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in paths[:3])
        raise UserError(f"{subject} has {len(paths)} images with suffix {suffix} ({names}); one is needed")
    stem = paths[0].name.removesuffix(".gz").removesuffix(".nii")
    if stem.startswith("sub-") and stem.split("_")[0] != subject:
        raise UserError(
            f"{paths[0].relative_to(source)} is of another subject by its name; {subject} is needed"
        )
    return paths[0]


def _age(text: str) -> float:
    if _text(text) == "":
        raise UserError("age is missing")
    try:
        age = float(text)
    except ValueError:
        raise UserError(f"age '{text}' is not a number of years") from None
    if not (math.isfinite(age) and 0 < age < OLDEST):
        raise UserError(f"age {text} is not between 0 and {OLDEST:g} years")
    return age


def _text(value: str) -> str:
    """The value, or "" for any of the ways of writing that it is unknown."""
    return "" if value.strip().lower() in MISSING else value.strip()


def _numbers_or_text(column: pd.Series) -> pd.Series:
    """A column as numbers if every known value is one, else as text; unknown is NaN or ""."""
    text = column.map(_text)
    numbers = pd.to_numeric(text.where(text != ""), errors="coerce")
    return numbers if numbers.notna().any() and numbers.notna().eq(text != "").all() else text


def _free_name(column: str) -> str:
    """The name of a further column in the manifest, which has columns of its own."""
    return f"participants_{column}" if column in {"row", *COLUMNS, *PLACEMENT} else column
