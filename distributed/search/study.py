"""The Optuna study of a run: make it, check its space, enqueue points, and carry it over to another space."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.terminator import report_cross_validation_scores
from optuna.trial import FrozenTrial, TrialState

from core.config import Settings, check_settings, flatten, merge, resolve, task_of, with_absent
from core.errors import UserError
from core.objectives import Objectives
from core.report.answer.record import reported
from core.run_names import (
    LABEL,
    MEMBER,
    OUTSIDE,
    OUTSIDE_LABEL,
    PUBLISHED,
    REASON,
    SETTINGS,
    STUDY,
    VALUE_AT,
    WEIGHTS,
)
from distributed.run.assignment import Progress, assign, identity, read_progress, trial_name
from distributed.run.journal import Journal
from distributed.search.samplers import make_sampler
from search_spaces.points import (
    Asked,
    OutsideSpaceError,
    Profile,
    RefusedPointError,
    Space,
    point_of,
    profile_of,
    propose,
)

POINTS_TRIED = 30
KEPT_SYSTEM_ATTRIBUTES = ("terminator:cv_scores", "fixed_params")
"""The notes of Optuna on a trial that have the same meaning in another space."""


def open_study(
    journal: Path, sampler: str, seed: int, objectives: Objectives, name: str = STUDY
) -> optuna.Study:
    """The study `name` in `journal`, made if absent, in which every objective has its direction.

    Raises:
        UserError: the journal has a study of this name with other directions.
    """
    directions = [metric.direction for metric in objectives.values()]
    study = optuna.create_study(
        storage=_storage(journal), study_name=name, directions=directions, load_if_exists=True
    )
    recorded = [direction.name.lower() for direction in study.directions]
    if recorded != directions:
        raise UserError(
            f"{journal} has a study that would {', '.join(recorded)}, and {', '.join(objectives)} asks to "
            f"{', '.join(directions)}: start a new run"
        )
    study.sampler = make_sampler(sampler, seed, begun=trials_begun(study))
    if study.metric_names is None:
        study.set_metric_names([metric.label for metric in objectives.values()])
    return study


def together(study: optuna.Study) -> AbstractContextManager[None]:
    """What is told to the study inside is written at once; see `Journal.together`."""
    backend = getattr(study._storage, "_backend", None)
    return backend.together() if isinstance(backend, Journal) else nullcontext()


def ranks(study: optuna.Study, values: Sequence[float]) -> tuple[float, ...]:
    """The values of a trial, each with the sign that makes lower ones better."""
    return tuple(
        -value if direction == StudyDirection.MAXIMIZE else value
        for value, direction in zip(values, study.directions, strict=False)
    )


def trials_begun(study: optuna.Study) -> int:
    """The number of trials that have begun; enqueued trials that still wait do not count."""
    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have begun and not ended; after an interruption they continue."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _storage(journal: Path) -> JournalStorage:
    return JournalStorage(Journal(journal))


def proposed_settings(space: Space, base: Settings, trial: optuna.trial.BaseTrial) -> Settings:
    """The resolved settings that `space` proposes for `trial`, as JSON values.

    Raises:
        RefusedPointError: the space or the settings cannot take this point.
        optuna.TrialPruned: the space gave it up.
    """
    proposed = propose(space, trial)
    try:
        return _checked(merge(base, proposed))
    except UserError as error:
        raise RefusedPointError(str(error)) from error


def _checked(settings: Settings) -> Settings:
    """The resolved settings, as JSON values; UserError if they cannot work."""
    resolved = resolve(settings)
    check_settings(resolved)
    return resolved.model_dump(mode="json")


def settings_of(trial: optuna.Trial, space: Space, base: Settings) -> Settings | None:
    """The settings of a trial that begins or continues, which are recorded with it; see `proposed_settings`.

    A trial that the space or the settings refuse is ended: FAIL, or PRUNED if the space gave it up, with the reason.
    Then this is None.
    """
    if SETTINGS in trial.user_attrs:
        return recorded_settings(trial, base)
    try:
        settings = proposed_settings(space, base, trial)
    except (RefusedPointError, optuna.TrialPruned) as refusal:
        pruned = isinstance(refusal, optuna.TrialPruned)
        reason = f"the space gave it up{f': {refusal}' if str(refusal) else ''}" if pruned else str(refusal)
        trial.set_user_attr(REASON, reason)
        trial.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
        return None
    trial.set_user_attr(SETTINGS, json.dumps(settings))
    return settings


def recorded_settings(trial: FrozenTrial | optuna.Trial, base: Settings) -> Settings:
    """The settings that are recorded with a trial of a study, which starts from `base`.

    Raises:
        UserError: they are of another task. A task may be a file that is executed, and others may have written the
            journal.
    """
    settings: Settings = json.loads(trial.user_attrs[SETTINGS])
    if task_of(settings) != task_of(base):
        raise UserError(
            f"trial {trial_name(trial.number)} is recorded with the task {task_of(settings)}, and this run is of "
            f"{task_of(base)}: this is damage or an attack; put the journal back from a backup"
        )
    return settings


def check_space(space: Space, base: Settings) -> Profile:
    """Try `space` at `POINTS_TRIED` random points before anything is started; returns what it searches.

    A few points that it refuses are no mistake: their trials fail, and the search goes on.

    Raises:
        UserError: it refuses every point, a setting has choices that depend on another one, or `base` cannot work.
    """
    _checked(base)
    # This sampler looks neither at a study nor at a trial.
    sampler, study = optuna.samplers.RandomSampler(seed=0), optuna.create_study()
    frozen = optuna.trial.create_trial(state=TrialState.RUNNING)
    points: list[dict[str, BaseDistribution]] = []
    refused: list[str] = []
    for number in range(POINTS_TRIED):
        asked = Asked(
            lambda name, distribution: sampler.sample_independent(study, frozen, name, distribution), number
        )
        try:
            proposed_settings(space, base, asked)
        except (RefusedPointError, optuna.TrialPruned) as refusal:
            refused.append(str(refusal) or "the space prunes every trial")
        else:
            points.append(asked.distributions)
    if not points:
        raise UserError(
            f"all of {POINTS_TRIED} random points of the space are refused; the first: {refused[0]}"
        )
    return profile_of(points, refused)


def published_parameters(space: Space, base: Settings) -> dict[str, Any] | None:
    """The point of `space` for the published configuration `base`; None if it lies outside the space."""
    every_setting = flatten(resolve(base).model_dump(mode="json"))
    try:
        return point_of(space, with_absent(every_setting), all_used=False)
    except OutsideSpaceError:
        return None


def read_points(path: Path, space: Space) -> list[dict[str, Any]]:
    """The configurations in a YAML file, a list of {dotted name: value}, each a point of `space`.

    Raises:
        UserError: the file is not such a list, or an entry (counted from 1) is incomplete or outside the space.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of configurations, got {type(entries).__name__}")
    points = []
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"entry {place} of {path} must be a mapping of names to values, got {entry!r}")
        # YAML 1.1 reads 1e-3 as text.
        settings = {name: _as_number(value) for name, value in flatten(entry).items()}
        try:
            points.append(point_of(space, settings))
        except OutsideSpaceError as error:
            raise UserError(f"entry {place} of {path}: {error}") from None
    return points


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]], label: str | None) -> int:
    """Let `study` try `points` next, in their order, except points that it has already; returns how many are new.

    `label` is their name in the tables. A member of a population changes its settings, and is trained on one cell only:
    it is no trial of the point with which it began.
    """
    known = [
        trial.params or trial.system_attrs.get("fixed_params")
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get(LABEL) != MEMBER
    ]
    fresh = [dict(point) for point in points if dict(point) not in known]
    for point in fresh:
        study.enqueue_trial(point, user_attrs={LABEL: label} if label else None)
    return len(fresh)


