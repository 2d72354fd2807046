"""What is asked, checked and noted before a sweep, or a nested search of sweeps, begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console

from core.config import FIRST, merge, resolve
from core.errors import UserError
from core.evaluation.splits import Splits
from core.run_names import ENQUEUED, PUBLISHED, WEIGHTS
from core.run_settings import RunSettings
from core.tasks import find_task
from core.tasks.task import check_parts
from core.volumes.cohort.description import has_map
from core.volumes.cohort.reader import Cohort
from distributed.run.working_copy import address_of
from distributed.search.population_methods import POPULATIONS, members_of
from distributed.search.samplers import GRID, grid_points
from distributed.search.study import published_parameters, read_points
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch, splits_of
from distributed.training.subjects import check_budget

Points = Sequence[Mapping[str, object]]
"""Configurations, each as the parameters of a point of the space."""


@dataclass(frozen=True)
class Launch:
    """How a user begins a search."""

    cohort: str | Path
    """The folder or the URL of the cohort."""
    request: SweepRequest
    out: Path
    """The folder of the run, which is made."""
    address: str | None
    """The address of a Ray cluster; this machine if None."""
    console: Console
    """Where to print the progress."""
    enqueued: Path | None = None
    """A YAML file with configurations to try after the published one."""


def check_place(out: Path, request: SweepRequest) -> None:
    """UserError if the run of a population is at an address."""
    if address_of(out) and request.scheduler in POPULATIONS:
        raise UserError(
            f"--scheduler {request.scheduler} needs --out on storage that all nodes mount: its members begin from each "
            "other's checkpoints"
        )


def tell_of_grid(settings: RunSettings, cohort: Cohort, console: Console) -> None:
    """Say what becomes of the volumes; UserError if the model, or that of the first stage, cannot take them."""
    x, y, z = cohort.volume_shape[1:]
    for each in (settings.pretraining, settings):
        notes = [] if each is None else find_task(each.task).check_grid(each, (x, y, z))
        for note in notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)


def check_first_stage(settings: RunSettings, cohort: Cohort) -> None:
    """UserError if a first stage asks for a column, or a map, that the cohort does not have."""
    if settings.pretraining is None:
        return
    stage, task = settings.pretraining, find_task(settings.pretraining.task)
    try:
        task.labels(stage, cohort.manifest)
        task.more_labels(stage, cohort.manifest)
        for name in task.needed_maps(stage):
            having = has_map(cohort.manifest, name)
            if not task.needs_truth(stage) and not having.all():
                subject = cohort.manifest["subject"].to_numpy(str)[~having][0]
                raise UserError(f"it trains on every scan, and {subject} has no map {name}")
    except UserError as error:
        raise UserError(f"in '{FIRST}': {error}") from None


def check_subjects(request: SweepRequest, search: ResolvedSearch, cohort: Cohort) -> Splits:
    """The splits of a request; UserError if the subjects cannot be split so, or can teach nothing."""
    task, settings, manifest = search.task, search.settings, cohort.manifest
    labels = task.labels(settings, manifest)
    splits = splits_of(request, manifest, task.balanced_by(settings))
    task.check_cohort(settings, manifest, splits)
    check_first_stage(settings, cohort)
    check_parts(labels, splits, search.about.truth)
    check_budget(settings, manifest, labels, splits)
    return splits


def recorded(request: SweepRequest, search: ResolvedSearch) -> dict[str, JsonValue]:
    """The request for run.json, with what it means where nothing was given."""
    meant = {"space": request.space_name, "objectives": tuple(search.objectives)}
    return request.model_copy(update=meant).model_dump(mode="json")


def first_points(search: ResolvedSearch, launch: Launch) -> dict[str, Points]:
    """The points to try before the sampler is asked, by label: the published configuration, then those of the user."""
    published = published_parameters(search.space, search.base)
    if published is None:
        launch.console.print(
            "note: the starting settings lie outside this space; they are refitted, not searched"
        )
    own = read_points(launch.enqueued, search.space) if launch.enqueued else []
    request = launch.request
    members = members_of(request.trials, published is not None)
    if request.scheduler in POPULATIONS and len(own) > members:
        raise UserError(
            f"{launch.enqueued} has {len(own)} configurations, and a population of {request.trials} trials has "
            f"{members} members; give --trials {request.trials + len(own) - members} or more"
        )
    return {
        PUBLISHED: [published] if published is not None else [],
        ENQUEUED: [*_from_each_start(search, request), *own],
    }


def _from_each_start(search: ResolvedSearch, request: SweepRequest) -> Points:
    """The published configuration from every other start, so that all of them begin with the same one."""
    if len(request.starts) < 2:
        return []
    begins = search.settings.begin.weights
    others = [start for start in request.starts if start != begins]
    found = (
        published_parameters(
            search.space, resolve(merge(search.base, {WEIGHTS: start})).model_dump(mode="json")
        )
        for start in others
    )
    return [point for point in found if point is not None]


def with_whole_grid(
    request: SweepRequest, search: ResolvedSearch, first: Mapping[str, Points]
) -> SweepRequest:
    """`request`, for a grid with one trial for each point and those before; UserError if it asks for fewer trials."""
    if request.sampler != GRID:
        return request
    grid = grid_points(search.space, request.grid_points, request.search_seed)
    before = [point for points in first.values() for point in points if point not in grid]
    needed = len(grid) + len(before)
    if request.trials < needed:
        raise UserError(
            f"the grid has {len(grid)} points, {needed} trials with those before it, and --trials is {request.trials}; "
            f"give --trials {needed}, fewer --grid-points, or --sampler qmc to spread fewer trials"
        )
    return request.model_copy(update={"trials": needed})
