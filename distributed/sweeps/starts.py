"""The weights that a run starts from: found, checked against the people who are judged, copied into the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from rich.console import Console

from core.config import Settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import Rows
from core.models.weights import freeze, load_part
from core.run_description import LeakCheck
from core.run_names import WEIGHTS
from core.run_settings import RunSettings
from core.starts import SHOWN, Start, data_set_of, keep_start, read_kept, read_start, seen_error, seen_of
from core.task_description import Rival, TaskDescription
from core.tasks import TASKS, find_task
from core.tasks.task import is_known, truth_of
from core.volumes.cohort.overlay import used_overlays
from core.volumes.cohort.reader import Cohort
from distributed.run.folder import RunFolder
from distributed.sweeps.request import NONE, SweepRequest


def find_start(settings: Settings) -> tuple[Settings, dict[str, Start]]:
    """The `settings` of one training with NAME#HASH in the place of a path, and the start, if there is one.

    Raises:
        UserError: there is no start, or it cannot be read.
    """
    given = resolve(settings).begin.weights
    if given is None:
        return settings, {}
    start = read_start(given)
    return merge(settings, {WEIGHTS: start.name}), {start.name: start}


def read_starts(
    request: SweepRequest, kept: Mapping[str, Start] | None = None
) -> tuple[SweepRequest, dict[str, Start]]:
    """The request of a sweep with NAME#HASH in the place of every path, and its starts.

    Args:
        request: as the user gave it, or with names.
        kept: the starts that a nested search keeps.

    Raises:
        UserError: there is no such start, or it cannot be read; the same start is given twice, or in two ways.
    """
    changed = request.changes.get(WEIGHTS)
    changed = str(changed) if changed not in (None, NONE) else None
    if request.start and WEIGHTS in request.changes:
        raise UserError(f"--start and --set {WEIGHTS} both say what to start from; give one")
    asked = [given for given in (*request.start, *([changed] if changed else [])) if given != NONE]
    typed = {given: kept[given] if kept and given in kept else read_start(given) for given in asked}
    names = tuple(given if given == NONE else typed[given].name for given in request.start)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--start {twice} is given twice")
    changes = request.changes
    if WEIGHTS in changes:
        changes = {**changes, WEIGHTS: typed[changed].name if changed else None}
    named = request.model_copy(update={"start": names, "changes": changes})
    return named, {start.name: start for start in typed.values()}


def refuse_other_starts(given: str | None, searched: Collection[str], starts: Mapping[str, Start]) -> None:
    """UserError if a file of settings or a space says what to start from: only options are checked and copied.

    Args:
        given: what the settings start from.
        searched: the parameters of the space.
        starts: those that were read.
    """
    if given is not None and given not in starts:
        raise UserError(f"{WEIGHTS}={given} stands in the settings of the space; give it by --start {given}")
    if WEIGHTS in searched and len(starts) == 0:
        raise UserError(f"the space asks for {WEIGHTS}; take it out, and give --start none --start RUN")


def with_starts(task: TaskDescription, starts: Sequence[str | None]) -> TaskDescription:
    """The description of a task for a run that compares starts: the best trial of each is refitted, too."""
    if len(starts) < 2:
        return task
    short = ["scratch" if start is None else start.partition("#")[0] for start in starts]
    # Two runs may have the same name in two folders.
    whose = [
        start if start is not None and short.count(name) > 1 else name
        for start, name in zip(starts, short, strict=True)
    ]
    rivals = tuple(
        Rival(
            folder=f"start-{NONE if start is None else start}",
            method=f"best from {name}",
            words=f"the best from {name}",
            changes={WEIGHTS: start},
        )
        for start, name in zip(starts, whose, strict=True)
    )
    return task.model_copy(update={"starts": rivals})


def check_leaks(
    starts: Mapping[str, Start],
    settings: RunSettings,
    cohort: Cohort,
    judged: Rows,
    console: Console,
    *,
    is_allowed: bool,
) -> tuple[LeakCheck, ...]:
    """What is known of each start, and of each derived column: whether models behind it know people who are judged.

    Args:
        starts: by name.
        settings: of the run; they name columns and maps.
        cohort: of the run.
        judged: the rows of all folds and the hold-out.
        console: where the user is told.
        is_allowed: whether the user allows it.

    Raises:
        UserError: it was, and the user has not allowed it.
    """
    data_set, manifest = data_set_of(cohort.description), cohort.manifest
    people = manifest["subject"].to_numpy(str)
    checks = []
    for start in starts.values():
        found = seen_of(start, manifest, judged, data_set)
        seen = None if found is None else tuple(np.unique(people[found.rows]).tolist())
        check = LeakCheck(
            start=start.name,
            judged=len(np.unique(people[judged])),
            seen=seen,
            alike=0 if found is None else found.alike,
        )
        if seen and not is_allowed:
            assert start.trained_on is not None
            raise seen_error(start, seen, data_set in set(start.trained_on["data_set"]))
        console.print(f"note: {check.in_words()}", highlight=False, soft_wrap=True, markup=False)
        checks.append(check)
    # A task of a user's own, or one on columns whose space may choose others, may use any of them.
    sees_images = settings.task in TASKS and find_task(settings.task).features(settings, manifest) is None
    named = used_overlays(cohort.overlays, settings.model_dump(mode="json"))
    for name, overlay in (named if sees_images else cohort.overlays).items():
        if overlay.description.maps:
            # Of every scan by itself: no model has learnt it.
            continue
        seen = tuple(np.unique(people[judged][overlay.seen[judged]]).tolist())
        check = LeakCheck(
            start=f"{overlay.description.made_by}, which made the columns of {name},",
            judged=len(np.unique(people[judged])),
            seen=seen,
        )
        if seen and not is_allowed:
            raise UserError(
                f"{check.in_words().rstrip('.')} ({', '.join(seen[:SHOWN])}{' …' if len(seen) > SHOWN else ''}); sweep "
                "that run with --confirm-seeds 1 and derive again, so that every person is predicted by models that do "
                "not know them, or give --allow-seen-subjects"
            )
        console.print(f"note: {check.in_words()}", highlight=False, soft_wrap=True, markup=False)
        checks.append(check)
    return tuple(checks)


def tell_what_matches(
    settings: RunSettings, starts: Mapping[str, Start], cohort: Cohort, training: Rows, console: Console
) -> None:
    """Load every start into the model of these settings, and say what became of its weights.

    Raises:
        UserError: it does not fit, or a part that the settings name is not there.
    """
    task, manifest = find_task(settings.task), cohort.manifest
    labels = task.labels(settings, manifest)
    known = training[is_known(labels)[training]]
    facts = task.learn(settings, truth_of(manifest, labels, known, task.more_labels(settings, manifest)))
    channels = settings.data.channels or cohort.description.channels
    for start in starts.values():
        others = [name.lower() for name in start.channels] != [name.lower() for name in channels]
        if start.channels and others:
            console.print(
                f"note: {start.name} was trained on {', '.join(start.channels)}, and here it reads "
                f"{', '.join(channels)}",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip
        model = task.build(settings, len(channels), facts)
        report = load_part(model, start.tensors, settings.begin.take, settings.begin.rename)
        freeze(model, settings.begin.freeze)
        part = settings.begin.take.replace("_", " ")
        console.print(
            f"note: {start.name} into the {part}: {report}", highlight=False, soft_wrap=True, markup=False
        )


def keep_starts(folder: RunFolder, starts: Mapping[str, Start], leaks: tuple[LeakCheck, ...]) -> None:
    """Copy the starts into a run, with what the check of leaks found."""
    for start in starts.values():
        keep_start(start, folder.starts)
    if leaks:
        folder.update(leaks=leaks)


def starts_of(folder: RunFolder) -> dict[str, Start]:
    """The starts that a run keeps."""
    return read_kept(folder.starts)
