"""Leaks: subjects or files in two folds or lists at once, so that training would see test data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

NAMED = 8
"""Leaks that a note names one by one."""


def leak_notes(what: str, placed: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A note if a name in the (name, place) pairs `placed` has two places; `what` is the kind of the names."""
    places: dict[str, dict[str, None]] = defaultdict(dict)  # a dict as a set in order
    for name, place in placed:
        places[name][place] = None
    if leaked := {name: ", ".join(found) for name, found in places.items() if len(found) > 1}:
        named = ", ".join(f"{name} ({leaked[name]})" for name in list(leaked)[:NAMED])
        more = f" and {len(leaked) - NAMED} more" if len(leaked) > NAMED else ""
        yield f"LEAK: {len(leaked)} {what} are in more than one fold or list: {named}{more}"
