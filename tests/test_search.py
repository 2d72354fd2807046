"""What the study is told of a search, without Ray running: StudySearch is driven as Tune drives it."""

import json
import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from core.config import resolve
from core.errors import UserError
from distributed.search import (
    SAMPLERS,
    SCHEDULERS,
    TIME,
    Budget,
    Proposals,
    StudySearch,
    check_space,
    make_scheduler,
    open_study,
    published_parameters,
    replay,
)
from search_spaces import load_space, pin, published


def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    return dict(trial.params)


@pytest.fixture
def study(tmp_path):
    return open_study(tmp_path / "study.journal", "tpe", 0)


def searcher(study, trials=3, budget=None, refits=(), continued=()):
    proposals = Proposals(
        study=study,
        space=space,
        base=resolve(published("brain_age")).model_dump(mode="json"),
        trials=trials,
        assignment=lambda name, settings, prunable: {
            "name": name,
            "folder": f"nowhere/{name}",
            "settings": settings,
            "prunable": prunable,
        },
        refits=lambda study: list(refits),
        continued=list(continued),
    )
    return StudySearch(proposals, budget or Budget())


def result(value, epochs, **more):
    return {"value": value, "epochs": epochs, "fold": 0, "finished": False, "done": False} | more


def states(study):
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def test_finished_is_complete_with_its_mean_sd_and_n(study):
    search = searcher(study)
    search.suggest("a")
    search.on_trial_result("a", result(9.0, 1))
    search.on_trial_complete("a", result(8.0, 2, sd=0.5, n=2, finished=True, done=True))
    (trial,) = study.get_trials()
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 8.0)
    assert (trial.user_attrs["sd"], trial.user_attrs["n"]) == (0.5, 2)


def test_stopped_early_is_pruned_with_all_its_intermediate_values(study):
    search = searcher(study)
    search.suggest("a")
    search.on_trial_result("a", result(9.0, 1))
    search.on_trial_complete("a", result(8.5, 2, done=True))  # Tune shows the last result only here
    (trial,) = study.get_trials()
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 9.0, 2: 8.5}


def test_diverged_and_crashed_fail_with_the_reason(study):
    search = searcher(study)
    search.suggest("a")
    search.suggest("b")
    search.on_trial_complete("a", result(math.nan, 1, failed="loss became nan in epoch 1", done=True))
    search.on_trial_complete("b", None, error=True)
    first, second = study.get_trials()
    assert states(study) == [TrialState.FAIL, TrialState.FAIL]
    assert first.user_attrs["reason"] == "loss became nan in epoch 1"
    assert "crashed" in second.user_attrs["reason"]


@pytest.mark.parametrize("budget", [Budget(interrupted=True), Budget(deadline=0.0)])
def test_interrupted_is_neither_and_can_be_continued(study, budget):
    search = searcher(study)
    suggested = search.suggest("a")["assignment"]
    search.budget = budget
    search.on_trial_result("a", result(9.0, 1))
    search.on_trial_complete("a", result(9.0, 1))
    (trial,) = study.get_trials()
    assert trial.state == TrialState.RUNNING
    again = searcher(study, continued=[trial])
    assert again.suggest("x")["assignment"] == suggested
    again.on_trial_complete("x", result(7.0, 2, n=1, finished=True))
    (trial,) = study.get_trials()
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 7.0, {1: 9.0})


def test_a_budget_that_is_spent_does_not_hide_what_finished(study):
    search = searcher(study, budget=Budget())
    search.suggest("a")
    search.budget = Budget(deadline=0.0)
    search.on_trial_complete("a", result(7.0, 2, n=1, finished=True))
    assert states(study) == [TrialState.COMPLETE]


def test_no_more_trials_than_asked_also_after_a_resume_then_refits_then_the_end(study):
    search = searcher(study, trials=2, refits=[{"name": "winner"}])
    search.suggest("a")
    search.suggest("b")
    assert search.suggest("c") is None  # refits wait for the last trial
    for name in ("a", "b"):
        search.on_trial_complete(name, result(7.0, 2, n=1, finished=True))
    assert search.suggest("c") == {"assignment": {"name": "winner"}}
    assert search.suggest("d") == Searcher.FINISHED
    assert searcher(study, trials=2).suggest("a") == Searcher.FINISHED
    search.on_trial_complete("c", result(6.0, 2, finished=True))
    assert len(states(study)) == 2  # a refit is no trial of the study


def test_the_study_holds_the_settings_of_every_trial(study):
    search = searcher(study)
    suggested = search.suggest("a")["assignment"]["settings"]
    (trial,) = study.get_trials()
    assert json.loads(trial.user_attrs["settings"]) == suggested
    assert suggested["optimiser"]["learning_rate"] == trial.params["optimiser.learning_rate"]


def test_the_published_configuration_is_a_point_of_its_space_and_comes_first(study):
    space, base = load_space("brain_age")
    parameters = published_parameters(space, base)
    study.enqueue_trial(parameters)
    trial = study.ask()
    proposed = space(trial)
    assert {name: proposed[name] for name in parameters} == parameters
    assert trial.params["objective.width"] == 2.0


