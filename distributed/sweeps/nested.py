"""Several searches that belong together: `sweep --outer 5`, and `sweep --labelled 16,32,64,all`.

A nested search, `--outer 5`: the whole search again for every one of five disjoint hold-outs. With 36 subjects one
hold-out has seven of them, and seven people decide nothing. Here everyone is held out once, so the result is about all
subjects: it says how well the search, with its refit, predicts people that it never saw. It is not about one
configuration, because every hold-out has a winner of its own.

A curve, `--labelled 16,32,64,all`: the whole search again for every budget of labels, with the same hold-out. Trials
are pruned and compared, and a winner is chosen, within a budget; every start of `--start` is tried at every budget.

RUN/run.json                 the request; kind `nested` or `curve`
    outer-1/ … outer-5/      a sweep for each part, with everything that a sweep has; of a curve labelled-16/ …
    outer.csv, predictions.csv, report.html; of a curve curve.csv
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from core.errors import UserError
from core.files.places import exists, shown
from core.report.curve import print_curve, write_curve
from core.report.nested import print_nested, write_nested
from core.report.page import write_report
from core.run_names import CURVE, NESTED, RUN_JSON, STAGES, SWEEP, TRAIN
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import hold
from distributed.run.code import describe_code
from distributed.run.folder import RunFolder, cohort_of, create_run, now, open_run
from distributed.run.lock import claim
from distributed.run.quiet import quiet
from distributed.run.trust import check_trusted
from distributed.run.working_copy import address_of, bring_run, refuse_taken, run_as_typed
from distributed.slots.cluster import connect
from distributed.sweeps.launch import (
    Launch,
    check_subjects,
    first_points,
    recorded,
    tell_of_grid,
    with_whole_grid,
)
from distributed.sweeps.request import LABELLED, Part, ResumeRequest, SweepRequest
from distributed.sweeps.resolve import maps_of, resolve_search
from distributed.sweeps.resume import NO_CHANGES, as_request, resume_sweep
from distributed.sweeps.starts import (
    check_leaks,
    keep_starts,
    read_starts,
    refuse_other_starts,
    starts_of,
)
from distributed.sweeps.sweep import Shared, run_sweep
from distributed.sweeps.train_one import resume_training

FEWEST_SEEDS = 3
"""Of the refits of a curve."""


class Kind(NamedTuple):
    """What is made of several searches when they have ended."""

    words: str
    write: Callable[[Path], Path]
    """Writes the tables and the page of a run, and returns the page."""
    show: Callable[[Console, Path], None]


KINDS = {
    NESTED: Kind("nested search", write_nested, print_nested),
    CURVE: Kind("curve", write_curve, print_curve),
}


@dataclass(frozen=True)
class NestedSearch:
    """Several searches in progress: its folder, the request, and the cohort."""

    folder: RunFolder
    request: SweepRequest
    cohort: Cohort
    console: Console
    address: str | None = None
    trusts_space: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its sweeps."""
        return self.request.parts

    def child(self, part: Part) -> Path:
        """The folder of one of its sweeps."""
        return self.folder.path / part.folder

    def is_finished(self, part: Part) -> bool:
        """Whether this sweep has ended, and was not interrupted."""
        child = self.child(part)
        return (child / RUN_JSON).exists() and open_run(child).about.finished is not None

    def go_on(self, time_budget: float | None, accelerator_hours: float | None = None) -> RunFolder:
        """Run the sweeps that are left, one after another; then judge them together.

        A sweep that has ended stays as it is, also if its budget ended it: it has looked at its hold-out. A sweep
        without a result does not stop the others.

        Args:
            time_budget: seconds for all that are left, in equal shares.
            accelerator_hours: for the whole nested search, if it is another number than was recorded.
        """
        with claim(self.folder.path, self.console):
            left = [part for part in self.parts if not self.is_finished(part)]
            if left:
                share = None if time_budget is None else time_budget / len(left)
                hours = None if accelerator_hours is None else accelerator_hours / len(self.parts)
                with connect(self.address, self.console):
                    # Once for all of them.
                    held = hold(
                        self.cohort, self.request.data_mode, maps_of(self.request, self.folder.about.settings)
                    )
                    shared = Shared(held, self.folder.about.first, starts_of(self.folder), len(left))
                    for part in left:
                        self.console.print(f"\n{part.words}", style="bold")
                        if not self._ends(part, share, hours, shared):
                            self.console.print(
                                f"\nThe {KINDS[self.folder.about.kind].words} is unfinished. Continue with\n"
                                f"  brainsweep resume {self.folder.path}",
                                highlight=False,
                            )
                            return self.folder
            self._write_missing_pages()
            kind = KINDS[self.folder.about.kind]
            page = kind.write(self.folder.path)
            self.folder.update(finished=now())
            shutil.rmtree(self.folder.path / STAGES, ignore_errors=True)
        kind.show(self.console, self.folder.path)
        self.console.print(f"\nNext:\n  open {page}", highlight=False)
        return self.folder

    def _write_missing_pages(self) -> None:
        """Write the page of a sweep that ended, and whose process was killed before it had written it."""
        for part in self.parts:
            child = open_run(self.child(part))
            if not child.is_concluded:
                # All its trials failed: then it has none.
                with contextlib.suppress(UserError):
                    write_report(child.path)
                    child.update(concluded=True)

    def _ends(
        self, part: Part, time_budget: float | None, accelerator_hours: float | None, shared: Shared
    ) -> bool:
        """Run this sweep; False if it was interrupted before its end."""
        try:
            self._run(part, time_budget, accelerator_hours, shared)
        except UserError as error:
            if not self.is_finished(part):
                raise
            self.console.print(
                f"{part.words}: there is no result: {error}", highlight=False, soft_wrap=True, markup=False
            )
        return self.is_finished(part)

    def _run(
        self, part: Part, time_budget: float | None, accelerator_hours: float | None, shared: Shared
    ) -> None:
        """Begin this sweep, or continue it."""
        child = self.child(part)
        if (child / RUN_JSON).exists():
            named = open_run(child).about.sweep.get("space")
            if named != self.request.space_name:
                raise UserError(
                    f"{child / RUN_JSON} names the space {named}, and the {KINDS[self.folder.about.kind].words} "
                    f"{self.request.space_name}: "
                    "this is damage or an attack; put the file back from a backup"
                )
            asked = ResumeRequest(
                cohort=self.cohort.address,
                time_budget=time_budget,
                accelerator_hours=accelerator_hours,
                trust_space=self.trusts_space,
            )
            resume_sweep(child, asked, self.address, self.console, shared)
            return
        # What a process has left that was stopped before it had described the run.
        shutil.rmtree(child, ignore_errors=True)
        hours = self.request.accelerator_hours
        request = self.request.model_copy(
            update={
                **part.changes,
                "time_budget": time_budget,
                "accelerator_hours": None if hours is None else hours / len(self.parts),
            }
        )
        run_sweep(Launch(self.cohort.address, request, child, self.address, self.console), shared)


