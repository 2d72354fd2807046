"""Labels of a BIDS-like folder: participants.tsv, and sessions.tsv for labels that change between visits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.labels import (
    Columns,
    Labels,
    Wanted,
    columns_of,
    known_text,
    labels_of,
    need_columns,
    number_columns,
    read_table,
)

PARTICIPANTS = "participants.tsv"
SESSIONS = "sessions.tsv"
OWN = ("participant_id", "session_id")
OTHER_SESSION_COLUMN = "session"  # of participants.tsv, where it has one row per visit

Rows = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class People:
    """The content of a folder's tables as text; subjects have the prefix sub-, sessions ses-."""

    participants: Rows | None
    """Rows of participants.tsv by subject; None where there is no such table."""
    visits: dict[str, dict[str, dict[str, str]]]
    """Rows of sessions.tsv by subject and session."""
    columns: Columns
    numeric: frozenset[str]
    files: tuple[Path, ...]
    faults: dict[str, str]
    """Why a subject's own table of sessions cannot be used."""

    @property
    def subjects(self) -> set[str]:
        """All subjects that participants.tsv lists."""
        return set(self.participants or ())

    def labels(self, subject: str, session: str) -> Labels:
        """Labels of one visit (session "" or "ses-1"); UserError if they are missing or cannot be used.

        Values of sessions.tsv, which belong to the visit, replace those of participants.tsv, which belong to the
        person.
        """
        if fault := self.faults.get(subject):
            raise UserError(fault)
        row = {**self._person(subject, session)}
        visits = self.visits.get(subject, {})
        age = self.columns.age
        if age and any(known_text(visit.get(age, "")) for visit in visits.values()):
            row[age] = ""  # the age at another visit would be wrong for this one
        row |= {name: value for name, value in visits.get(session, {}).items() if known_text(value)}
        return labels_of(row, columns=self.columns, numeric=self.numeric, own=OWN, prefix="participants_")

    def _person(self, subject: str, session: str) -> dict[str, str]:
        if self.participants is None:
            return {}
        rows = self.participants.get(subject, [])
        if len(rows) > 1 and session:
            rows = [row for row in rows if _session_of(row) == session] or rows
        if len(rows) != 1:
            listed = f"is listed {len(rows)} times in" if rows else "has no row in"
            raise UserError(f"{subject} {listed} {PARTICIPANTS}; one row is needed")
        return rows[0]


def read_people(source: Path, folders: Iterable[Path], wanted: Wanted) -> People:
    """The tables of `source` and of its subjects' `folders`.

    UserError where a table about all subjects cannot be used; the fault of a table about one subject is kept
    for that subject. Where no table has ages, `columns.age` of the result is None.
    """
    files = []
    participants: Rows | None = None
    path = participants_of(source)
    if path is not None:
        files.append(path)
        participants = _by_subject(path, read_table(path))
    visits: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    faults: dict[str, str] = {}
    for path, subject in _session_tables(source, folders):
        files.append(path)
        try:
            _add_visits(visits, path, subject)
        except UserError as error:
            if subject is None:
                raise
            faults[subject] = str(error)
    rows = [row for group in (participants or {}).values() for row in group]
    sessions = [row for group in visits.values() for row in group.values()]
    columns = Columns(None)
    if files:
        names = dict.fromkeys(name for row in [*rows, *sessions] for name in row)
        columns = columns_of(files[0], names, wanted, [path.with_suffix(".json") for path in files])
    return People(
        participants,
        dict(visits),
        columns,
        frozenset(number_columns([*rows, *sessions])),
        tuple(files),
        faults,
    )


def participants_of(source: Path) -> Path | None:
    """The participants.tsv of a dataset; a derivative without one of its own has that of its raw dataset."""
    candidates = [source / PARTICIPANTS]
    if source.absolute().parent.name == "derivatives":
        candidates.append(source.absolute().parents[1] / PARTICIPANTS)
    return next((path for path in candidates if path.is_file()), None)


def _by_subject(path: Path, rows: list[dict[str, str]]) -> Rows:
    need_columns(path, rows, ["participant_id"])
    found: Rows = defaultdict(list)
    for row in rows:
        if name := row["participant_id"].strip().removeprefix("sub-"):
            found[f"sub-{name}"].append(row)
    return dict(found)


def _session_tables(source: Path, folders: Iterable[Path]) -> Iterable[tuple[Path, str | None]]:
    """Tables of visits, each with its subject; None if the table has a column of subjects."""
    if (source / SESSIONS).is_file():
        yield source / SESSIONS, None
    for folder in folders:
        if (path := folder / f"{folder.name}_{SESSIONS}").is_file():
            yield path, folder.name


def _add_visits(visits: dict[str, dict[str, dict[str, str]]], path: Path, subject: str | None) -> None:
    rows = read_table(path)
    need_columns(path, rows, ["session_id"] if subject else OWN)
    for row in rows:
        person = subject or "sub-" + row["participant_id"].strip().removeprefix("sub-")
        session = _session_of(row)
        if session in visits[person]:
            raise UserError(f"{path} lists {session} of {person} twice; one row is needed")
        visits[person][session] = row


def _session_of(row: dict[str, str]) -> str:
    text = known_text(row.get("session_id", "") or row.get(OTHER_SESSION_COLUMN, ""))
    return f"ses-{text.removeprefix('ses-')}" if text else ""
