"""Populations: their arithmetic by hand, Ray's schedulers driven without Ray, and whole sweeps with a kill."""

import functools
import itertools
import json
import math
import os
import random

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from of_age import assign
from optuna.trial import TrialState
from process_helpers import kill_when, marked, run, start, study_of, wait_until
from small_cohort import SMALL, write_small_cohort

from core.config import merge, read_settings, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.report.answer.population import exchange_table, found_schedule, members
from core.report.answer.record import read_run
from core.report.figures.population import followed_values
from core.run_names import LINEAGE, MEMBER, MEMBER_VALUE
from core.schedules import as_schedule, then
from distributed.batches.in_process import InMemory
from distributed.run.assignment import kept_checkpoint, read_progress
from distributed.run.folder import open_run
from distributed.search.population import begin_member
from distributed.search.population_methods import (
    POPULATIONS,
    Range,
    change,
    changeable_ranges,
    check_population,
)
from distributed.search.study import check_space, published_parameters
from distributed.training.optimiser import build_optimiser, set_rates
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner
from search_spaces import load_space, published

EPOCHS = 4
CELL = [{"fold": 0, "seed": 0}]
RATE = Range("optimiser.learning_rate", 1e-5, 1e-2, log=True)


def settings(**changes):
    small = SMALL | {"training.epochs": EPOCHS} | changes
    return resolve(merge(published("brain_age"), small)).model_dump(mode="json")


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    cohort = write_small_cohort(tmp_path_factory.mktemp("population") / "cohort")
    subjects = Subjects.of(cohort, make_splits(cohort.manifest, 2), InMemory.of(cohort))
    return lambda: Runner(subjects)


def to_the_end(run_epoch, assignment, epochs=EPOCHS):
    answers = []
    while len(answers) < epochs and not (answers and answers[-1]["done"]):
        answers.append(run_epoch(assignment))
    return answers


def test_a_clone_ends_as_one_run_on_its_piecewise_schedule_does(runner, tmp_path):
    """The law behind replaying: donor's weights plus changed settings are the schedule trained from scratch."""
    plain = settings()
    donor = assign(tmp_path / "donor", plain, CELL, keep_every=2)
    to_the_end(runner(), donor, 3)  # the donor goes on before its clone begins
    wanted = {
        "optimiser.learning_rate": 3e-3, "optimiser.weight_decay": 0.01, "objective.temperature": 0.3,
        "objective.width": 9.0, "objective.neighbours.end": 0.2,
    }  # fmt: skip
    changed, acted = change(plain, wanted, 2 / EPOCHS)
    assert acted == wanted
    clone = assign(tmp_path / "clone", changed, CELL) | {"begin": str(kept_checkpoint(tmp_path / "donor", 2))}
    first = runner()
    to_the_end(first, clone, 1)
    cloned = to_the_end(runner(), clone)[-1]  # a second worker goes on from the clone's own checkpoint
    whole = to_the_end(runner(), assign(tmp_path / "whole", changed, CELL))
    unchanged = to_the_end(runner(), assign(tmp_path / "unchanged", plain, CELL))
    assert cloned["done"]
    assert cloned["value"] == whole[-1]["value"]
    assert cloned["value"] != unchanged[-1]["value"]
    history = json.loads((tmp_path / "clone" / "progress.json").read_text())["history"]
    for key in ("learning_rate", "temperature", "width", "neighbours", "loss"):
        assert [row[key] for row in history] == [answer[key] for answer in whole], key
    assert [row["temperature"] for row in history] == [0.1, 0.1, 0.3, 0.3]


