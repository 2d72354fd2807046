"""Tables as CSV files for people and for programs: text stays text, and nothing in them acts in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from core.errors import UserError
from core.files.writing import replacing

NAMES = ("subject", "session", "site", "role", "method", "state", "file", "kind")
"""Columns whose every value is a name: also '007', 'NA', 'null' and ''."""
PROBABILITY = "p_"
"""What the name of a column with the probabilities of a class begins with."""
OF_CLASSES = ("truth", "predicted")
"""Columns that hold names of classes, which may look like numbers, in a table with such probabilities."""
WORDS = ("label", "reason", "note")
"""Columns of text that may be absent: then they are empty."""
ACTING = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins with one of these for a formula."""
REMEDY = "put it back from a backup"
GUARD = "'"
"""What spreadsheets take for the sign of text, and do not show."""


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write `table` without its index as CSV, in one step; text that a spreadsheet would execute gets a guard.

    A name that ends in .tsv is a table with tabs, as BIDS asks.
    """
    safe = _changed(table, _guarded)
    with replacing(path) as temporary:
        # A carriage return begins a new line for readers, and CSV writers quote only the line ends that they write.
        returns = any(
            isinstance(value, str) and "\r" in value for value in (*safe.columns, *safe.to_numpy().flat)
        )
        safe.to_csv(
            temporary,
            index=False,
            sep="\t" if path.suffix == ".tsv" else ",",
            quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
        )


def read_table(path: Path | IO[bytes], every: Collection[str] | None = None) -> pd.DataFrame:
    """A table that `write_table` wrote.

    Args:
        path: the file.
        every: if given, the columns that the table has to have, and all its columns are names.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or lacks a column.
    """
    where = path if isinstance(path, Path) else "the table"
    try:
        content = path.read_bytes() if isinstance(path, Path) else path.read()
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where} is damaged: it is not text; {REMEDY}") from None
    if not text.strip():
        raise UserError(f"{where} is empty: {REMEDY}")
    if not text.endswith("\n"):
        raise UserError(f"{where} is damaged: its end is missing; {REMEDY}")
    try:
        table = _parse(text, everything_is_text=every is not None)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {str(error).strip().splitlines()[0]}; {REMEDY}") from None
    absent = [name for name in every or () if name not in table]
    if absent:
        raise UserError(f"{where} is damaged: it has no column '{absent[0]}'; {REMEDY}")
    return table


def _parse(text: str, *, everything_is_text: bool) -> pd.DataFrame:
    header = pd.read_csv(io.StringIO(text), nrows=0, dtype=str).columns
    has_classes = any(str(_plain(name)).startswith(PROBABILITY) for name in header)
    known = (*NAMES, *(OF_CLASSES if has_classes else ()))
    names = [name for name in header if everything_is_text or _plain(name) in known]
    words = [name for name in header if name not in names and _plain(name) in WORDS]
    absent = {name: [] if name in names else [""] if name in words else ["", "nan", "NaN"] for name in header}
    table = pd.read_csv(
        io.StringIO(text), dtype=dict.fromkeys([*names, *words], str), keep_default_na=False, na_values=absent
    )
    return _changed(table, _plain)


def _changed(table: pd.DataFrame, change: Callable[[object], object]) -> pd.DataFrame:
    """`table` with `change` applied to every piece of text, also to the names of columns."""
    changed = table
    if any(change(name) != name for name in table.columns):
        changed = table.rename(columns=change)
    for place, (_, column) in enumerate(table.items()):
        if column.dtype == object or isinstance(column.dtype, pd.StringDtype | pd.CategoricalDtype):
            values = [change(value) for value in column]
            if any(value is not was and value != was for value, was in zip(values, column, strict=True)):
                changed = changed.copy(deep=False) if changed is table else changed
                changed.isetitem(place, np.array(values, dtype=object))
    return changed


def _guarded(value: object) -> object:
    return f"{GUARD}{value}" if isinstance(value, str) and value.startswith((*ACTING, GUARD)) else value


def _plain(value: object) -> object:
    return value.removeprefix(GUARD) if isinstance(value, str) else value
