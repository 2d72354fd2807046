"""What a user asks of a sweep, and whether it can work: everything is refused here, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from core.config import Settings, merge, resolve
from core.errors import UserError
from core.objectives import check_objectives
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import Mode
from distributed.run.assignment import HOLDOUT
from distributed.search.budget import make_terminator
from distributed.search.population_methods import POPULATIONS, check_population
from distributed.search.samplers import GRID, check_sampler
from distributed.search.schedulers import make_scheduler, pruner_threshold
from distributed.search.study import check_space
from search_spaces import Space, load_space, pin
from search_spaces.points import Profile


class SweepRequest(BaseModel):
    """What a user asks of a sweep; recorded in run.json, so that `resume` asks the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: str = Field("brain_age", description="NAME of a space, or FILE.py:FUNCTION")
    trials: int = Field(20, ge=1)
    folds: int = Field(5, ge=2, description="cross-validation folds among the development subjects")
    seeds: int = Field(1, ge=1, description="repeats of every fold with another seed")
    refit_seeds: int = Field(
        1, ge=1, description="refits of the winner and the baselines, each with its own seed"
    )
    confirm_seeds: int = Field(
        0, ge=0, description="repeats of winner and published on the search's folds with fresh seeds"
    )
    holdout: float = Field(0.2, gt=0, lt=1, description="share of the subjects that the search never sees")
    slots: int | None = Field(
        None, ge=1, description="trials at a time; as many as the cluster holds if absent"
    )
    workers_per_slot: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0, description="1 where there are GPUs, if absent")
    data_mode: Mode = Field(
        "auto", description="resident in the object store, streaming by Ray Data, or direct from the shards"
    )
    objectives: tuple[str, ...] = Field(
        ("mae",), description="what to minimise; trials are stopped, and the winner is chosen, by the first"
    )
    scheduler: str = "asha"
    pruner: str = Field("none", description="none, wilcoxon, or wilcoxon=P; beside any scheduler")
    sampler: str = "tpe"
    grid_points: int | None = Field(None, ge=2, description="values of each continuous setting in a grid")
    time_budget: float | None = Field(None, gt=0, description="seconds, refits not counted")
    accelerator_hours: float | None = Field(
        None, gt=0, description="GPU-hours, CPU-core-hours without GPUs, of all trials; refits not counted"
    )
    stop_when: str = Field("never", description="never, regret or emmr: when improvement is unlikely")
    search_seed: int = Field(0, ge=0, description="seed of splits and sampler")
    changes: dict[str, Any] = Field({}, description="settings fixed by the user, by dotted name")

    @property
    def cells(self) -> list[dict[str, int]]:
        """The (fold, seed) cells of every trial, in the order all trials visit them."""
        return [{"fold": fold, "seed": seed} for seed in range(self.seeds) for fold in range(self.folds)]

    @property
    def confirm_cells(self) -> list[dict[str, int]]:
        """The search's folds with seeds that it never used."""
        fresh = range(self.seeds, self.seeds + self.confirm_seeds)
        return [{"fold": fold, "seed": seed} for seed in fresh for fold in range(self.folds)]

    @property
    def refit_cells(self) -> list[dict[str, int]]:
        """The cells of a refit, whose seeds the search never used."""
        return [{"fold": HOLDOUT, "seed": self.seeds + index} for index in range(self.refit_seeds)]


@dataclass(frozen=True)
class SearchPlan:
    """A request that can work: its space without what the user fixed, and the settings it starts from."""

    space: Space
    base: Settings
    profile: Profile


def plan_search(request: SweepRequest, cohort: Cohort, base: Settings | None = None) -> SearchPlan:
    """Resolve a request and try every choice in it.

    Args:
        request: what is asked.
        cohort: what it is asked of.
        base: the settings that the run began with, when it is resumed.

    Raises:
        UserError: the first thing that cannot work, or not together, and why.
    """
    space, settings = load_space(request.space)
    space = pin(space, request.changes)
    if base is None:
        base = resolve(merge(settings, request.changes)).model_dump(mode="json")
    profile = check_space(space, base)
    sites = cohort.manifest["site"].replace("", None).dropna().nunique()
    check_objectives(request.objectives, int(sites))
    check_sampler(request.sampler, profile, len(request.objectives))
    if request.grid_points and request.sampler != GRID:
        raise UserError(
            f"--grid-points {request.grid_points} acts with --sampler grid only, not {request.sampler}"
        )
    make_scheduler(request.scheduler, base["training"]["epochs"], len(request.cells))
    if request.scheduler in POPULATIONS:
        beside = {
            "sampler": GRID if request.sampler == GRID else "",
            "pruner": "" if request.pruner == "none" else request.pruner,
            "stop-when": "" if request.stop_when == "never" else request.stop_when,
            "objectives": ",".join(request.objectives) if len(request.objectives) > 1 else "",
        }
        check_population(request.scheduler, profile, base["training"]["epochs"], request.trials, beside)
    pruner_threshold(request.pruner, len(request.cells))
    make_terminator(request.stop_when, request.search_seed, len(request.objectives), len(profile.always))
    return SearchPlan(space, base, profile)
