"""The search for the L1 baseline, without Ray: its space, its first trial, its share of the budget, and its refit."""

import io
import json
import time
from dataclasses import dataclass, replace

import optuna
import pytest
import torch
from of_age import MAE
from optuna.trial import TrialState
from rich.console import Console
from small_cohort import write_small_cohort

from core.config import flatten, merge, resolve
from core.errors import UserError
from core.report.answer.record import read_run
from core.run_names import LABEL, PUBLISHED, SETTINGS
from core.task_description import BRAIN_AGE
from core.tasks.brain_age import BrainAge
from distributed.run.assignment import PRUNABLE_EPOCHS, Answer, baseline_name, clock, trial_number
from distributed.run.folder import create_run
from distributed.run.working_copy import BY_WORKERS
from distributed.search.budget import Budget
from distributed.search.schedulers import make_scheduler, replay
from distributed.search.study import check_space, open_study, progress_reader
from distributed.sweeps import baseline as module
from distributed.sweeps.baseline import (
    Baseline,
    baseline_finished,
    baseline_progress,
    baseline_study,
    best_baseline,
)
from distributed.sweeps.refits import after_search
from distributed.sweeps.request import ResumeRequest, SweepRequest
from distributed.sweeps.resolve import resolve_search
from distributed.sweeps.resume import _check_change, _combined, _go_on
from distributed.sweeps.sweep import Sweep
from distributed.sweeps.tables import count_rows, finish, write_baseline, write_tables
from search_spaces import load_space, without
from search_spaces import published as published_settings
from search_spaces.points import is_under

