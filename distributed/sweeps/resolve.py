"""Check whether a sweep can work as requested; a sweep that cannot is refused here, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import optuna
import pandas as pd

from core.config import RunSettings, Settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import Splits, make_splits, nested_splits
from core.objectives import check_objectives
from core.tasks.brain_age import CONTRASTIVE_ONLY
from core.volumes.cohort.reader import Cohort
from distributed.search.budget import Budget, make_terminator
from distributed.search.population_methods import POPULATIONS, check_population
from distributed.search.samplers import GRID, check_sampler
from distributed.search.schedulers import Wilcoxon, make_scheduler, pruner_threshold, spares
from distributed.search.searcher import Judgement
from distributed.search.study import check_space
from distributed.sweeps.request import SweepRequest
from search_spaces import load_space, pin, without
from search_spaces.points import Profile, Space


@dataclass(frozen=True)
class ResolvedSearch:
    """A request that can work: its space without the settings that the user fixed, and the settings to start from."""

    space: Space
    base: Settings
    profile: Profile
    baseline: ResolvedSearch | None = None
    """The search for the L1 baseline, if it was asked for."""

    @property
    def epochs(self) -> int:
        """The epochs of a cell."""
        return resolve(self.base).training.epochs


def resolve_search(request: SweepRequest, cohort: Cohort, base: Settings | None = None) -> ResolvedSearch:
    """Resolve a request and try every choice in it.

    Args:
        request: the request of the user.
        cohort: the cohort of the sweep.
        base: the settings with which the run began, when it is resumed.

    Raises:
        UserError: the first choice, or combination of choices, that cannot work, and why.
    """
    space, published = load_space(request.space)
    space, is_new = pin(space, request.changes), base is None
    if base is None:
        base = resolve(merge(published, request.changes)).model_dump(mode="json")
    profile = check_space(space, base)
    settings = resolve(base)
    sites = cohort.manifest["site"].replace("", None).dropna().nunique()
    check_objectives(request.objectives, int(sites))
    check_sampler(request.sampler, profile, len(request.objectives))
    if request.grid_points and request.sampler != GRID:
        raise UserError(
            f"--grid-points {request.grid_points} acts with --sampler grid only, not {request.sampler}"
        )
    make_scheduler(request.scheduler, settings.training.epochs, len(request.cells))
    if request.scheduler in POPULATIONS:
        _check_population(request, profile, settings)
    pruner_threshold(request.pruner, len(request.cells))
    if is_new:
        _check_startup(request)
    make_terminator(request.stop_when, request.search_seed, len(request.objectives), len(profile.always))
    baseline = _resolve_baseline(request, space, settings, is_new=is_new) if request.baseline_trials else None
    return ResolvedSearch(space, base, profile, baseline)


def _check_startup(request: SweepRequest) -> None:
    """UserError if there is nothing that would stop the startup trials early."""
    stops = request.pruner != "none" or request.scheduler not in ("none", *POPULATIONS)
    if request.startup_trials and not stops:
        raise UserError(
            f"--startup-trials {request.startup_trials} cannot act: --scheduler {request.scheduler} stops no trial "
            "early, and there is no --pruner; leave it out, or use --scheduler asha"
        )


def judgement(request: SweepRequest, profile: Profile, study: optuna.Study, budget: Budget) -> Judgement:
    """How the trials of `study` are judged, a study of a space with this `profile`; `budget` is that of its search."""
    cells, first = len(request.cells), request.objectives[0]
    threshold = pruner_threshold(request.pruner, cells)
    return Judgement(
        request.objectives,
        request.scheduler,
        Wilcoxon(threshold, study, first, cells, spares(request.startup_trials, budget))
        if threshold
        else None,
        make_terminator(request.stop_when, request.search_seed, len(request.objectives), len(profile.always)),
    )


def _resolve_baseline(
    request: SweepRequest, space: Space, settings: RunSettings, *, is_new: bool
) -> ResolvedSearch:
    """The search for the L1 baseline: the same space without the settings that a regression does not have.

    A run that is resumed may have finished it, and had its space changed then: what is left of it is not checked.

    Raises:
        UserError: nothing is left to search, or it cannot be searched in this way.
    """
    asked, changes = f"--baseline-trials {request.baseline_trials}", {"objective.name": "l1"}
    if request.scheduler in POPULATIONS or request.sampler == GRID:
        other = f"--sampler {GRID}" if request.sampler == GRID else f"--scheduler {request.scheduler}"
        raise UserError(
            f"{asked} cannot act with {other}: the L1 baseline has so many trials, one by one, each of another "
            f"configuration; use {'--sampler tpe' if request.sampler == GRID else '--scheduler asha'}"
        )
    published = settings.model_dump(mode="json")
    base = resolve(merge(published, changes)).model_dump(mode="json")
    rest = without(space, CONTRASTIVE_ONLY, published)

    def own(trial: optuna.Trial) -> Settings:
        return {**rest(trial), **changes}

    profile = check_space(own, base)
    if not is_new:
        return ResolvedSearch(own, base, profile)
    if not profile.settings:
        raise UserError(
            f"{asked} has nothing to search: this space has only settings that the L1 baseline does not have; leave it "
            "out, or search a setting such as optimiser.learning_rate, too"
        )
    try:
        check_sampler(request.sampler, profile, len(request.objectives))
        make_terminator(request.stop_when, request.search_seed, len(request.objectives), len(profile.always))
    except UserError as error:
        raise UserError(f"{asked}, without the settings that L1 does not have: {error}") from None
    return ResolvedSearch(own, base, profile)


def splits_of(request: SweepRequest, manifest: pd.DataFrame) -> Splits:
    """The hold-out and the folds that a request asks for; inside a nested search those of its hold-out."""
    if request.outer is None or request.outer_fold is None:
        return make_splits(manifest, request.folds, request.holdout, request.search_seed)
    return nested_splits(manifest, request.outer, request.folds, request.search_seed)[request.outer_fold]


def _check_population(request: SweepRequest, profile: Profile, settings: RunSettings) -> None:
    beside = {
        "sampler": GRID if request.sampler == GRID else "",
        "pruner": "" if request.pruner == "none" else request.pruner,
        "stop-when": "" if request.stop_when == "never" else request.stop_when,
        "objectives": ",".join(request.objectives) if len(request.objectives) > 1 else "",
    }
    check_population(request.scheduler, profile, settings.training.epochs, request.trials, beside)
