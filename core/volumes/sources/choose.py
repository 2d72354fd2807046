"""Choosing the kind of image where a source holds several."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from core.errors import UserError


def chosen_channels(
    source: Path, kinds: Mapping[str, int], leave: Collection[str | None] = ()
) -> tuple[str, ...]:
    """The only kind of image; `kinds` says how often each occurs, `leave` names kinds that are used as maps.

    UserError, listing all kinds, where the user has to choose.
    """
    left = {kind: count for kind, count in kinds.items() if kind not in leave}
    if len(left) == 1:
        return tuple(left)
    if not left:
        raise UserError(f"{source} has no images beside the label and mask: {listed(kinds)}")
    raise UserError(f"{source} has several kinds of image: {listed(left)}; choose with --channels")


def listed(kinds: Mapping[str, int]) -> str:
    """ "T1w (36), FLAIR (4)", the most frequent first."""
    ranked = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ranked) - 12} more" if len(ranked) > 12 else ""
    return ", ".join(f"{kind} ({count})" for kind, count in ranked[:12]) + more
