"""Tables of labels: reading them, and age, sex, site and further columns of one row."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.lookup import did_you_mean
from core.volumes.cohort.reader import COLUMNS

NO_VALUE = "n/a"
"""How BIDS writes that a value is unknown."""
UNKNOWN = {"", NO_VALUE, "na", "nan", "none", "null"}
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}
OLDEST = 130.0  # years
SYNONYMS = {
    "age": ("age in years", "age years", "age at scan", "scan age"),
    "sex": ("gender", "biological sex"),
    "site": ("site id", "site name", "scan site", "acquisition site", "center", "centre", "scanner"),
}
"""What people call the columns that mean something here; case, spaces and underscores do not matter."""
PER_YEAR = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}
UNITS = {
    "y": "year", "yr": "year", "yo": "year", "year": "year", "m": "month", "mo": "month", "mth": "month",
    "month": "month", "w": "week", "wk": "week", "week": "week", "d": "day", "day": "day",
}  # fmt: skip
"""Units of an age, without a plural s."""
SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}

RESERVED = {"row", *COLUMNS}
"""Columns that the manifest of a cohort fills itself; a table's column of that name gets a prefix."""

Row = Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """The images and columns of a source that the user asked for."""

    channels: tuple[str, ...] | None = None
    """What each image of a scan shows; None: the only kind of image that is there."""
    maps: tuple[str, ...] = ()
    """Maps of classes that go with scans; a scan may lack any of them."""
    mask: str | None = None
    age_column: str | None = "age"
    """None: ages are not wanted."""
    is_age_asked: bool = False
    """Whether the user named the column, so that a source without it is a mistake."""
    root: Path | None = None
    """Where the relative paths of a list begin; at its own folder if None."""

    @property
    def kinds_of_maps(self) -> set[str | None]:
        """The kinds of images that are maps, and the mask."""
        return {*self.maps, self.mask}


class Labels(NamedTuple):
    """The labels of one scan in a table; fields as in `Scan`."""

    age: float
    sex: str
    site: str
    extra: dict[str, str | float]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table as text: comma-separated for .csv, otherwise tab-separated; UTF-8, names in the first line.

    Byte order marks, CRLF, blank lines, lines cut short after the last known value (the rest is "") and empty fields
    behind the last column are fine. UserError for what would have to be guessed: another encoding or separator, two
    columns of one name, a line with too many fields; and for a table that is empty or cannot be read.
    """
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    rows = []
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = _checked_names(path, fields, separator)
                continue
            while len(fields) > len(names) and not fields[-1].strip():
                # A spreadsheet's empty columns.
                fields.pop()
            if len(fields) > len(names):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(fields)} fields, but there are "
                    f"{len(names)} columns; is a {SEPARATORS[separator]} inside a value?"
                )
            fields += [""] * (len(names) - len(fields))
            rows.append({name: field for name, field in zip(names, fields, strict=True) if name})
    except csv.Error as error:
        kind = SEPARATORS[separator]
        raise UserError(f"{path} line {reader.line_num} is not {kind}-separated text: {error}") from error
    if not rows:
        raise UserError(f"{path} is empty; a line of column names and one line per subject are needed")
    return rows


def need_columns(path: Path, rows: list[dict[str, str]], needed: Iterable[str], hint: str = "") -> None:
    """UserError, naming the columns that are there, unless the table has all that are `needed`."""
    for column in needed:
        if column not in rows[0]:
            raise UserError(
                f"{path} has no column '{column}', only {', '.join(map(repr, rows[0]))}{hint}; "
                f"{did_you_mean(column, rows[0])}"
            )


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold what is known of a scan."""

    age: str | None
    """None: no ages."""
    sex: str = "sex"
    site: str = "site"
    per_year: float = 1.0
    """How many units of the ages make a year."""
    notes: tuple[str, ...] = ()
    """What was taken for what, and what was not found."""


def columns_of(path: Path, names: Collection[str], wanted: Wanted, sidecars: Sequence[Path] = ()) -> Columns:
    """Which columns hold age, sex and site: those of these names, else those of names that mean the same.

    Args:
        path: the table, for messages.
        names: its columns.
        wanted: with the column of ages that the user named, which must be there, or the usual one.
        sidecars: JSON files that may declare the unit of a column, as BIDS has them.

    Raises:
        UserError: the column that the user named is not there, or ages have a unit that is not understood.
    """
    notes, found = [], dict[str, str | None]()
    for meaning in ("age", "sex", "site"):
        asked = wanted.age_column if meaning == "age" else meaning
        found[meaning] = asked if asked in names else None
        if meaning == "age" and asked is not None and wanted.is_age_asked:
            need_columns(path, [dict.fromkeys(names, "")], [asked], " (or name another with --age-column)")
        # Another name for the ages is the user's own.
        if found[meaning] is None and asked == meaning:
            same = [name for name in names if _plain(name) in map(_plain, (meaning, *SYNONYMS[meaning]))]
            if same:
                found[meaning] = same[0]
                others = f" ({', '.join(map(repr, same[1:]))} mean the same, and are not)" if same[1:] else ""
                notes.append(f"{path.name}: column '{same[0]}' is taken for {meaning}{others}")
    if absent := [meaning for meaning in ("sex", "site") if found[meaning] is None]:
        looked = ", ".join(name for meaning in absent for name in (meaning, *SYNONYMS[meaning]))
        notes.append(f"{path.name} has no {' and no '.join(absent)}; looked for {looked}")
    per_year = 1.0
    if (age := found["age"]) is not None:
        unit, declared_by = _unit_of(age, sidecars)
        per_year = PER_YEAR[unit]
        if unit != "year":
            notes.append(f"{declared_by}: ages are in {unit}s, and are brought to years")
    return Columns(age, found["sex"] or "sex", found["site"] or "site", per_year, tuple(notes))