def report_value(trial: optuna.Trial, value: float, epochs: int) -> None:
    """Record a value that a trial reported. With several objectives Optuna refuses it, so it becomes an attribute."""
    if len(trial.study.directions) == 1:
        trial.report(value, step=epochs)
    else:
        trial.set_user_attr(f"{VALUE_AT}{epochs}", value)


def report_missing(study: optuna.Study, trial: FrozenTrial, values: Mapping[int, float]) -> None:
    """Record what an unfinished trial has done and the study does not know, because the search was killed in between.

    Args:
        study: the study of the trial.
        trial: a trial that continues.
        values: the finite values that it has answered, by the epochs done in all cells.
    """
    known, open_trial = reported(trial), optuna.Trial(study, trial._trial_id)
    for epochs in sorted(values.keys() - known.keys()):
        report_value(open_trial, values[epochs], epochs)


ReadProgress = Callable[[FrozenTrial], Progress]


def progress_reader(place: Callable[[str], Path], cells: list[dict[str, int]], metric: str) -> ReadProgress:
    """Reads the progress of trials. It is empty if a folder holds another configuration that had the same number.

    This is so between the moment when a study has lost its end and the moment when a worker sets the folder aside.

    Args:
        place: the folder of a trial, by the name of the folder.
        cells: of every trial.
        metric: its first objective.
    """

    def read(trial: FrozenTrial) -> Progress:
        folder = place(trial_name(trial.number))
        progress, settings = read_progress(folder), trial.user_attrs.get(SETTINGS)
        # The settings of a member of a population change while it trains.
        if progress["of"] is None or settings is None or trial.user_attrs.get(LABEL) == MEMBER:
            return progress
        own = identity(assign(folder, json.loads(settings), cells, metric=metric))
        return progress if progress["of"] == own else Progress(of=None, history=[], cells=[], answer=None)

    return read


def hear_missed(study: optuna.Study, unfinished: Sequence[FrozenTrial], read: ReadProgress) -> None:
    """Record for all `unfinished` trials what the study does not know."""
    for trial in unfinished:
        # A first stage has no values, and values are counted without it.
        done = enumerate((row for row in read(trial)["history"] if not row.get("stage")), start=1)
        answered = {epochs: row.get("value", math.nan) for epochs, row in done}
        report_missing(
            study, trial, {epochs: value for epochs, value in answered.items() if math.isfinite(value)}
        )