def run_nested(launch: Launch) -> RunFolder:
    """Search once for every one of the hold-outs, or of the budgets of labels, that the user asks for.

    Raises:
        UserError: a part of the request cannot work; this is raised before anything starts.
    """
    quiet()
    out = launch.out
    request, starts = read_starts(launch.request)
    _check_parts(request, out)
    opened = Cohort.open(launch.cohort)
    search = resolve_search(request, opened)
    refuse_other_starts(search.settings.begin.weights, search.profile.settings, starts)
    # Every sweep says its notes.
    tell_of_grid(search.settings, opened, Console(quiet=True))
    for part in request.parts:
        own = request.model_copy(update=part.changes)
        splits = check_subjects(own, search if request.outer else resolve_search(own, opened), opened)
        # Before there is a folder; every sweep says it again.
        judged = np.concatenate([splits.development, splits.holdout])
        check_leaks(
            starts,
            search.settings,
            opened,
            judged,
            Console(quiet=True),
            is_allowed=request.allow_seen_subjects,
        )
    refuse_taken(out)
    first = first_points(search, replace(launch, request=request))
    request = with_whole_grid(request, search, first)
    folder = create_run(out, _kind_of(request), recorded(request, search), search.base, opened, first)
    keep_starts(folder, starts, ())
    folder.update(space_file=describe_code(request.space_name))
    return NestedSearch(folder, request, opened, launch.console, launch.address).go_on(request.time_budget)


