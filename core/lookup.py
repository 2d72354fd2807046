"""Look a name up in a literal dictionary, and help the person who mistyped it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from core.errors import UserError

Value = TypeVar("Value")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        # A forgotten prefix: `learning_rate` for `optimiser.learning_rate`.
        close = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == name][:1]
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def look_up(table: Mapping[str, Value], name: str, what: str) -> Value:
    """`table[name]`; an unknown name raises UserError, saying `what` was looked for and what is near."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {what} '{name}'; {did_you_mean(name, table)}")