def report_cells(trial: optuna.Trial, values: list[float]) -> None:
    """Record the first objective of every cell; the terminator of Optuna estimates the noise from it."""
    if len(values) > 1:
        # Optuna warns that version 6 will drop its terminator; a user can do nothing about it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            report_cross_validation_scores(trial, values)


@dataclass(frozen=True)
class CarriedOver:
    """The result of `carry_over`: the new study, and how many of the old trials lie inside the new space."""

    study: optuna.Study
    inside: int = 0
    outside: list[int] = field(default_factory=list)
    dropped: int = 0
    """The number of enqueued trials that the new space does not contain."""


def carry_over(
    old: optuna.Study, new: optuna.Study, space: Space, fixed: Mapping[str, Any] | None = None
) -> CarriedOver:
    """Copy the trials of `old` into `new`, an empty study for `space`, keeping their numbers.

    `fixed` are settings that `space` no longer searches, by dotted name. A trial with exactly these values lies inside
    the space.

    Optuna does not allow a study to change the choices of a setting, so another space needs another study. A trial
    outside `space` keeps its value and its row in every table, but not its parameters: no sampler learns from it, and
    it cannot win. If such a trial was interrupted, it ends as PRUNED.
    """
    inside, outside, dropped = 0, [], 0
    for trial in old.get_trials():
        if trial.state == TrialState.WAITING:
            point = trial.system_attrs.get("fixed_params", {})
            within = _within(space, point, fixed or {})
            if within is not None:
                new.enqueue_trial(within, user_attrs=trial.user_attrs)
            else:
                dropped += 1
        elif (
            OUTSIDE not in trial.user_attrs
            and (within := _within(space, trial.params, fixed or {})) is not None
        ):
            new.add_trial(_copied(trial, within, space))
            inside += 1
        else:
            new.add_trial(_set_aside(trial))
            outside.append(trial.number)
    return CarriedOver(new, inside, outside, dropped)


def _within(space: Space, point: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of `space` at `point`; None if the point lies outside."""
    if any(point[name] != fixed[name] for name in fixed.keys() & point.keys()):
        return None
    try:
        return point_of(space, {name: value for name, value in point.items() if name not in fixed})
    except OutsideSpaceError:
        return None


def _copied(trial: FrozenTrial, within: dict[str, Any], space: Space) -> FrozenTrial:
    """`trial` with the parameters and distributions of `space`."""
    asked = Asked(lambda name, distribution: within[name])
    propose(space, asked)
    copied = _without_notes(trial)
    copied.params, copied.distributions = asked.params, asked.distributions
    return copied


def _set_aside(trial: FrozenTrial) -> FrozenTrial:
    """`trial` without parameters; an attribute keeps them for the tables."""
    aside = _without_notes(trial)
    if OUTSIDE not in trial.user_attrs:
        aside.user_attrs = trial.user_attrs | {OUTSIDE: trial.params}
    aside.user_attrs.setdefault(LABEL, OUTSIDE_LABEL)
    aside.params, aside.distributions = {}, {}
    if trial.state == TrialState.RUNNING:
        aside.state, aside.datetime_complete = TrialState.PRUNED, trial.datetime_start
        aside.user_attrs[REASON] = "the space was changed, and this lies outside"
    return aside


def _without_notes(trial: FrozenTrial) -> FrozenTrial:
    copied = copy.deepcopy(trial)
    copied.system_attrs = {
        key: value for key, value in trial.system_attrs.items() if key in KEPT_SYSTEM_ATTRIBUTES
    }
    return copied


def owed_trial(study: optuna.Study) -> FrozenTrial | None:
    """The unfinished trial that no budget and no scheduler stops, so that every search has a result.

    The published one; once it has ended, and as long as there is no result, the first of the unfinished ones. None if
    none is owed, or none is unfinished. Members of a population are trained on one cell only, and trials outside the
    space cannot win: none of them is a result.
    """
    unfinished = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        if trial.user_attrs.get(LABEL) != MEMBER and OUTSIDE not in trial.user_attrs
    ]
    published = [trial for trial in unfinished if trial.user_attrs.get(LABEL) == PUBLISHED]
    if published or best_trial(study) is None:
        return min(published or unfinished, key=lambda trial: trial.number, default=None)
    return None


ANY = object()
"""Whatever a trial started from."""


def best_trial(study: optuna.Study, start: object = ANY) -> FrozenTrial | None:
    """The completed trial inside the present space with the best first objective; None if there is none.

    The other objectives break ties, so that the winner is on the Pareto front. With `start` of those that started from
    it: NAME#HASH, or None for random weights.
    """
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    within = [
        trial
        for trial in completed
        if OUTSIDE not in trial.user_attrs and start in (ANY, trial.params.get(WEIGHTS))
    ]
    return min(within, key=lambda trial: (ranks(study, trial.values), trial.number), default=None)
