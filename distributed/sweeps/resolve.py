"""Check whether a sweep can work as requested; a sweep that cannot is refused here, before anything starts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
import pandas as pd
from pydantic import JsonValue

from core.config import FIRST, TASK, Settings, merge, needed_maps, parse_changes, resolve
from core.errors import UserError
from core.evaluation.splits import (
    Splits,
    make_splits,
    nested_splits,
    splits_as_recorded,
    splits_by_column,
    splits_leaving_out,
)
from core.files.python import file_of
from core.files.tables import read_table
from core.lookup import did_you_mean
from core.objectives import Metric, find_objectives
from core.run_names import SPLITS, WEIGHTS
from core.run_settings import BeginSettings, RunSettings
from core.task_description import Rival, TaskDescription
from core.tasks import find_task
from core.tasks.task import Task
from core.volumes.cohort.reader import Cohort
from distributed.search.budget import Budget, make_terminator
from distributed.search.population_methods import POPULATIONS, check_population
from distributed.search.samplers import GRID, check_sampler
from distributed.search.schedulers import Wilcoxon, make_scheduler, pruner_threshold, spares
from distributed.search.searcher import Judgement
from distributed.search.study import check_space
from distributed.sweeps.request import SweepRequest, TrainRequest, space_of
from search_spaces import load_space, pin, without
from search_spaces.points import Profile, Space

Request = TypeVar("Request", SweepRequest, TrainRequest)


@dataclass(frozen=True)
class ResolvedSearch:
    """A request that can work: its space without the settings that the user fixed, and the settings to start from."""

    space: Space
    base: Settings
    profile: Profile
    objectives: dict[str, Metric]
    baseline: ResolvedSearch | None = None
    """The search for the baseline, if it was asked for."""

    @property
    def settings(self) -> RunSettings:
        """`base`, validated."""
        return resolve(self.base)

    @property
    def task(self) -> Task[Any]:
        """The task of the settings."""
        return find_task(self.settings.task)

    @property
    def about(self) -> TaskDescription:
        """The task of the settings in words."""
        return self.task.describe(self.settings)

    @property
    def epochs(self) -> int:
        """The epochs of a cell, those of its first stage included."""
        first = self.settings.pretraining
        return self.judged_epochs + (0 if first is None else first.training.rounds)

    @property
    def judged_epochs(self) -> int:
        """The epochs of a cell after which trials are compared."""
        return self.settings.training.rounds

    @property
    def first(self) -> str:
        """The name of the first objective."""
        return next(iter(self.objectives))

    @property
    def about_first(self) -> Metric:
        """The first objective in words."""
        return self.objectives[self.first]


def resolve_search(request: SweepRequest, cohort: Cohort, base: Settings | None = None) -> ResolvedSearch:
    """Resolve a request and try every choice in it.

    Args:
        request: the request of the user.
        cohort: the cohort of the sweep.
        base: the settings with which the run began, when it is resumed.

    Raises:
        UserError: the first choice, or combination of choices, that cannot work, and why.
    """
    space, published = load_space(request.space_name)
    choices = choices_of(request)
    space = _with_choices(pin(_with_starts(space, request), request.changes), choices)
    is_new, first = base is None, {name: values[0] for name, values in choices.items()}
    if base is None:
        # The published configuration starts from scratch, if that is one of the choices.
        begun = {WEIGHTS: None if None in request.starts else request.starts[0]} if request.start else {}
        asked = chosen_task(request.task) | request.changes | first | begun
        base = resolve(merge(with_first_stage(published, asked), asked)).model_dump(mode="json")
    profile = check_space(space, base)
    settings = resolve(base)
    about = find_task(settings.task).describe(settings)
    sites = cohort.manifest["site"].replace("", None).dropna().nunique()
    objectives = find_objectives(request.objectives or about.objectives[:1], about.searchable, int(sites))
    check_sampler(request.sampler, profile, len(objectives))
    if request.grid_points and request.sampler != GRID:
        raise UserError(
            f"--grid-points {request.grid_points} acts with --sampler grid only, not {request.sampler}"
        )
    make_scheduler(request.scheduler, settings.training.rounds, len(request.cells))
    if request.stages > 1 and settings.pretraining is None:
        raise UserError(f"--stages {request.stages} cannot act: there is no first stage; set {FIRST}.{TASK}")
    if request.stages > 1 and not any(name.startswith(f"{FIRST}.") for name in profile.settings):
        raise UserError(
            f"--stages {request.stages} cannot act: the space searches no setting of a first stage, such as "
            f"{FIRST}.objective.temperature; leave it out, or use another space"
        )
    if request.scheduler in POPULATIONS:
        if settings.pretraining is not None:
            raise UserError(
                f"--scheduler {request.scheduler} cannot act with pretraining: its members go on from each other's "
                "weights; use --scheduler asha"
            )
        _check_population(request, profile, settings)
    pruner_threshold(request.pruner, len(request.cells))
    if is_new:
        _check_startup(request)
    make_terminator(request.stop_when, request.search_seed, len(objectives), len(profile.always))
    search = ResolvedSearch(space, base, profile, objectives)
    if not request.baseline_trials:
        return search
    if about.rival is None:
        raise UserError(f"--baseline-trials cannot act: the task {about.name} has no older method to tune")
    return replace(search, baseline=_resolve_baseline(request, search, about.rival, is_new=is_new))


def _with_starts(space: Space, request: SweepRequest) -> Space:
    """The space with the choice of a start, if several were given.

    Raises:
        UserError: they cannot be compared so.
    """
    if len(request.starts) < 2:
        return space
    if request.trials < len(request.starts):
        raise UserError(
            f"--trials {request.trials} are fewer than the {len(request.starts)} starts: each needs one or more"
        )
    if request.scheduler in POPULATIONS:
        raise UserError(
            f"--start {' --start '.join(request.start)} cannot act with --scheduler {request.scheduler}: its members "
            "go on from each other's weights; use --scheduler asha"
        )

    def among(trial: optuna.Trial) -> Settings:
        start = trial.suggest_categorical(WEIGHTS, request.starts)
        if start is None:
            # There is nothing to keep: a random encoder that is frozen learns nothing.
            scratch = BeginSettings().model_dump(mode="json", exclude={"weights"})
            return {
                **space(trial),
                WEIGHTS: None,
                **{f"begin.{name}": value for name, value in scratch.items()},
            }
        # What was learnt before is lost at the rate of a training from scratch, or kept as it is.
        rate = trial.suggest_float("begin.rate", 0.01, 1.0, log=True)
        frozen = trial.suggest_categorical("begin.freeze", ["none", "encoder"])
        thawed: Settings = {"begin.thaw": None} if frozen == "none" else {}
        return {**space(trial), WEIGHTS: start, "begin.rate": rate, "begin.freeze": frozen, **thawed}

    return among


def _with_choices(space: Space, choices: Mapping[str, Sequence[JsonValue]]) -> Space:
    """The space in which these settings are chosen among values, whatever it offers itself."""
    if not choices:
        return space

    def among(trial: optuna.Trial) -> Settings:
        given: Settings = {
            name: trial.suggest_categorical(name, list(cast(Any, values))) for name, values in choices.items()
        }
        return {**pin(space, given)(trial), **given}

    return among


def choices_of(request: SweepRequest) -> dict[str, list[JsonValue]]:
    """The settings that --choose lets the search choose, and their values.

    Raises:
        UserError: no such setting, fewer than two values, or one that is given, too.
    """
    found: dict[str, list[JsonValue]] = {}
    for text in request.choose:
        name, _, values = text.partition("=")
        several = [value.strip() for value in values.split(",") if value.strip()]
        if len(set(several)) < 2:
            raise UserError(
                f"--choose {text}: two values or more are needed, as in --choose {name or 'NAME'}=A,B"
            )
        if name in request.changes or name in found:
            raise UserError(f"--choose {text}: {name} is given twice; let it be chosen, or set it")
        found[name] = [cast(JsonValue, parse_changes([f"{name}={value}"])[name]) for value in several]
    return found


def maps_of(request: SweepRequest, base: Settings) -> tuple[str, ...]:
    """The maps that trials of a sweep read: those of its settings, with every value that --choose names."""
    choices = choices_of(request)
    combined = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return tuple(dict.fromkeys(name for each in combined for name in needed_maps(resolve(merge(base, each)))))


def with_first_stage(settings: Settings, changes: Settings) -> Settings:
    """The settings with the published ones of a first stage, if `changes` ask for one and there is none yet."""
    task = changes.get(f"{FIRST}.{TASK}")
    if settings.get(FIRST) is not None or not isinstance(task, str):
        return settings
    stage = {} if file_of(task) is not None else load_space(space_of(task))[1]
    own = {name: value for name, value in stage.items() if name not in ("begin", FIRST)}
    return settings | {FIRST: {TASK: task, **own}}


def chosen_task(name: str | None) -> dict[str, Any]:
    """The change of settings that chooses a task; its file has a whole path, because workers have other folders."""
    if name is None:
        return {}
    path = file_of(name)
    return {"task": name if path is None else f"{path.resolve()}:{_function(name)}"}


def _function(name: str) -> str:
    return "task" if Path(name).suffix == ".py" else name.rpartition(":")[2]


def _check_startup(request: SweepRequest) -> None:
    """UserError if there is nothing that would stop the startup trials early."""
    stops = request.pruner != "none" or request.scheduler not in ("none", *POPULATIONS)
    if request.startup_trials and not stops:
        raise UserError(
            f"--startup-trials {request.startup_trials} cannot act: --scheduler {request.scheduler} stops no trial "
            "early, and there is no --pruner; leave it out, or use --scheduler asha"
        )


def judgement(
    request: SweepRequest, search: ResolvedSearch, study: optuna.Study, budget: Budget
) -> Judgement:
    """How the trials of `study` are judged; `budget` is that of its search."""
    cells, objectives = len(request.cells), search.objectives
    threshold = pruner_threshold(request.pruner, cells)
    spared = spares(request.startup_trials, budget)
    shared = len(search.profile.always)
    return Judgement(
        objectives,
        search.about.searchable,
        request.scheduler,
        Wilcoxon(threshold, study, search.first, search.about_first, cells, spared) if threshold else None,
        make_terminator(request.stop_when, request.search_seed, len(objectives), shared),
    )


def _resolve_baseline(
    request: SweepRequest, search: ResolvedSearch, rival: Rival, *, is_new: bool
) -> ResolvedSearch:
    """The search for the baseline: the same space without the settings that the `rival` does not have.

    A run that is resumed may have finished it, and had its space changed then: what is left of it is not checked.

    Raises:
        UserError: nothing is left to search, or it cannot be searched in this way.
    """
    asked, changes, objectives = (
        f"--baseline-trials {request.baseline_trials}",
        rival.changes,
        search.objectives,
    )
    if request.scheduler in POPULATIONS or request.sampler == GRID:
        other = f"--sampler {GRID}" if request.sampler == GRID else f"--scheduler {request.scheduler}"
        raise UserError(
            f"{asked} cannot act with {other}: {rival.words} has so many trials, one by one, each of another "
            f"configuration; use {'--sampler tpe' if request.sampler == GRID else '--scheduler asha'}"
        )
    published = search.settings.model_dump(mode="json")
    base = resolve(merge(published, changes)).model_dump(mode="json")
    rest = without(search.space, rival.without, published)

    def own(trial: optuna.Trial) -> Settings:
        return {**rest(trial), **changes}

    profile = check_space(own, base)
    if not is_new:
        return ResolvedSearch(own, base, profile, objectives)
    if not profile.settings:
        raise UserError(
            f"{asked} has nothing to search: this space has only settings that {rival.words} does not have; leave it "
            "out, or search a setting such as optimiser.learning_rate, too"
        )
    try:
        check_sampler(request.sampler, profile, len(objectives))
        make_terminator(request.stop_when, request.search_seed, len(objectives), len(profile.always))
    except UserError as error:
        raise UserError(f"{asked}, without the settings that {rival.words} does not have: {error}") from None
    return ResolvedSearch(own, base, profile, objectives)


def splits_of(
    request: SweepRequest | TrainRequest, manifest: pd.DataFrame, by: str, own: Path | None = None
) -> Splits:
    """The hold-out and the folds that a request asks for.

    Args:
        request: of the user.
        manifest: of the cohort.
        by: the column in which the parts are alike.
        own: the splits of the run itself, if it has begun: what it took from another run is read there.

    Raises:
        UserError: the subjects cannot be divided so.
    """
    if by not in manifest:
        known = did_you_mean(by, map(str, manifest.columns))
        raise UserError(f"folds are to be alike in '{by}', and the cohort has no such column; {known}")
    given, sweep = request.given_splits, request if isinstance(request, SweepRequest) else None
    asked = sweep or SweepRequest()
    holdout, seed = asked.holdout, asked.search_seed
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} both say who is in which part; give one")
    if given and asked.outer is not None:
        raise UserError(f"{given[0]} cannot act: --outer {asked.outer} makes hold-outs of its own")
    if request.folds_from is not None:
        return splits_by_column(manifest, request.folds_from, request.folds, holdout, seed, by)
    if request.leave_out is not None:
        return splits_leaving_out(manifest, request.leave_out, request.folds, holdout, seed)
    if request.splits_from is not None:
        path = own if own is not None and own.exists() else request.splits_from / SPLITS
        try:
            recorded = read_table(path, ("subject", "role"))
        except FileNotFoundError:
            raise UserError(f"--splits-from {request.splits_from}: there is no {path}") from None
        splits = splits_as_recorded(manifest, recorded, request.folds, str(path))
        if sweep is not None and not splits.holdout.size:
            raise UserError(f"--splits-from {request.splits_from}: nobody is held out there")
        if request.splits_hash not in (None, hash_of(splits, manifest)):
            raise UserError(f"{path} is damaged: put it back from a backup, or start a new run")
        return splits
    if isinstance(request, SweepRequest) and request.outer is not None and request.outer_fold is not None:
        return nested_splits(manifest, request.outer, request.folds, request.search_seed, by)[
            request.outer_fold
        ]
    return make_splits(manifest, request.folds, holdout, seed, by)


def with_hash(request: Request, splits: Splits, manifest: pd.DataFrame) -> Request:
    """The request, which knows what it took from another run: that one may change, or go."""
    if request.splits_from is None:
        return request
    return request.model_copy(update={"splits_hash": hash_of(splits, manifest)})


def hash_of(splits: Splits, manifest: pd.DataFrame) -> str:
    """SHA-256 of who is in which part."""
    return hashlib.sha256(splits.to_frame(manifest).to_csv(index=False).encode()).hexdigest()


def _check_population(request: SweepRequest, profile: Profile, settings: RunSettings) -> None:
    beside = {
        "sampler": GRID if request.sampler == GRID else "",
        "pruner": "" if request.pruner == "none" else request.pruner,
        "stop-when": "" if request.stop_when == "never" else request.stop_when,
        "objectives": ",".join(request.objectives) if len(request.objectives) > 1 else "",
    }
    check_population(request.scheduler, profile, settings.training.rounds, request.trials, beside)
