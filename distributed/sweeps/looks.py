"""The looks at the hold-out: each set of refits is one, and each `brainsweep evaluate` of the run on its own cohort.

After a look a search that goes on is no longer blind to it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import optuna
from rich.console import Console

from core.errors import UserError
from core.files.tables import read_table
from core.run_access import evaluations
from core.run_description import Look
from core.run_names import CURVE, NESTED, RUN_JSON, SPLITS
from distributed.run.folder import RunFolder, now, open_run
from distributed.search.study import trials_begun


def finished_trials(study: optuna.Study) -> int:
    """How many trials of the search have ended."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def record_look(folder: RunFolder, study: optuna.Study, winner: int, baseline: int | None = None) -> None:
    """Record that refits look at the hold-out now. Refits that are continued, with the same trials known, are one look.

    Args:
        folder: of the run.
        study: the search so far.
        winner: the number of the trial that is refitted.
        baseline: the number of the trial of the L1 baseline that is refitted; None if it is not tuned.
    """
    looks = looks_of(folder)
    look = Look(
        when=now(), trials=finished_trials(study), begun=trials_begun(study), winner=winner, baseline=baseline
    )
    # Nothing more was known, so the refits that were begun then are continued now. With another winner (if the former
    # one lies outside a changed space) it is another look.
    same = looks and looks[-1].model_copy(update={"when": look.when}) == look
    if not same:
        folder.update(looks=(*looks, look))


def looks_of(folder: RunFolder) -> tuple[Look, ...]:
    """The looks by refits so far; version 0.2 recorded none, and had looked if a refit was begun."""
    about = folder.about
    if about.looks or not folder.refit("published").exists():
        return about.looks
    return (Look(when=about.finished or about.created, winner=about.refitted),)


def count_looks(folder: RunFolder) -> int:
    """How often the hold-out was looked at so far: by sets of refits, and by `brainsweep evaluate`."""
    return len(looks_of(folder)) + len(evaluations(folder.access))


def looks_beside(folder: RunFolder, held_out: Collection[str]) -> dict[str, int]:
    """The looks of the other runs in the same folder at any of these people, by the path of the run in that folder.

    The sweeps of a nested search or a curve count as well, on both sides, but not those of one curve for each other:
    they were asked for together, and nothing is chosen between them. Whoever trains and evaluates again and again, and
    keeps the best, has searched on the hold-out.
    """
    cohort, found, place = folder.about.cohort, {}, folder.path.parent
    kind = _kind_of(place)
    if kind is not None:
        place = place.parent
    several = (place.glob(f"*/{name}-*/{RUN_JSON}") for name in ("outer", "labelled"))
    for path in sorted([*place.glob(f"*/{RUN_JSON}"), *(path for paths in several for path in paths)]):
        try:
            other = open_run(path.parent)
            about = other.about.cohort
            if other.path == folder.path or about is None or cohort is None or about.hash != cohort.hash:
                continue
            if kind == CURVE and other.path.parent == folder.path.parent:
                continue
            splits, looks = read_table(other.path / SPLITS, ("subject", "role")), count_looks(other)
        except (UserError, OSError):
            # It cannot be read, or it was stopped before it had splits.
            continue
        if looks and set(splits.loc[splits["role"] == "holdout", "subject"]) & set(held_out):
            # A run may be a link to another folder.
            found[path.parent.relative_to(place).as_posix()] = looks
    return found


def _kind_of(place: Path) -> str | None:
    """The kind of the run in this folder, if it holds several sweeps."""
    try:
        kind = open_run(place).about.kind
    except UserError:
        return None
    return kind if kind in (NESTED, CURVE) else None


def tell_looks(
    folder: RunFolder, study: optuna.Study, trials: int, console: Console, of_baseline: int = 0
) -> None:
    """Say before a search of `trials` goes on that its hold-out was seen, if more than the refits is left of it.

    `of_baseline` trials of the L1 baseline are left.
    """
    looks, count = looks_of(folder), count_looks(folder)
    if looks and (finished_trials(study) < trials or of_baseline):
        times = "once" if count == 1 else f"{count} times"
        console.print(
            f"note: the held-out subjects of this run were looked at {times} (last refits: {looks[-1].in_words()}). "
            "What the search finds from here on comes after that look; the report will say so",
            highlight=False,
            soft_wrap=True,
        )