def test_a_checkpoint_that_is_gone_fails_the_clone_alone(runner, tmp_path):
    clone = assign(tmp_path / "clone", settings(), CELL) | {"begin": str(tmp_path / "gone.pt")}
    answer = runner()(clone)
    assert answer["done"]
    assert answer["failed"] == f"there is no checkpoint {tmp_path}/gone.pt to begin from"


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_restored_optimiser_takes_the_rates_of_its_new_settings(name):
    model = torch.nn.Linear(2, 1)
    own = {"optimiser.decay": 1.0, "optimiser.name": name}
    if name == "sgd":
        own["optimiser.momentum"] = 0.5
    old = resolve(settings(**own, **{"optimiser.learning_rate": 1e-2, "optimiser.weight_decay": 0.1}))
    new = resolve(settings(**own, **{"optimiser.learning_rate": 1e-3, "optimiser.weight_decay": 0.2}))
    donor = build_optimiser(old, model)
    for group in donor.param_groups:
        group["momentum"] = 0.9
    optimiser = build_optimiser(new, model)
    optimiser.load_state_dict(donor.state_dict())
    assert optimiser.param_groups[0]["lr"] == 1e-2  # what torch restores
    set_rates(new, optimiser, 2)
    group = optimiser.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.2)
    assert name == "adam" or group["momentum"] == 0.5


def test_changes_add_pieces_and_pass_by_what_cannot_act():
    first, acted = change(settings(), {"objective.temperature": 0.2}, 0.25)
    second, _ = change(first, {"objective.temperature": 0.4}, 0.75)
    temperature = as_schedule(second["objective"]["temperature"])
    assert [temperature(each) for each in (0, 0.25, 0.26, 0.75, 0.76, 1)] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]
    assert acted == {"objective.temperature": 0.2}
    assert change(second, {"objective.temperature": 0.4}, 0.9) == (second, {})
    supcon = settings(**{"objective.name": "supcon", "objective.neighbours": None})
    assert change(supcon, {"objective.width": 3.0, "objective.neighbours.end": 0.3}, 0.5) == (supcon, {})
    falling = settings(**{"objective.temperature": {"shape": "linear", "start": 0.2, "end": 0.1}})
    assert change(falling, {"objective.temperature": 0.3}, 0.5) == (falling, {})


def test_a_value_cannot_be_changed_before_its_last_change():
    once = then(0.1, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"until\n.*must rise"):
        then(once, 0.4, 0.3)
    with pytest.raises(UserError, match="only a number or a piecewise"):
        then({"shape": "linear", "start": 1.0, "end": 0.5}, 0.5, 0.2)


def test_places_are_logarithmic_and_come_back():
    assert RATE.place(math.sqrt(1e-5 * 1e-2)) == pytest.approx(0.5)
    for value in np.geomspace(1e-5, 1e-2, 7):
        assert RATE.at_place(RATE.place(value)) == pytest.approx(value)
    assert (RATE.clip(1.0), RATE.place(1e-9)) == (1e-2, 0.0)


class StandIn:
    """What Ray's schedulers see of a trial and of Tune, without either."""

    def __init__(self, name, member):
        self.trial_id = name
        self.config = {"member": name, "assignment": member.assignment, "changed": dict(member.changed)}


@pytest.mark.parametrize("name", POPULATIONS)
def test_what_a_method_proposes_lies_inside_the_space(name):
    method = POPULATIONS[name]
    ranges = [RATE, Range("objective.temperature", 0.03, 0.5, log=True)]
    exchange = method.scheduler(ranges, 1, "min")
    generator = np.random.default_rng(0)
    random.seed(0)
    members = []
    for index in range(6):
        rate = float(np.exp(generator.uniform(np.log(1e-5), np.log(1e-2))))
        assignment = {"name": str(index), "settings": settings(**{"optimiser.learning_rate": rate})}
        members.append(StandIn(str(index), begin_member(method, ranges, assignment)))
    if name == "pb2":
        rows = [
            [str(member), epoch, *member.config["changed"].values(), -5.0 + 0.1 * epoch * index]
            for epoch in (1, 2, 3)
            for index, member in enumerate(members)
        ]
        columns = ["Trial", "Time", *(f"changed/{one.name}" for one in ranges), "Reward"]
        exchange.data = pd.DataFrame(rows, columns=columns)
    moved = 0
    for _ in range(30 if name == "pbt" else 2):  # PB2 fits a Gaussian process each time
        config, _ = exchange._get_new_config(members[0], members[5])
        assert config["assignment"] == members[5].config["assignment"]  # whole, through Ray's copying
        for one in ranges:
            meant = method.meant(one, config["changed"][one.name])
            assert one.low <= meant <= one.high
            moved += config["changed"][one.name] != members[5].config["changed"][one.name]
    assert moved


