"""run.json: what a run was asked, with what, by which code and on which cohort; and where that cohort is now.

A field that a version did not write has a default, so runs of every version can be read. A field that this version
does not know is kept as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from core.errors import UserError
from core.files.places import is_url
from core.run_names import STUDY
from core.volumes.cohort.reader import DESCRIPTION, Cohort


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class CohortOfRun(_Part):
    """The cohort that a run was made on."""

    path: str = ""
    """Its address when the run began; its new place once it was found there."""
    from_run: str | None = None
    """Its place as seen from the run's folder, so that both can move together."""
    n: int | None = None
    """Scans."""
    name: str = ""
    hash: str = ""
    synthetic: bool = False
    spacing: float | None = None
    """Voxel edge in mm."""
    shape: tuple[int, ...] = ()
    """Voxels of the grid (X, Y, Z)."""
    source: str = ""
    channels: tuple[str, ...] = ()
    preprocessing: dict[str, JsonValue] = {}
    """The settings of `core.volumes.images.preprocess.Preprocessing`."""


class CodeVersion(_Part):
    """The source code of a run; two runs with the same `sources` were made by the same code."""

    commit: str = ""
    """Twelve digits; empty where the code was not a checkout of its own."""
    dirty: bool = False
    """Whether a checkout had changes that were not committed."""
    sources: str = ""
    """Digits of the SHA-256 of all source files."""


class BestTrial(_Part):
    """The winner of the search."""

    number: int
    value: float


class SearchChange(_Part):
    """A change of what is searched, made on purpose by `resume --change-search`."""

    when: str
    what: tuple[str, ...]
    """One phrase for each thing that changed."""
    after_trials: int = 0
    holdout_seen: bool = False
    """Whether the held-out subjects had been looked at before."""
    inside: int | None = None
    """Earlier trials that lie inside the new space; None where the space did not change."""
    outside: tuple[int, ...] = ()
    """The numbers of those that do not."""
    dropped: int = 0
    """Trials that waited to be run and that the new space does not have."""


class RunDescription(_Part):
    """The content of run.json."""

    kind: str = "sweep"
    """sweep or train."""
    command: str = ""
    """As it was typed."""
    created: str = ""
    """ISO 8601, UTC."""
    begun: bool = True
    """False until the splits and the first points of a sweep are written."""
    finished: str | None = None
    seconds: float | None = None
    versions: dict[str, str] = {}
    code: CodeVersion | None = None
    cohort: CohortOfRun | None = None
    settings: dict[str, object] = {}
    """The published configuration with the user's changes: where every trial starts from."""
    sweep: dict[str, JsonValue] = {}
    """The request, by the names of its options."""
    study: str = STUDY
    changes: tuple[SearchChange, ...] = ()
    best: BestTrial | None = None
    ended: str | None = None
    """Why the search ended before its last trial."""
    searched: dict[str, list[str]] | None = None
    """Every searched setting, and the distributions that it has somewhere in the space."""
    refitted: int | None = None
    """The number of the trial whose settings the folder `refits/winner` holds."""
    evolved: bool = False
    """Whether the population is through, and what it found is enqueued."""

    @property
    def objectives(self) -> list[str]:
        """What the search minimises; the first is a trial's value."""
        recorded = self.sweep.get("objectives")
        return [str(name) for name in recorded] if isinstance(recorded, list) and recorded else ["mae"]


def find_cohort(run: Path, recorded: CohortOfRun | None, given: str | Path | None = None) -> Cohort:
    """The cohort of a run: at `given`, else where it was, else where it was as seen from the run's folder.

    A run that was copied or mounted elsewhere with its cohort beside it finds it so.

    Raises:
        UserError: the cohort is at none of these places, or what is there is another cohort.
    """
    recorded = recorded or CohortOfRun()
    beside = os.path.normpath(run / (recorded.from_run or recorded.path or "."))
    places = [str(given)] if given is not None else [recorded.path, beside]
    found = next((place for place in places if place and _holds_cohort(place)), None)
    if found is None:
        raise UserError(
            f"the cohort of {run} is not at {_either(places)}; give its new place with --cohort"
            if recorded.path or given is not None
            else f"{run}/run.json does not say which cohort was used"
        )
    cohort = Cohort.open(found)
    if recorded.hash and cohort.description.hash != recorded.hash:
        raise UserError(
            f"{found} holds another cohort than the run began with (or it was changed: hash "
            f"{cohort.description.hash[:8]}, not {recorded.hash[:8]}); its trials would not be comparable"
        )
    return cohort


def _holds_cohort(place: str) -> bool:
    return is_url(place) or (Path(place) / DESCRIPTION).exists()


def _either(places: Sequence[str]) -> str:
    return " nor at ".join(dict.fromkeys(place for place in places if place))
