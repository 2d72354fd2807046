"""Check whether a sweep can work as requested; a sweep that cannot is refused here, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from core.config import RunSettings, Settings, merge, resolve
from core.errors import UserError
from core.objectives import check_objectives
from core.volumes.cohort.reader import Cohort
from distributed.search.budget import make_terminator
from distributed.search.population_methods import POPULATIONS, check_population
from distributed.search.samplers import GRID, check_sampler
from distributed.search.schedulers import make_scheduler, pruner_threshold
from distributed.search.study import check_space
from distributed.sweeps.request import SweepRequest
from search_spaces import load_space, pin
from search_spaces.points import Profile, Space


@dataclass(frozen=True)
class ResolvedSearch:
    """A request that can work: its space without the settings that the user fixed, and the settings to start from."""

    space: Space
    base: Settings
    profile: Profile

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
    space = pin(space, request.changes)
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
    make_terminator(request.stop_when, request.search_seed, len(request.objectives), len(profile.always))
    return ResolvedSearch(space, base, profile)


def _check_population(request: SweepRequest, profile: Profile, settings: RunSettings) -> None:
    beside = {
        "sampler": GRID if request.sampler == GRID else "",
        "pruner": "" if request.pruner == "none" else request.pruner,
        "stop-when": "" if request.stop_when == "never" else request.stop_when,
        "objectives": ",".join(request.objectives) if len(request.objectives) > 1 else "",
    }
    check_population(request.scheduler, profile, settings.training.epochs, request.trials, beside)
