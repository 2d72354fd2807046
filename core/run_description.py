"""run.json: the request of a run, its settings, its code and its cohort; and where this cohort is now.

A field that an older version did not write has a default, so runs of every version can be read. A field that this
version does not know is kept unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from core.errors import UserError
from core.files.places import is_url
from core.run_names import STUDY
from core.task_description import BEFORE_0_3, TaskDescription
from core.volumes.cohort.description import DESCRIPTION
from core.volumes.cohort.reader import Cohort


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class CohortOfRun(_Part):
    """The cohort of a run."""

    path: str = ""
    """Its address when the run began; later its new place, if it was found at another one."""
    from_run: str | None = None
    """Its path relative to the folder of the run, so that both can be moved together."""
    n: int | None = None
    """The number of scans."""
    name: str = ""
    hash: str = ""
    synthetic: bool = False
    spacing: float | tuple[float, float, float] | None = None
    """Edge of a voxel in mm, or its edges along X, Y and Z."""
    shape: tuple[int, ...] = ()
    """Voxels of the grid (X, Y, Z)."""
    source: str = ""
    channels: tuple[str, ...] = ()
    preprocessing: dict[str, JsonValue] = {}
    """The settings of `core.volumes.images.preprocess.Preprocessing`."""
    overlays: dict[str, str] = {}
    """The hash of every overlay that the settings named when the run began, by name."""


class CodeVersion(_Part):
    """The source code of a run; two runs with the same `sources` were made by the same code."""

    commit: str = ""
    """Twelve digits; empty if the code was not a checkout of its own."""
    dirty: bool = False
    """Whether a checkout had changes that were not committed."""
    sources: str = ""
    """Digits of the SHA-256 of all source files."""


class CodeFile(_Part):
    """A Python file of a user's own space or task, which is executed."""

    path: str
    sha256: str
    owner: int
    """The user id of its owner."""


class BestTrial(_Part):
    """The winner of the search."""

    number: int
    value: float


class SearchChange(_Part):
    """A change of the search, made by `resume --change-search`."""

    when: str
    what: tuple[str, ...]
    """One phrase for each thing that changed."""
    after_trials: int = 0
    holdout_seen: bool = False
    """Whether the held-out subjects had been used before."""
    inside: int | None = None
    """The number of earlier trials inside the new space; None if the space did not change."""
    outside: tuple[int, ...] = ()
    """The numbers of the earlier trials outside the new space."""
    dropped: int = 0
    """The number of enqueued trials that the new space does not contain."""


class Look(_Part):
    """A look at the held-out subjects: refits of the search's winner and of the baselines."""

    when: str
    """ISO 8601, UTC."""
    trials: int | None = None
    """How many trials of the search had ended; None if it was not recorded."""
    begun: int | None = None
    """How many had begun."""
    winner: int | None = None
    """The number of the trial that was refitted."""
    baseline: int | None = None
    """The number of the trial of the L1 baseline that was refitted; None if it was not tuned."""

    def in_words(self) -> str:
        """When, and after how many trials."""
        known = "" if self.trials is None else f", after {self.trials} trial{'' if self.trials == 1 else 's'}"
        return f"{self.when[:16].replace('T', ' ')} UTC{known}"


class LeakCheck(_Part):
    """Whether the weights that a run starts from know people whom the run judges."""

    start: str
    """NAME#HASH."""
    judged: int
    """How many subjects the run judges, in its folds and its hold-out."""
    seen: tuple[str, ...] | None = None
    """The ids of those whom the start was trained on; None if nobody knows whom it was trained on."""
    alike: int = 0
    """How many others have an id that the start knows from another data set."""

    def in_words(self) -> str:
        """One sentence."""
        if self.seen is None:
            return f"Whom {self.start} was trained on is unknown, so it may know people whom it is judged on."
        if self.seen:
            return (
                f"{self.start} was trained on {len(self.seen)} of the {self.judged} people whom it is judged on: its "
                "results are too good."
            )
        alike = (
            f" {self.alike} of them have the id of somebody in another data set that it knows."
            if self.alike
            else ""
        )
        return f"{self.start} was trained on none of the {self.judged} people whom it is judged on.{alike}"


