"""A population from beginning to end: members from the study, their evolution on slots, and the schedule they found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import ray
import yaml
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import BasicVariantGenerator
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from core.config import merge, resolve
from core.files.writing import writing_to
from core.report.answer.population import FOUND, FOUND_BY, LINEAGE, MEMBER
from distributed.run.assignment import assign, kept_checkpoint, trial_name
from distributed.run.folder import RunFolder
from distributed.search.budget import Budget
from distributed.search.population import (
    Member,
    Population,
    begin_member,
    best_member,
    read_members,
)
from distributed.search.population_methods import POPULATIONS, changeable_ranges, exchange_interval
from distributed.search.study import PUBLISHED, enqueue, published_parameters
from distributed.sweeps.request import SearchPlan, SweepRequest

SCHEDULE = "schedule.yaml"
STATE = "population.json"
EVOLVED = "evolved"
"""The field of run.json that says that the population is through, and what it found is enqueued."""


def evolve(
    folder: RunFolder, request: SweepRequest, plan: SearchPlan, study: optuna.Study, budget: Budget,
    trainable: Any, slots: int, run: dict[str, Any],
) -> str | None:  # fmt: skip
    """Evolve the population of a run, and have the study try the published configuration and what was found next.

    Args:
        folder: of the run; what an earlier session left is continued from its last exchange.
        request: what is asked.
        plan: the same, with its space and base settings.
        study: whose first trials are the members.
        budget: what may end the evolution early; then nothing is tried next.
        trainable: the slot.
        slots: how many members train at a time; the others wait their turn.
        run: further arguments of Tune's RunConfig.

    Returns:
        Why the storage of the run or the cohort failed; None where it did not.
    """
    members, boundary = _members(folder, request, plan, study)
    if members:
        epochs = plan.base["training"]["epochs"]
        population = Population(
            request.scheduler, changeable_ranges(plan.profile), epochs, request.search_seed, study,
            budget, folder.path / STATE,
        )  # fmt: skip
        population.enter(members, boundary)
        # Tune's limit on concurrent trials counts those that wait, too: here a slot's share of the head is the limit.
        share = math.floor(9_900 / slots) / 10_000
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 0, "node:__internal_head__": share}),
            param_space={"member": tune.grid_search(sorted(members))},
            tune_config=tune.TuneConfig(
                search_alg=_Members(population), scheduler=population, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="population", stop=budget, **run),
        )
        tuner.fit()
        _release_slots()
        if population.broken is not None:
            return population.broken
    if not budget.is_over:
        with writing_to(folder.path):
            _try_next(folder, plan, study)
    return None


class _Members(BasicVariantGenerator):
    """Gives Tune the members. Not finished while one of them trains: else Tune ends each slot whose member pauses,
    although the next exchange needs it again."""

    def __init__(self, population: Population) -> None:
        super().__init__()
        self._population = population

    def is_finished(self) -> bool:
        """Whether no member will need a slot again."""
        population = self._population
        through = population.ended >= population.members.keys() or population.budget.is_over
        return through and super().is_finished()


def _release_slots() -> None:
    """Give back what the population's slots still reserve: no slot of this job is alive now.

    Tune kills slots that do not end at once, Ray keeps the placement groups of their workers as long as the job
    lives (ray-project/ray#58515), and the slots of the search that follows would wait for them for ever. The id of a
    group ends with that of its job, so no other sweep on the cluster is touched.
    """
    job = ray.get_runtime_context().get_job_id()
    for group, about in placement_group_table().items():
        if group.endswith(job) and about["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _members(
    folder: RunFolder, request: SweepRequest, plan: SearchPlan, study: optuna.Study
) -> tuple[dict[str, Member], int]:
    """The members that have not ended, and the epoch of their last exchange; asked from the study at first."""
    state = folder.path / STATE
    if state.exists():
        return read_members(state, {trial_name(trial.number) for trial in _running(study)})
    asked = {trial.number: optuna.Trial(study, trial._trial_id) for trial in _running(study)}
    others = 1 + (published_parameters(plan.space, plan.base) is not None)
    while len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))) < request.trials - others:
        trial = study.ask()
        asked[trial.number] = trial
    method, ranges = POPULATIONS[request.scheduler], changeable_ranges(plan.profile)
    every = exchange_interval(plan.base["training"]["epochs"])
    members = {}
    for number, trial in asked.items():
        settings = resolve(merge(plan.base, plan.space(trial))).model_dump(mode="json")
        trial.set_user_attr("settings", json.dumps(settings))
        trial.set_user_attr("label", MEMBER)
        assignment = assign(
            folder.trial(trial_name(number)),
            settings,
            request.cells[:1],
            prunable=False,
            metric=request.objectives[0],
            keep_every=every,
        )
        members[trial_name(number)] = begin_member(method, ranges, assignment)
    return members, 0


def _running(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that have begun and not ended, before the population has: all of them are members."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _try_next(folder: RunFolder, plan: SearchPlan, study: optuna.Study) -> None:
    """Enqueue the published configuration and the best member's schedule, once, and write the schedule down."""
    labels = {trial.user_attrs.get("label") for trial in study.get_trials(deepcopy=False)}
    published = published_parameters(plan.space, plan.base)
    if published is not None and PUBLISHED not in labels:
        enqueue(study, [published], PUBLISHED)
    best = best_member(study)
    if best is not None and FOUND not in labels:
        write_schedule(folder.path / SCHEDULE, best)
        noted = {name: best.user_attrs[name] for name in ("settings", LINEAGE) if name in best.user_attrs}
        study.enqueue_trial({}, user_attrs=noted | {"label": FOUND, FOUND_BY: best.number})
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("label") == MEMBER:
            kept = folder.trial(trial_name(trial.number))
            for path in kept.glob(kept_checkpoint(kept, 0).name.replace("0", "*")):
                path.unlink()
    folder.update(**{EVOLVED: True})


def write_schedule(path: Path, best: optuna.trial.FrozenTrial) -> None:
    """The best member's settings, epoch by epoch, as a YAML file of settings that any run can take.

    One who followed a donor has the donor's settings up to there, and piecewise ones where a setting was changed.
    """
    came = [
        f"after epoch {each['epoch']}: from member {each['donor']}, changed {json.dumps(each['changed'])}"
        for each in best.user_attrs.get(LINEAGE, [])
    ]
    told = "".join(f"# {line}\n" for line in [f"what the weights of member {best.number} followed", *came])
    path.write_text(told + yaml.safe_dump(json.loads(best.user_attrs["settings"]), sort_keys=False))