def test_only_the_published_trial_is_safe_from_pruning(study):
    study.enqueue_trial({"optimiser.learning_rate": 1e-4}, user_attrs={"label": "published"})
    search = searcher(study)
    assert [search.suggest(name)["assignment"]["prunable"] for name in "abc"] == [False, True, True]


def test_the_clock_of_a_budget_starts_with_the_first_result():
    budget = Budget(seconds=1000.0)
    assert budget.deadline is None
    assert not budget("a", result(9.0, 1))
    assert budget.deadline is not None
    assert not budget.spent


def test_a_spent_budget_stops_trials_but_neither_refits_nor_what_is_done():
    spent = Budget(deadline=0.0)
    assert spent("a", result(9.0, 1))
    assert not spent("a", result(9.0, 1, done=True))
    assert not spent("a", result(9.0, 1, fold=-1))
    assert not Budget()("a", result(9.0, 1))


def test_a_configuration_outside_a_space_has_no_parameters():
    assert (
        published_parameters(
            lambda trial: trial.suggest_float("optimiser.learning_rate", 1, 2), published("brain_age")
        )
        is None
    )
    assert (
        published_parameters(lambda trial: trial.suggest_float("no.such", 1, 2), published("brain_age"))
        is None
    )


def test_pinned_settings_are_given_not_searched(study):
    whole, _ = load_space("brain_age")
    pinned = pin(whole, {"views.crop": 0.77, "objective.name": "supcon", "objective.neighbours": None})
    for _ in range(12):
        trial = study.ask()
        proposed = pinned(trial)
        assert proposed["views.crop"] == 0.77  # a value the space itself does not offer
        assert proposed["objective.name"] == "supcon"
        assert proposed["objective.neighbours.shape"] is None
        assert "objective.bin_width" in proposed  # what follows from a pinned choice is still searched
        assert not {"views.crop", "objective.name", "objective.neighbours.shape"} & set(trial.params)
        study.tell(trial, 1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_its_way_through_the_conditional_space(name, tmp_path):
    space, _ = load_space("brain_age")
    study = open_study(tmp_path / "study.journal", name, 0)
    for _ in range(14):
        trial = study.ask()
        resolve_me = space(trial)
        study.tell(trial, math.log(resolve_me["optimiser.learning_rate"]) ** 2)
    assert all(state == TrialState.COMPLETE for state in states(study))


def test_the_same_seed_proposes_the_same(tmp_path):
    space, _ = load_space("brain_age")

    def proposals(name):
        study = open_study(tmp_path / name, "tpe", 5)
        values = []
        for _ in range(12):
            trial = study.ask()
            values.append(space(trial))
            study.tell(trial, values[-1]["objective.temperature"])
        return values

    assert proposals("a") == proposals("b")


def test_a_space_that_returns_nonsense_is_refused_at_start():
    with pytest.raises(UserError, match="must return a dict"):
        check_space(lambda trial: None, published("brain_age"))
    with pytest.raises(UserError, match=r"'objective.temperture'.*did you mean 'objective.temperature'"):
        check_space(lambda trial: {"objective.temperture": 0.1}, published("brain_age"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_scheduler_decides_like_one_that_saw_everything(name):
    """A law: replaying finished trials leaves the scheduler in the state it would have been in."""

    class Trial:
        def __init__(self, name):
            self.trial_id = name

    generator = np.random.default_rng(0)
    curves = generator.uniform(5, 15, (12, 1)) * np.linspace(1.5, 1, 8)
    study = optuna.create_study()
    lived = make_scheduler(name, epochs=4, cells=2)

    def run(scheduler, number, curve, report=lambda epochs, value: None):
        trial = Trial(f"t{number}")
        scheduler.on_trial_add(None, trial)
        for epochs, value in enumerate(curve, start=1):
            report(epochs, value)
            shown = {TIME: epochs, "value": value}
            if scheduler.on_trial_result(None, trial, shown) != TrialScheduler.CONTINUE or epochs == 8:
                scheduler.on_trial_complete(None, trial, shown)
                return epochs
        return None

    for number, curve in enumerate(curves[:6]):
        trial = study.ask()
        run(lived, number, curve, lambda epochs, value, trial=trial: trial.report(value, epochs))
        study.tell(trial, state=TrialState.PRUNED)
    resumed = make_scheduler(name, epochs=4, cells=2)
    replay(resumed, study.get_trials())
    for number, curve in enumerate(curves[6:], start=6):
        assert run(lived, number, curve) == run(resumed, number, curve)


def test_asha_stops_the_worse_half_and_never_a_refit():
    scheduler = make_scheduler("asha", epochs=4, cells=2)

    class Trial:
        def __init__(self, name):
            self.trial_id = name

    decisions = []
    for number, value in enumerate([5.0, 6.0, 9.0, 4.0]):
        trial = Trial(str(number))
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {TIME: 1, "value": value}))
    assert decisions == ["CONTINUE", "STOP", "STOP", "CONTINUE"]
    refit = Trial("refit")
    scheduler.on_trial_add(None, refit)
    assert scheduler.on_trial_result(None, refit, {"epochs": 1, "value": math.nan}) == "CONTINUE"


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'asha'"):
        make_scheduler("ashaa", 4, 2)
    with pytest.raises(UserError, match="did you mean 'tpe'"):
        open_study(tmp_path / "journal", "tpee", 0)