class RunDescription(_Part):
    """The content of run.json."""

    kind: str = "sweep"
    """sweep, train, nested or curve."""
    command: str = ""
    """The command as it was typed."""
    created: str = ""
    """ISO 8601, UTC."""
    leaks: tuple[LeakCheck, ...] = ()
    """Of every start."""
    begun: bool = True
    """False until the splits and the first points of a sweep are written."""
    finished: str | None = None
    concluded: bool = True
    """Whether the page was written after the end."""
    seconds: float | None = None
    versions: dict[str, str] = {}
    code: CodeVersion | None = None
    cohort: CohortOfRun | None = None
    settings: dict[str, object] = {}
    """The published configuration with the changes of the user, from which every trial starts."""
    sweep: dict[str, JsonValue] = {}
    """The request: values by the names of the options."""
    task: TaskDescription = BEFORE_0_3
    """Versions before 0.3 wrote none: they knew no other task."""
    space_file: CodeFile | None = None
    """None if the space is one of ours, and before version 0.3."""
    task_file: CodeFile | None = None
    """None if the task is one of ours, or of an installed package."""
    rows: dict[str, int] = {}
    """The lines of every table when the page was written, so that one that was cut at the end of a line is found."""
    first: dict[str, list[dict[str, JsonValue]]] = {}
    """The configurations to try before the sampler is asked, by label, as parameters of the space."""
    study: str = STUDY
    changes: tuple[SearchChange, ...] = ()
    looks: tuple[Look, ...] = ()
    """Empty in runs of version 0.2 and before."""
    best: BestTrial | None = None
    ended: str | None = None
    """Why the search ended before its last trial."""
    searched: dict[str, list[str]] | None = None
    """Every searched setting, and the distributions that it has in parts of the space."""
    refitted: int | None = None
    """The number of the trial whose refit is in the folder `refits/winner`."""
    evolved: bool = False
    """Whether the population has ended, and the schedule that it found is enqueued."""

    @property
    def objectives(self) -> list[str]:
        """The objectives of the search; the first one is the value of a trial."""
        recorded = self.sweep.get("objectives")
        named = [str(name) for name in recorded] if isinstance(recorded, list) else []
        return named or [self.task.objectives[0]]


def find_cohort(run: Path, recorded: CohortOfRun | None, given: str | Path | None = None) -> Cohort:
    """Find the cohort of a run: at `given`; without `given` at its recorded place, or at its path relative to the run.

    So a run that was copied or mounted at another place, together with its cohort, finds the cohort.

    Raises:
        UserError: the cohort is at none of these places, or another cohort is there.
    """
    recorded = recorded or CohortOfRun()
    beside = os.path.normpath(run / (recorded.from_run or recorded.path or "."))
    places = [str(given)] if given is not None else [recorded.path, beside]
    found = [Cohort.open(place) for place in dict.fromkeys(places) if place and _holds_cohort(place)]
    if not found:
        raise UserError(
            f"the cohort of {run} is not at {_either(places)}; give its new place with --cohort"
            if recorded.path or given is not None
            else f"{run}/run.json does not say which cohort was used"
        )
    same = [cohort for cohort in found if recorded.hash in ("", cohort.description.hash)]
    if not same:
        raise UserError(
            f"{found[0].location} holds another cohort than the run began with (or it was changed: hash "
            f"{found[0].description.hash[:8]}, not {recorded.hash[:8]}); its trials would not be comparable"
        )
    _check_overlays(same[0], recorded)
    return same[0]


def _check_overlays(cohort: Cohort, recorded: CohortOfRun) -> None:
    """Refuse a cohort without an overlay that a run began with."""
    for name, digest in recorded.overlays.items():
        overlay = cohort.overlays.get(name)
        if overlay is None or overlay.description.hash != digest:
            what = "is missing" if overlay is None else "was made anew"
            raise UserError(
                f"{cohort.location}/derived/{name} {what} since the run began, and its columns may be what the run "
                "uses; put it back, or begin another run"
            )


def _holds_cohort(place: str) -> bool:
    return is_url(place) or (Path(place) / DESCRIPTION).exists()


def _either(places: Sequence[str]) -> str:
    return " nor at ".join(dict.fromkeys(place for place in places if place))