def _check_parts(request: SweepRequest, out: Path) -> None:
    """UserError if several searches cannot belong together so."""
    if address_of(out):
        raise UserError(f"{_asked(request)} needs --out on a disk, not at an address: give a folder")
    if request.outer and request.labelled:
        raise UserError(f"{_asked(request)} and --labelled cannot act together; give one")
    if request.outer and request.holdout != SweepRequest().holdout:
        raise UserError(
            f"--holdout {request.holdout:g} cannot act: --outer {request.outer} holds everyone out once"
        )
    if request.labelled and LABELLED in request.changes:
        raise UserError(f"{_asked(request)} and --set {LABELLED} both say how many are labelled; give one")
    if request.labelled and request.refit_seeds < FEWEST_SEEDS:
        raise UserError(
            f"{_asked(request)} needs --refit-seeds {FEWEST_SEEDS} or more: each seed chooses other subjects to be "
            "labelled"
        )


def _asked(request: SweepRequest) -> str:
    return f"--outer {request.outer}" if request.outer else f"--labelled {','.join(request.labelled)}"


def _kind_of(request: SweepRequest) -> str:
    """The kind of the run that is asked for."""
    return NESTED if request.outer is not None else CURVE if request.labelled else SWEEP


def run_or_resume(launch: Launch) -> RunFolder:
    """Begin a sweep, nested or not; or continue the one that is at `launch.out`, whatever state it is in.

    So a batch system may start the same command again. A run that is there goes on as it was recorded.

    Raises:
        UserError: see `run_sweep`, `run_nested` and `resume_run`.
    """
    request, out, console = launch.request, launch.out, launch.console
    if not is_run(out):
        return run_nested(launch) if request.parts else run_sweep(launch)
    bring_run(out, console)
    about, wanted = open_run(out).about, _kind_of(request)
    if about.kind != wanted:
        raise UserError(
            f"{run_as_typed(out)} is a '{about.kind}' run, and this command begins or continues a '{wanted}' run; give "
            "another --out"
        )
    given = request.model_copy(update={"space": request.space_name}).model_dump(mode="json")
    # Without objectives those of the task are meant.
    skipped = {"time_budget", "outer_fold", "labelled_at"} | (set() if request.objectives else {"objectives"})
    others = [
        f"{name.replace('_', '-')} {about.sweep[name]}, not {given[name]}"
        for name in sorted(about.sweep.keys() & given.keys() - skipped)
        if about.sweep[name] != given[name]
    ]
    if others:
        console.print(
            f"note: {run_as_typed(out)} goes on as it was recorded: {'; '.join(others)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    # The user has typed the same space just now.
    is_trusted = about.sweep.get("space") == given["space"] and about.sweep.get("task") == given["task"]
    asked = ResumeRequest(cohort=str(launch.cohort), time_budget=request.time_budget, trust_space=is_trusted)
    return resume_run(out, asked, launch.address, console)


def is_run(out: Path) -> bool:
    """Whether there is a run, also one that was stopped before its first trial."""
    place = address_of(out)
    if place is None:
        return (out / RUN_JSON).exists()
    try:
        return exists(place[0], RUN_JSON)
    except OSError as error:
        raise UserError(f"cannot read {shown(place[0])}: {error}") from error


def resume_run(run: Path, asked: ResumeRequest, address: str | None, console: Console) -> RunFolder:
    """Continue a run: a sweep, a nested search, or a training run.

    Raises:
        UserError: see `resume_sweep`; or a change is asked of a run that is no sweep.
    """
    bring_run(run, console)
    folder = open_run(run)
    if folder.about.kind not in (*KINDS, TRAIN):
        return resume_sweep(run, asked, address, console)
    quiet()
    kind = KINDS.get(folder.about.kind)
    allowed = {"cohort", "trust_space"} if kind is None else NO_CHANGES
    given = asked.model_dump(exclude=allowed, exclude_defaults=True)
    if given:
        what = "a training run" if kind is None else f"a {kind.words}"
        raise UserError(
            f"{what} cannot be changed (--{next(iter(given)).replace('_', '-')}): start a new run instead"
        )
    if folder.about.kind == TRAIN:
        return resume_training(folder, asked.cohort, address, console, is_trusted=asked.trust_space)
    request = as_request(folder.about.sweep)
    check_trusted(folder, request.space_name, console, is_trusted=asked.trust_space)
    if asked.accelerator_hours is not None:
        request = request.model_copy(update={"accelerator_hours": asked.accelerator_hours})
        folder.update(sweep=request.model_dump(mode="json"))
    search = NestedSearch(
        folder, request, cohort_of(folder, asked.cohort), console, address, trusts_space=asked.trust_space
    )
    if folder.about.finished and all(search.is_finished(part) for part in search.parts):
        console.print(f"nothing left to do: all {len(search.parts)} searches of {run} are finished")
        return folder
    return search.go_on(asked.time_budget, asked.accelerator_hours)