SPACE = """
def branching(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    if trial.suggest_categorical("objective.name", ["supcon", "y_aware"]) == "supcon":
        trial.suggest_float("objective.bin_width", 1.0, 10.0)
        trial.suggest_categorical("views.noise", [0.0, 0.1])
    return dict(trial.params)

def only_objective(trial):
    trial.suggest_float("objective.temperature", 0.03, 0.5)
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    return dict(trial.params)

def one_number(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    trial.suggest_float("objective.temperature", 0.03, 0.5)
    return dict(trial.params)

def elsewhere(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-3, 1e-2, log=True)  # published: 1e-4
    return dict(trial.params)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    write_small_cohort(folder / "cohort", subjects=12)
    (folder / "mine.py").write_text(SPACE)
    return folder


@pytest.fixture
def cohort(place):
    from core.volumes.cohort.reader import Cohort

    return Cohort.open(place / "cohort")


def asked(place, function="one_number", **more):
    wanted = {"space": f"{place}/mine.py:{function}", "folds": 2, "trials": 4, "baseline_trials": 2}
    return SweepRequest(**wanted | more)


@pytest.fixture
def made(place, cohort, tmp_path):
    """A function from what is asked to the baseline of a new run."""

    def make(function="one_number", **more):
        request = asked(place, function, **more)
        search = resolve_search(request, cohort)
        folder = create_run(tmp_path / "run", "sweep", request.model_dump(mode="json"), search.base, cohort)
        return Baseline(folder, request, search.baseline, Console(file=io.StringIO(), width=200))

    return make


def untuned(base):
    """The L1 baseline of a sweep without baseline trials."""
    return resolve(merge(base, {"objective.name": "l1"})).model_dump(mode="json")


def end(study, *values):
    """Complete trials with these values; None fails one."""
    for value in values:
        trial = study.ask()
        trial.set_user_attr(SETTINGS, json.dumps({"of": trial.number}))
        study.tell(trial, value, state=TrialState.FAIL if value is None else None)


def test_the_space_asks_nothing_that_l1_does_not_have():
    space, published = load_space("brain_age")
    rest = without(space, BRAIN_AGE.rival.without, published)
    profile = check_space(rest, untuned(published))
    everything = check_space(space, resolve(published).model_dump(mode="json"))
    left = {name for name in everything.settings if not name.startswith(("objective.", "model."))}
    assert set(profile.settings) == left == set(profile.always)
    assert "optimiser.learning_rate" in left
    assert all(profile.settings[name] == everything.settings[name] for name in left)


def test_a_space_that_branches_on_the_objective_sees_a_value_that_it_can_have(place):
    space, published = load_space(f"{place}/mine.py:branching")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def point(name):
        trial = study.ask()
        proposed = without(space, ("objective",), merge(published, {"objective.name": name}))(trial)
        assert proposed == trial.params  # and nothing of the objective is in either of them
        return set(trial.params)

    # The published name is `exponential`: not a choice here, so the first one is taken.
    assert point("exponential") == point("supcon") == {"optimiser.learning_rate", "views.noise"}
    assert point("y_aware") == {"optimiser.learning_rate"}


def test_a_space_sees_the_number_of_the_trial_and_keeps_what_it_does_not_ask_for(place):
    study = optuna.create_study()
    study.ask()
    rest = without(
        lambda trial: {"optimiser.name": f"sgd {trial.number}", "objective": {"name": "supcon"}},
        ("objective",),
        {},
    )
    assert rest(study.ask()) == {"optimiser.name": "sgd 1"}


def test_what_is_called_contrastive_only_cannot_act_in_a_regression():
    base = untuned(merge(published_settings("brain_age"), {"model.width": 0.0625}))
    changes = {"model.readout": "encoder", "model.head.kind": "linear", "model.head.dimension": 4}
    assert all(is_under(name, BRAIN_AGE.rival.without) for name in changes)
    assert not is_under("model.width", BRAIN_AGE.rival.without)
    volumes = torch.randn(2, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))

    def output(settings):
        torch.manual_seed(0)
        model = BrainAge().build(resolve(settings), 1, {"age_mean": 40.0, "age_sd": 16.0}).eval()
        return torch.cat([model(volumes), model.embed(volumes)], 1)

    assert torch.equal(output(base), output(merge(base, changes)))


def test_every_trial_is_l1_and_otherwise_what_the_space_says(made):
    search = made().search
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    settings = flatten(resolve(merge(search.base, search.space(trial))).model_dump(mode="json"))
    assert settings["objective.name"] == "l1"
    assert set(trial.params) == {"optimiser.learning_rate"}
    assert settings["optimiser.learning_rate"] == trial.params["optimiser.learning_rate"]


@pytest.mark.parametrize(
    ("function", "more", "message"),
    [
        ("only_objective", {}, r"--baseline-trials 2 has nothing to search"),
        ("one_number", {"scheduler": "pbt"}, r"--baseline-trials 2 cannot act with --scheduler pbt"),
        (
            "one_number",
            {"sampler": "grid", "grid_points": 2},
            r"--baseline-trials 2 cannot act with --sampler grid",
        ),
        (
            "one_number",
            {"sampler": "cmaes"},
            r"--baseline-trials 2, without the settings .*needs two numeric",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(place, cohort, function, more, message):
    if more.get("scheduler") == "pbt":
        more = more | {"trials": 8, "changes": {"training.epochs": 20}}
    with pytest.raises(UserError, match=message) as caught:
        resolve_search(asked(place, function, **more), cohort)
    assert "\n" not in str(caught.value)
    if function != "one_number":
        resolve_search(asked(place, function, **more | {"baseline_trials": 0}), cohort)


def test_without_baseline_trials_there_is_no_search_for_it(place, cohort):
    request = asked(place, baseline_trials=0)
    assert resolve_search(request, cohort).baseline is None
    assert SweepRequest().baseline_trials == 0


@pytest.mark.parametrize(("function", "has_parameters"), [("one_number", True), ("elsewhere", False)])
def test_the_first_trial_is_the_untuned_baseline_which_nothing_stops_early(made, function, has_parameters):
    baseline = made(function)
    study = baseline_study(baseline.folder, baseline.request, MAE)
    baseline.begin(study)
    baseline.begin(study)  # once
    own = Budget()
    search = baseline.searcher(study, own)
    first, second = (search.suggest(name)["assignment"] for name in "ab")
    assert first["settings"] == untuned(baseline.folder.about.settings)
    assert PRUNABLE_EPOCHS not in clock(first, [{}])
    assert own.completes == first["name"] == "l1-0000"
    assert first["folder"] == str(baseline.folder.path / "baseline" / "0000")
    assert first["cells"] == baseline.request.cells
    assert bool(study.get_trials()[0].params) == has_parameters
    assert study.get_trials()[0].user_attrs[LABEL] == PUBLISHED
    assert second["settings"] != first["settings"]
    assert PRUNABLE_EPOCHS in clock(second, [{}])
    assert search.suggest("c") is None  # of two trials


def test_its_folder_travels_with_those_of_the_trials():
    assert "baseline" in BY_WORKERS


def test_the_baseline_has_its_share_of_the_budgets_and_the_main_search_the_rest(made):
    baseline = made(trials=6, baseline_trials=2)
    study = baseline_study(baseline.folder, baseline.request, MAE)
    whole = Budget(seconds=100.0, accelerator_hours=4.0, devices=2.0, unit="GPU")
    own = baseline.share_of(whole, study)
    assert (own.share, own.own_seconds, own.own_hours) == (0.25, 25.0, 1.0)
    assert (own.devices, own.unit, own.epochs) == (2.0, "GPU", 50 * 2)
    assert own.remaining() == ["25 s", "1 GPU-hours"]
    assert not own("a", {"name": "l1-0000", "fold": 0, "done": False, "spent_seconds": 1700.0})
    assert own.deadline == pytest.approx(time.time() + 25, abs=2)
    assert own("b", {"name": "l1-0001", "fold": 0, "done": False, "spent_seconds": 100.0})
    assert own.reason == "1 GPU-hours used of 1"
    # The main search: what the baseline used is part of the hours, and its time is gone.
    main = Budget(seconds=100.0, accelerator_hours=4.0, used=dict(own.used), elapsed=20.0)
    assert main.remaining() == ["80 s", "3 CPU-hours"]
    main("c", {"name": "0000", "fold": 0, "done": False, "spent_seconds": 1.0})
    assert main.deadline == pytest.approx(time.time() + 80, abs=2)


def test_a_baseline_beyond_its_share_is_not_hopeless_before_it_is_beyond_the_whole_budget(made):
    baseline = made(trials=6, baseline_trials=2)
    whole = Budget(seconds=100.0)

    def projected(each):
        own = baseline.share_of(whole, baseline_study(baseline.folder, baseline.request, MAE))
        own.completes = "l1-0000"
        for epochs in (1, 2):
            spent = {
                "name": "l1-0000",
                "fold": 0,
                "done": False,
                "epochs": epochs,
                "spent_seconds": each * epochs,
            }
            own("a", spent)
        return own.hopeless

    assert projected(1.5) is None  # 98 epochs: 147 s, of 25 s that are its share
    assert "more than 2 times the time budget of 100 s" in projected(2.5)


@dataclass(frozen=True)
class FakeExecutor:
    """Drives a searcher as Tune does, one trial after another; `value` gives its value by the name of a trial."""

    value: object
    callbacks: tuple = ()
    slots: int = 1
    seen: list = None

    def search(self, searcher, scheduler, stopper, name):
        self.seen.append(name)
        return replace(self, callbacks=(searcher, stopper))

    def fit(self):
        searcher, stopper = self.callbacks
        identity = 0
        while isinstance(proposed := searcher.suggest(f"t{identity}"), dict):
            name = proposed["assignment"]["name"]
            self.seen.append(name)
            cells = [{"mae": self.value(name), "site_balanced_accuracy": 0.5}] * 2
            last = Answer(
                name=name, value=self.value(name), epochs=100, fold=1, epoch=50, progress=1.0, finished=True, done=True,
                cells=cells, n=2, sd=0.0, spent_seconds=36.0,
            )  # fmt: skip
            stopper(f"t{identity}", last)
            searcher.on_trial_result(f"t{identity}", last)
            searcher.on_trial_complete(f"t{identity}", last)
            identity += 1


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setattr(module, "release_slots", lambda: None)
    return FakeExecutor({"l1-0000": 9.0, "l1-0001": 7.0, "l1-0002": 8.0}.get, seen=[])


def test_a_baseline_is_searched_once_and_the_main_search_learns_what_it_used(made, executor):
    baseline = made(baseline_trials=3)
    budget = Budget(seconds=1000.0, accelerator_hours=5.0, devices=2.0)
    assert baseline.run(budget, executor) is None
    assert executor.seen == ["baseline", "l1-0000", "l1-0001", "l1-0002"]
    assert budget.used == dict.fromkeys(["l1-0000", "l1-0001", "l1-0002"], 72.0)
    assert 0 < budget.elapsed < 60
    assert not budget.interrupted
    assert baseline_finished(baseline.folder, baseline.request, MAE) == 3
    assert best_baseline(baseline.folder, baseline.request, MAE).number == 1
    again = Budget(devices=2.0)
    assert baseline.run(again, executor) is None
    assert len(executor.seen) == 4
    assert again.used == budget.used
    assert again.elapsed == 0


def test_an_unfinished_baseline_continues_before_anything_else(made, executor):
    baseline = made(baseline_trials=3)
    study = baseline_study(baseline.folder, baseline.request, MAE)
    baseline.begin(study)
    killed = baseline.searcher(study, Budget())
    killed.suggest("a")
    killed.suggest("b")
    killed.on_trial_complete(
        "a",
        Answer(
            value=9.0,
            epochs=100,
            finished=True,
            done=True,
            cells=[{"mae": 9.0, "site_balanced_accuracy": 0.5}],
        ),
    )
    baseline.folder.baseline("0001").mkdir(parents=True)
    (baseline.folder.baseline("0001") / "progress.json").write_text(
        json.dumps({"history": [{"value": 12.0, "spent_seconds": 1.0}], "cells": [], "answer": None})
    )
    assert baseline.run(Budget(), executor) is None
    assert executor.seen == ["baseline", "l1-0001", "l1-0002"]
    trials = baseline_study(baseline.folder, baseline.request, MAE).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert trials[1].intermediate_values == {1: 12.0, 100: 7.0}  # the epoch that the study had not heard of


def test_ctrl_c_and_a_broken_storage_end_the_sweep_too(made, executor):
    baseline = made(baseline_trials=3)
    stopped = Budget(interrupted=True)
    baseline.run(stopped, executor)
    assert executor.seen == []
    budget = Budget()

    class Broken(FakeExecutor):
        def fit(self):
            searcher, _ = self.callbacks
            searcher.suggest("a")
            searcher.on_trial_complete(
                "a", Answer(value=1.0, failed="No space left on device; x", storage=True, done=True)
            )

    assert baseline.run(budget, Broken(None, seen=[])) == "No space left on device"
    assert budget.interrupted


def test_hours_that_are_used_up_do_not_start_it_again(made, executor):
    baseline = made(baseline_trials=3)
    study = baseline_study(baseline.folder, baseline.request, MAE)
    baseline.begin(study)
    end(study, 9.0)
    baseline.folder.baseline("0000").mkdir(parents=True)
    (baseline.folder.baseline("0000") / "progress.json").write_text(
        json.dumps({"history": [{"spent_seconds": 7200.0}], "cells": [], "answer": None})
    )
    assert baseline.run(Budget(accelerator_hours=2.0), executor) is None
    assert executor.seen == []


def test_a_resumed_search_shows_its_scheduler_the_trials_by_their_names(made):
    baseline = made()
    study = baseline_study(baseline.folder, baseline.request, MAE)
    for value in (9.0, 8.0):
        trial = study.ask()
        trial.report(value, step=25)
    scheduler = make_scheduler("hyperband", 50, 2)
    replay(scheduler, study.get_trials(deepcopy=False), baseline_name)
    assert list(scheduler.trials) == ["l1-0000", "l1-0001"]
    brackets = [scheduler.scheduler.brackets.index(each) for each in scheduler.scheduler.bracket_of.values()]
    assert brackets == [scheduler.scheduler.bracket_number(number) for number in (0, 1)]


def test_names_of_the_baseline_are_those_of_trials_and_no_others():
    assert [trial_number(name) for name in ("0007", "l1-0007", "l1", "l1-repeated", "winner")] == [7, 7] + [
        None
    ] * 3
    assert baseline_name(7) == "l1-0007"


def main_study(folder, *values):
    study = open_study(folder.journal, "tpe", 0, MAE)
    end(study, *values)
    return study


def l1_of(assignments):
    return next(each for each in assignments if each["name"] == "l1")


def test_the_refit_takes_the_best_trial_of_the_baseline(made):
    baseline = made()
    folder, request = baseline.folder, baseline.request
    study, search = main_study(folder, 5.0), baseline.search
    l1 = l1_of(after_search(folder, request, search, study))
    assert l1["settings"] == untuned(folder.about.settings)  # none was completed
    end(baseline_study(folder, request, MAE), 9.0, 7.0, None, 8.0)
    l1 = l1_of(after_search(folder, request, search, study))
    assert l1["settings"] == {"of": 1}
    assert l1["cells"] == request.refit_cells
    off = request.model_copy(update={"baseline_trials": 0})
    assert l1_of(after_search(folder, off, search, study))["settings"] == untuned(folder.about.settings)


def test_a_better_baseline_after_a_look_is_refitted_anew_and_that_is_another_look(made):
    baseline = made()
    folder, request = baseline.folder, baseline.request
    study, search = main_study(folder, 5.0), baseline.search
    after_search(folder, request, search, study)
    folder.refit("l1").mkdir(parents=True)
    for values, aside in (((9.0,), "l1-was-untuned"), ((9.5,), None), ((7.0,), "l1-was-0")):
        end(baseline_study(folder, request, MAE), *values)
        after_search(folder, request, search, study)
        assert folder.refit("l1").exists() == (aside is None)
        assert aside is None or folder.refit(aside).exists()
        folder.refit("l1").mkdir(parents=True, exist_ok=True)
    assert [(look.trials, look.winner, look.baseline) for look in folder.about.looks] == [
        (1, 0, None),
        (1, 0, 0),
        (1, 0, 2),
    ]


def test_resume_neither_forgets_nor_changes_a_baseline_that_is_unfinished(made, place, cohort, monkeypatch):
    baseline = made()
    folder, request = baseline.folder, baseline.request
    assert "baseline_trials" not in ResumeRequest.model_fields
    assert _combined(request, ResumeRequest(trials=9)).baseline_trials == 2
    study = main_study(folder, *[5.0] * 4)
    search = resolve_search(request, cohort)
    folder.update(finished="2026-11-20T09:00:00+00:00", searched=search.profile.as_json())
    console = Console(file=io.StringIO(), width=200)
    sweep = Sweep(folder, request, search, cohort, None, study, console)
    monkeypatch.setattr(Sweep, "execute", lambda self: "executed")
    other = request.model_copy(update={"changes": {"objective.temperature": 0.1}})
    changed = replace(sweep, request=other, search=resolve_search(other, cohort, folder.about.settings))
    assert _go_on(sweep) == "executed"
    with pytest.raises(UserError, match=r"of the baseline of .* 0 of 2 trials have ended"):
        _check_change(changed, request, ["objective.temperature is fixed at 0.1"], is_meant=True)
    end(baseline_study(folder, request, MAE), 9.0, 7.0)
    assert _go_on(sweep) == "executed"  # it was killed before its page was written
    (folder.path / "report.html").write_text("")
    finish(folder, study)
    assert _go_on(sweep) == "executed"  # the page of an earlier session
    folder.update(concluded=True)
    assert _go_on(sweep) == folder
    assert "nothing left to do" in console.file.getvalue()
    _check_change(changed, request, ["objective.temperature is fixed at 0.1"], is_meant=True)


def test_a_run_of_which_anything_is_left_is_not_called_finished(made, cohort, monkeypatch):
    """Its page is that of an earlier session: since then a trial has begun, or the process was killed in its refits."""
    baseline = made()
    folder, request = baseline.folder, baseline.request.model_copy(update={"baseline_trials": 0})
    study, search = main_study(folder, *[5.0] * 4), resolve_search(request, cohort)
    console = Console(file=io.StringIO(), width=200)
    sweep = Sweep(folder, request, search, cohort, None, study, console)
    folder.update(finished="2026-11-20T09:00:00+00:00", concluded=True)
    (folder.path / "report.html").write_text("")
    monkeypatch.setattr(Sweep, "execute", lambda self: "executed")
    assert _go_on(sweep) == folder
    study.ask()
    assert _go_on(sweep) == "executed"
    study.tell(4, 5.0)
    assert _go_on(sweep) == "executed"  # killed before its refits: the page was not written again
    folder.update(concluded=True)
    study.enqueue_trial({})
    assert _go_on(sweep) == folder
    population = replace(sweep, request=request.model_copy(update={"scheduler": "pbt"}))
    assert _go_on(population) == "executed"  # the schedule that was found waits


def test_a_search_that_a_budget_cut_may_have_more_trials_than_were_asked_for(made, cohort):
    baseline = made()
    folder, request = baseline.folder, baseline.request.model_copy(update={"trials": 3, "scheduler": "pbt"})
    study = main_study(folder, *[5.0] * 4)
    study.enqueue_trial({}, user_attrs={SETTINGS: json.dumps(folder.about.settings), LABEL: "schedule found"})
    sweep = Sweep(folder, request, resolve_search(baseline.request, cohort), cohort, None, study, None)
    assert sweep._searcher(Budget()).proposals.trials == 3
    folder.update(evolved=True)
    assert sweep._searcher(Budget()).proposals.trials == 5


def test_tables_without_a_finished_cell_have_their_columns_and_hold_nothing_up(made):
    folder = made().folder
    study = main_study(folder)
    study.ask()
    write_tables(folder, study, progress_reader(folder.trial, [], "mae"))
    (folder.path / "confirmed.csv").write_bytes(b"\xff")
    rows = count_rows(folder)
    assert {name: rows[name] for name in ("trials", "cells", "history")} == {
        "trials": 1,
        "cells": 0,
        "history": 0,
    }
    assert "confirmed" not in rows


def test_a_space_of_which_nothing_is_left_does_not_end_a_run_whose_baseline_is_finished(place, cohort):
    request = asked(place)
    base = resolve_search(request, cohort).base
    fixed = request.model_copy(update={"changes": {"optimiser.learning_rate": 1e-3}})
    assert not resolve_search(fixed, cohort, base).baseline.profile.settings
    with pytest.raises(UserError, match="nothing to search"):
        resolve_search(fixed, cohort)


def test_the_table_has_the_columns_of_the_trials_also_before_the_first_trial(made):
    baseline = made()
    folder, request = baseline.folder, baseline.request
    write_baseline(
        folder, baseline_study(folder, request, MAE), baseline_progress(folder, request, baseline.search)
    )
    # Interrupted before the search had a trial.
    write_tables(folder, open_study(folder.journal, "tpe", 0, MAE), progress_reader(folder.trial, [], "mae"))
    record = read_run(folder.path)
    assert record.baseline.empty
    assert record.trials.empty
    assert not [line for line in record.missing if line.startswith(("baseline", "trials"))]
    baseline.begin(baseline_study(folder, request, MAE))
    end(baseline_study(folder, request, MAE), 9.0, 7.0)
    write_baseline(
        folder, baseline_study(folder, request, MAE), baseline_progress(folder, request, baseline.search)
    )
    record = read_run(folder.path)
    assert record.baseline["label"].tolist()[0] == PUBLISHED
    assert record.best_baseline["value"] == 7.0