def _unit_of(column: str, sidecars: Sequence[Path]) -> tuple[str, str]:
    """The unit of a column of ages, and what declares it: a sidecar, or its name; years if nothing does."""
    for path in sidecars:
        try:
            about = json.loads(path.read_text(encoding="utf-8-sig")).get(column) if path.is_file() else None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read as JSON ({error}), and may declare the unit of ages"
            ) from None
        text = about.get("Units", about.get("units")) if isinstance(about, dict) else None
        if isinstance(text, str) and text.strip():
            unit = UNITS.get(text.strip().lower().removesuffix("s"))
            if unit is None:
                raise UserError(
                    f"{path}: '{column}' has the unit '{text}'; years, months, weeks or days are understood"
                )
            return unit, path.name
    # Of a name its last word counts, if it has more than a letter: age_months, and not age_day_of_scan.
    last = re.findall(r"[a-z]+", column.lower())[-1:]
    named = next((UNITS.get(word.removesuffix("s")) for word in last if len(word) > 1), None)
    return named or "year", f"column '{column}'"


def _plain(name: str) -> str:
    """A name without what people write differently: case, spaces, underscores, points."""
    return re.sub(r"[\W_]+", "", name.casefold())


def number_columns(rows: Iterable[Row]) -> set[str]:
    """The columns in which every known value is a finite number, and at least one is known."""
    known: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            if (text := known_text(value)) and known.get(name, True):
                known[name] = _is_number(text)
    return {name for name, numeric in known.items() if numeric}


def labels_of(
    row: Row, *, columns: Columns, numeric: Collection[str], own: Collection[str], prefix: str
) -> Labels:
    """Age, sex and site of a row, and its further columns: all but those and `own`.

    `numeric` columns become floats, NaN where unknown; a column named like one of the manifest's gets
    `prefix`. An age that is not there is NaN; UserError for one that is impossible.
    """
    sex = known_text(row.get(columns.sex, ""))
    age = math.nan if columns.age is None else age_of(row.get(columns.age, ""), columns.per_year)
    extra: dict[str, str | float] = {
        (f"{prefix}{name}" if name in RESERVED else name): (
            _number(value) if name in numeric else known_text(value)
        )
        for name, value in row.items()
        if name not in {columns.sex, columns.site, columns.age, *own}
    }
    return Labels(age, SEXES.get(sex.lower(), sex), known_text(row.get(columns.site, "")), extra)


def age_of(value: str | float, per_year: float = 1.0) -> float:
    """Age in years, NaN where it is not known; UserError unless it is a number above 0 and below 130 years.

    Args:
        value: as it stands in the table.
        per_year: how many of its units make a year.
    """
    text = known_text(str(value))
    if not text:
        return math.nan
    try:
        age = float(text) / per_year
    except ValueError:
        raise UserError(f"age '{text}' is not a number of years") from None
    if not (math.isfinite(age) and 0 < age < OLDEST):
        raise UserError(f"age {text} is not between 0 and {OLDEST:g} years")
    return age


def known_text(value: str) -> str:
    """The value, or "" if it is one of the ways to write that it is unknown (`UNKNOWN`)."""
    return "" if value.strip().lower() in UNKNOWN else value.strip()


def known_name(value: str) -> str:
    """The name of a subject, which is never unknown: NA and null are names; "" and BIDS' n/a are none."""
    text = value.strip()
    return "" if text.lower() == NO_VALUE else text


def plain_id(value: object) -> str:
    """An identifier as one text, for any type it is stored in: 7, 7.0, b"007" and "sub-007 " are all "7".

    UserError for one that cannot be trusted: missing, or a number in which digits were lost.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError("its id is missing")
        if not value.is_integer() or abs(value) >= 2**53:
            raise UserError(f"its id {value!r} is not a whole number that floating point can hold")
        value = int(value)
    text = (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()
    text = text.removeprefix("sub-")
    if not known_name(text):
        raise UserError("its id is missing")
    if re.fullmatch(r"\d(\.\d+)?[eE]\+\d+", text):
        raise UserError(f"its id '{text}' was shortened by a spreadsheet; the digits are lost")
    if re.fullmatch(r"\d+(\.0+)?", text):
        return text.partition(".")[0].lstrip("0") or "0"
    return text


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UserError(f"{path} is empty; a line of column names and one line per subject are needed")
    if b"\0" in content:
        raise UserError(f"{path} is not UTF-8 text (it has zero bytes, as UTF-16 has); save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 text (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from error


def _checked_names(path: Path, fields: list[str], separator: str) -> list[str]:
    names = [field.strip() for field in fields]
    if len(names) == 1:
        counts = {other: names[0].count(other) for other in SEPARATORS if other != separator}
        likely = max(counts, key=lambda other: counts[other])
        if counts[likely]:
            raise UserError(
                f"{path} has one column '{names[0][:80]}' where separated by {SEPARATORS[separator]}; "
                f"it looks separated by {SEPARATORS[likely]}: save it with "
                f"{'commas as .csv' if likely == ',' else 'tabs as .tsv'}"
            )
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{path} has two columns '{twice[0]}'; rename one")
    return names


def _number(value: str) -> float:
    text = known_text(value)
    return float(text) if text else math.nan


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