def test_the_default_space_can_be_changed_while_training():
    space, base = load_space("brain_age")
    profile = check_space(space, resolve(base).model_dump(mode="json"))
    assert [one.name for one in changeable_ranges(profile)] == [
        "optimiser.learning_rate", "optimiser.weight_decay", "objective.temperature", "objective.width",
        "objective.neighbours.end",
    ]  # fmt: skip
    for given, message in (
        ({"trials": 5}, "at least 6 trials"),
        ({"epochs": 1}, "at least 2 epochs"),
        ({"beside": {"pruner": "wilcoxon"}}, "--pruner wilcoxon cannot act"),
    ):
        with pytest.raises(UserError, match=message):
            check_population("pbt", profile, **{"epochs": 8, "trials": 6, "beside": {}} | given)
    fixed = check_space(lambda trial: {"views.noise": trial.suggest_float("views.noise", 0, 0.1)}, base)
    with pytest.raises(UserError, match="this space searches none of"):
        check_population("pb2", fixed, 8, 6, {})


SPACE = """
def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
    return dict(trial.params)
"""


def swept(folder, name, scheduler="pbt"):
    return [
        "sweep", "cohort", "--space", "mine.py:space", "--trials", 6, "--folds", 2, "--slots", 2, "--out", name,
        "--scheduler", scheduler, "--sampler", "random", "--set", "training.epochs=6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("populations")
    write_small_cohort(folder / "cohort", subjects=24)
    (folder / "mine.py").write_text(SPACE)
    return folder


def check_whole(folder):
    """A finished population: who ended how, and that its schedule does again what its best member did."""
    trials = study_of(folder).get_trials()
    members = [trial for trial in trials if trial.user_attrs["label"] == MEMBER]
    assert [trial.number for trial in members] == [0, 1, 2, 3]
    assert {trial.state for trial in members} == {TrialState.PRUNED}
    assert all(sorted(trial.intermediate_values) == [1, 2, 3, 4, 5, 6] for trial in members)
    assert any(trial.user_attrs.get(LINEAGE) for trial in members)
    found = next(trial for trial in trials if trial.user_attrs["label"] == "schedule found")
    other = next(trial for trial in trials if trial.user_attrs["label"] == "published")
    assert (found.state, other.state, len(trials)) == (TrialState.COMPLETE, TrialState.COMPLETE, 6)
    best = min(members, key=lambda trial: trial.user_attrs[MEMBER_VALUE])
    assert found.user_attrs["found_by"] == best.number
    cells = pd.read_csv(folder / "cells.csv")
    own = cells[cells["number"] == found.number]
    assert own["mae"].iloc[0] == best.user_attrs[MEMBER_VALUE]  # replayed: the very same number
    assert found.value == pytest.approx(own["mae"].mean())
    assert len(own) == 2
    written = read_settings(folder / "schedule.yaml")
    assert resolve(written).model_dump(mode="json") == json.loads(best.user_attrs["settings"])
    history = pd.read_csv(folder / "history.csv")
    followed = [
        history[(history["number"] == number) & (history["fold"] == 0)]
        for number in (found.number, best.number)
    ]
    for column in ("learning_rate", "temperature", "loss"):
        assert followed[0][column].tolist() == followed[1][column].tolist()
    assert not list(folder.glob("trials/*/*.pt"))
    check_report(folder, found)
    return trials


def check_report(folder, found):
    """The page tells of the schedule; what it draws as the weights' path is what the schedule's own trial reported."""
    record = read_run(folder)
    schedule = found_schedule(record)
    values = {member.number: member.intermediate_values for member in members(record)}
    path = followed_values(schedule, values)
    assert path == {epoch: value for epoch, value in found.intermediate_values.items() if epoch <= 6}
    handed_on = {
        (epoch, taker, donor) for (donor, epoch), (taker, _) in itertools.pairwise(schedule.followed)
    }
    listed = exchange_table(record)[["after epoch", "member", "weights of"]]
    assert handed_on <= set(listed.itertuples(index=False, name=None))
    page = (folder / "report.html").read_text()
    assert 'id="figure-population"' in page
    assert "nothing was searched" not in page


@pytest.fixture(scope="module")
def evolved(workplace):
    """The run of a population of this method, from beginning to end; made once."""

    @functools.cache
    def evolve(scheduler):
        mark = f"{scheduler}-{os.getpid()}"
        done = run(*swept(workplace, scheduler, scheduler), cwd=workplace, mark=mark)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert wait_until(lambda: not marked(mark), 60), marked(mark)
        return workplace / scheduler

    return evolve


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheduler", POPULATIONS)
def test_a_population_finds_a_schedule_and_the_schedule_is_judged_like_any_trial(evolved, scheduler):
    check_whole(evolved(scheduler))


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_killed_population_goes_on_from_its_last_exchange(workplace, evolved):
    folder, mark = workplace / "killed", f"killed-{os.getpid()}"
    sweep = start(*swept(workplace, "killed"), cwd=workplace, mark=mark)
    state = folder / "population.json"

    def boundary():
        return json.loads(state.read_text())["boundary"] if state.exists() else 0

    kill_when(lambda: boundary() >= 3, sweep, mark)
    before = [trial.intermediate_values for trial in study_of(folder).get_trials()]
    done = run("resume", "killed", cwd=workplace)
    assert done.returncode == 0, done.stderr
    trials = check_whole(folder)
    for kept, trial in zip(before, trials, strict=False):
        assert kept.items() <= trial.intermediate_values.items()
    values = [trial.user_attrs.get(MEMBER_VALUE) for trial in trials]
    whole = [trial.user_attrs.get(MEMBER_VALUE) for trial in study_of(evolved("pbt")).get_trials()]
    assert values == whole  # what a population without the kill came to


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_a_refused_population_begins_with_the_budget_that_is_advised_and_its_published_trial_survives_a_kill(
    workplace,
):
    """The time fits the published configuration, and a half of the evolution: this is cut.

    The user has enqueued the published point, too: this is a member, and the published configuration is tried all the
    same. Nobody looks at the hold-out before it has ended.
    """
    folder, mark = workplace / "cut", f"cut-{os.getpid()}"
    inside = published_parameters(load_space(f"{workplace}/mine.py:space")[0], published("brain_age"))
    (workplace / "own.yaml").write_text(yaml.safe_dump([inside]))
    asked = [*swept(workplace, "refused"), "--enqueue", "own.yaml", "--time-budget", 0.01]
    asked[asked.index("--trials") + 1], asked[asked.index("training.epochs=6")] = 10, "training.epochs=40"
    refused = run(*asked, cwd=workplace)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1), refused.stderr
    told, _, advice = refused.stderr.partition("; give --time-budget ")
    assert "more than 2 times the time budget of 0.01 s" in told
    assert open_run(workplace / "refused").about.looks == ()
    asked[asked.index("refused")], asked[-1] = "cut", int(advice.split()[0])
    sweep = start(*asked, cwd=workplace, mark=mark)
    progress = folder / "trials" / "0008" / "progress.json"
    kill_when(lambda: progress.exists() and len(read_progress(progress.parent)["history"]) > 5, sweep, mark)
    before = study_of(folder).get_trials()
    assert [trial.user_attrs.get("label") for trial in before] == [MEMBER] * 8 + ["published"]
    assert (before[0].params, before[8].state) == (inside, TrialState.RUNNING)
    done = run("resume", "cut", cwd=workplace)
    assert done.returncode == 0, done.stderr
    trials = study_of(folder).get_trials()
    assert [trial.state for trial in trials] == [TrialState.PRUNED] * 8 + [TrialState.COMPLETE] * 2
    assert before[8].intermediate_values.items() <= trials[8].intermediate_values.items()
    (look,) = open_run(folder).about.looks
    assert look.trials == 10
