"""A population from beginning to end: its members from the study, their evolution on slots, and the schedule found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import optuna
import yaml
from ray import tune
from ray.tune.search import BasicVariantGenerator

from core.files.writing import write_text, writing_to
from core.run_names import FOUND, FOUND_BY, LABEL, LINEAGE, MEMBER, PUBLISHED, SETTINGS
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
from distributed.search.population_methods import (
    POPULATIONS,
    changeable_ranges,
    exchange_interval,
    members_of,
)
from distributed.search.study import enqueue, published_parameters, running_trials, settings_of, trials_begun
from distributed.sweeps.executor import HEAD, Executor, release_slots
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch

SCHEDULE = "schedule.yaml"
STATE = "population.json"


@dataclass(frozen=True)
class Evolution:
    """The population of a run. Its members are the first trials of the study.

    The population of an earlier session continues from its last exchange.
    """

    folder: RunFolder
    request: SweepRequest
    search: ResolvedSearch
    study: optuna.Study

    def run(self, budget: Budget, executor: Executor) -> str | None:
        """Evolve the population; then enqueue the published configuration and the schedule that was found.

        Args:
            budget: it may end the evolution early; then only the published configuration is enqueued.
            executor: the slots; members wait until one is free.

        Returns:
            Why the storage of the run or of the cohort failed; None if it did not.
        """
        members, boundary = self._members()
        if members:
            request = self.request
            population = Population(
                request.scheduler, changeable_ranges(self.search.profile), self.search.epochs, request.search_seed,
                self.study, budget, self.folder.path / STATE,
            )  # fmt: skip
            population.enter(members, boundary)
            # The limit of Tune on concurrent trials also counts waiting members. So a share of the head is the limit.
            share = math.floor(9_900 / executor.slots) / 10_000
            tuner = tune.Tuner(
                tune.with_resources(executor.trainable, {"CPU": 0, HEAD: share}),
                param_space={"member": tune.grid_search(sorted(members))},
                tune_config=tune.TuneConfig(
                    search_alg=_Members(population), scheduler=population, reuse_actors=True
                ),
                run_config=executor.options("population", budget),
            )
            tuner.fit()
            release_slots()
            if population.broken is not None:
                return population.broken
        with writing_to(self.folder.path):
            if not budget.is_over:
                self._try_next()
            elif not budget.interrupted:
                self._try_published(in_any_case=True)
        return None

    def _members(self) -> tuple[dict[str, Member], int]:
        """The members that have not ended, and the epoch of their last exchange; at first they come from the study."""
        folder, request, search, study = self.folder, self.request, self.search, self.study
        state = folder.path / STATE
        if state.exists():
            return read_members(
                state, {trial_name(trial.number) for trial in running_trials(study)}, folder.trial
            )
        # Before the state of the population is written, all that have begun become members.
        asked = {trial.number: optuna.Trial(study, trial._trial_id) for trial in running_trials(study)}
        is_inside = published_parameters(search.space, search.base) is not None
        while trials_begun(study) < members_of(request.trials, is_inside):
            trial = study.ask()
            asked[trial.number] = trial
        method, ranges = POPULATIONS[request.scheduler], changeable_ranges(search.profile)
        members = {}
        for number, trial in asked.items():
            settings = settings_of(trial, search.space, search.base)
            if settings is None:
                continue
            trial.set_user_attr(LABEL, MEMBER)
            assignment = assign(
                folder.trial(trial_name(number)),
                settings,
                request.cells[:1],
                prunable=False,
                metric=search.first,
                keep_every=exchange_interval(search.epochs),
            )
            members[trial_name(number)] = begin_member(method, ranges, assignment)
        return members, 0

    def _try_published(self, *, in_any_case: bool) -> set[str | None]:
        """Enqueue the published configuration, once; returns the labels of all trials before.

        It may lie outside the space. Then it is tried if there is nothing else, `in_any_case`.
        """
        study, base = self.study, self.search.base
        labels = {trial.user_attrs.get(LABEL) for trial in study.get_trials(deepcopy=False)}
        published = published_parameters(self.search.space, base)
        if PUBLISHED in labels:
            return labels
        if published is not None:
            enqueue(study, [published], PUBLISHED)
        elif in_any_case:
            study.enqueue_trial({}, user_attrs={LABEL: PUBLISHED, SETTINGS: json.dumps(base)})
        return labels

    def _try_next(self) -> None:
        """Enqueue the published configuration and the schedule of the best member, once; write `schedule.yaml`."""
        folder, study = self.folder, self.study
        best = best_member(study)
        labels = self._try_published(in_any_case=best is None)
        if best is not None and FOUND not in labels:
            write_schedule(folder.path / SCHEDULE, best)
            noted = {name: best.user_attrs[name] for name in (SETTINGS, LINEAGE) if name in best.user_attrs}
            study.enqueue_trial({}, user_attrs=noted | {LABEL: FOUND, FOUND_BY: best.number})
        for trial in study.get_trials(deepcopy=False):
            if trial.user_attrs.get(LABEL) == MEMBER:
                kept = folder.trial(trial_name(trial.number))
                for path in kept.glob(kept_checkpoint(kept, 0).name.replace("0", "*")):
                    path.unlink()
        folder.update(evolved=True)


class _Members(BasicVariantGenerator):
    """Gives Tune the members. It is not finished while a member trains: otherwise Tune would end the slot of a member
    that pauses, although the member needs a slot again after the next exchange."""

    def __init__(self, population: Population) -> None:
        super().__init__()
        self._population = population

    def is_finished(self) -> bool:
        """Whether no member will need a slot again."""
        population = self._population
        through = population.ended >= population.members.keys() or population.budget.is_over
        return through and super().is_finished()


def write_schedule(path: Path, best: optuna.trial.FrozenTrial) -> None:
    """Write the settings of the best member, epoch by epoch, as a YAML file of settings for any run.

    A member that followed a donor has the settings of the donor until that epoch; a changed setting is piecewise.
    """
    came = [
        f"after epoch {each['epoch']}: from member {each['donor']}, changed {json.dumps(each['changed'])}"
        for each in best.user_attrs.get(LINEAGE, [])
    ]
    told = "".join(f"# {line}\n" for line in [f"what the weights of member {best.number} followed", *came])
    write_text(path, told + yaml.safe_dump(json.loads(best.user_attrs[SETTINGS]), sort_keys=False))
