"""What the study is told of a search, without Ray running: StudySearch is driven as Tune drives it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from of_age import MAE, assign, objectives
from of_age import judgement as judgement_by
from optuna.trial import TrialState
from ray.tune.search import Searcher

from core.config import resolve
from core.errors import UserError
from core.report.answer.record import reported
from core.run_names import CELL_VALUES, WEIGHTS
from distributed.run.assignment import Answer
from distributed.search.budget import FEWEST_TRIALS, Budget
from distributed.search.schedulers import Wilcoxon, spares
from distributed.search.searcher import SLOT_CRASHES, Proposals, StudySearch
from distributed.search.study import carry_over, check_space, open_study, owed_trial, published_parameters
from search_spaces import load_space, pin, published


def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    return dict(trial.params)


@pytest.fixture
def study(tmp_path):
    return open_study(tmp_path / "study.journal", "tpe", 0, MAE)


def searcher(
    study, trials=3, budget=None, refits=(), continued=(), judgement=None, space=space, tell=lambda text: None
):
    proposals = Proposals(
        study=study,
        space=space,
        tell=tell,
        base=resolve(published("brain_age")).model_dump(mode="json"),
        trials=trials,
        assignment=lambda name, settings, prunable: assign(
            Path("nowhere") / name, settings, [{"fold": 0, "seed": 0}], prunable=prunable
        ),
        refits=lambda study: list(refits),
        continued=list(continued),
    )
    return StudySearch(proposals, budget or Budget(), judgement or judgement_by())


def result(value, epochs, **more):
    cells = [cell(value)] * more.get("n", 0)
    return Answer(value=value, epochs=epochs, fold=0, finished=False, done=False, cells=cells) | more


def cell(mae, site=0.5):
    return {"mae": mae, "site_balanced_accuracy": site, "openbhb_score": site**0.3 * mae}


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
    for _ in range(SLOT_CRASHES):  # is handed to another slot
        search.on_trial_complete("b", None, error=True)
        assert search.suggest("b") is not None
    search.on_trial_complete("b", None, error=True)
    first, second = study.get_trials()
    assert states(study) == [TrialState.FAIL, TrialState.FAIL]
    assert first.user_attrs["reason"] == "loss became nan in epoch 1"
    assert "crashed" in second.user_attrs["reason"]


def test_the_first_trial_of_every_start_is_completed(study):
    def with_starts(trial):
        return space(trial) | {WEIGHTS: trial.suggest_categorical(WEIGHTS, [None, "one#1", "two#2"])}

    search = searcher(study, trials=9, space=with_starts)
    search.proposals.starts = (None, "one#1", "two#2")
    given = [search.suggest(f"{number}")["assignment"] for number in range(9)]
    starts = [trial.params[WEIGHTS] for trial in study.get_trials()]
    assert sorted(map(str, starts[:3])) == ["None", "one#1", "two#2"]
    assert [each["prunable"] for each in given] == [False] * 3 + [True] * 6


@pytest.mark.parametrize("budget", [Budget(interrupted=True), Budget(deadline=0.0, cut={"a"})])
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


def test_a_spent_budget_still_begins_the_published_configuration_and_nothing_else(study):
    study.enqueue_trial({"optimiser.learning_rate": 1e-4}, user_attrs={"label": "published"})
    study.enqueue_trial({"optimiser.learning_rate": 1e-3}, user_attrs={"label": "enqueued"})
    search = searcher(study, budget=Budget(deadline=0.0))
    assert search.suggest("a")["assignment"]["name"] == "0000"
    assert search.budget.completes == "0000"
    assert search.suggest("b") is None
    search.on_trial_complete("a", result(8.0, 2, n=2, finished=True, done=True))
    assert search.suggest("c") == Searcher.FINISHED
    assert states(study) == [TrialState.COMPLETE, TrialState.WAITING]


def test_what_is_owed_begins_before_what_has_waited_longer(study):
    """A population tries the published configuration last; what the user has enqueued still waits then."""
    study.enqueue_trial({"optimiser.learning_rate": 1e-3}, user_attrs={"label": "enqueued"})
    study.enqueue_trial({"optimiser.learning_rate": 1e-4}, user_attrs={"label": "published"})
    search = searcher(study, budget=Budget(deadline=0.0))
    given = search.suggest("a")["assignment"]
    assert (given["name"], given["settings"]["optimiser"]["learning_rate"]) == ("0001", 1e-4)
    assert states(study) == [TrialState.WAITING, TrialState.RUNNING]


def test_an_interrupted_search_hands_out_no_refit_which_would_be_a_look(study):
    search = searcher(study, trials=1, budget=Budget(interrupted=True))
    search.proposals.refits = lambda study: pytest.fail("looked at the hold-out")
    assert search.suggest("a") == Searcher.FINISHED


def test_without_a_published_configuration_the_first_trial_is_completed(study):
    search = searcher(study)
    for name in "ab":
        search.suggest(name)
    running = study.get_trials()
    again = searcher(study, budget=Budget(deadline=0.0), continued=running[::-1])
    assert again.suggest("x")["assignment"]["name"] == again.budget.completes == "0000"
    assert again.suggest("y") is None
    assert [trial.number for trial in again.proposals.continued] == [1]


PUBLISHED_POINT = {"optimiser.learning_rate": 1e-4}


def with_published(study, label="published"):
    study.enqueue_trial(PUBLISHED_POINT, user_attrs={"label": label})


def failing(**more):
    return result(math.nan, 1, done=True, failed="the loss became NaN", **more)


def test_if_the_published_configuration_fails_the_first_of_the_others_is_completed(study):
    """The other one was cut by the budget before; nothing stops it now, and after it nothing begins."""
    with_published(study)
    search = searcher(study)
    for name in "abc":
        search.suggest(name)
    search.budget.deadline = 0.0
    for name in "bc":
        assert search.budget(name, result(9.0, 1, name="0001" if name == "b" else "0002", spent_seconds=1.0))
        search.on_trial_complete(name, result(9.0, 1))
    assert search.suggest("d") is None  # the published one still runs
    search.on_trial_complete("a", failing())
    assert search.suggest("e")["assignment"]["name"] == search.budget.completes == "0001"
    assert not search.budget("e", result(9.0, 1, name="0001", spent_seconds=1.0, epoch=1, progress=0.1))
    assert search.suggest("f") is None
    search.on_trial_complete("e", result(7.0, 2, n=2, finished=True, done=True))
    assert search.budget.completes == ""
    assert search.suggest("g") == Searcher.FINISHED
    assert states(study) == [TrialState.FAIL, TrialState.COMPLETE, TrialState.RUNNING]


def test_if_everything_has_failed_another_trial_begins_but_not_for_ever(study):
    with_published(study)
    search = searcher(study, trials=3)
    search.suggest("a")
    search.budget.seconds, search.budget.deadline = 1e10, 0.0
    search.on_trial_complete("a", failing())
    assert search.suggest("b")["assignment"]["name"] == search.budget.completes == "0001"
    search.on_trial_complete("b", failing())
    search.budget.seconds = 1e9  # more than twice of it have passed
    assert search.suggest("c") == Searcher.FINISHED


def test_a_published_configuration_outside_a_changed_space_is_no_result(study, tmp_path):
    with_published(study)
    search = searcher(study)
    search.suggest("a")
    search.on_trial_complete("a", result(8.0, 2, n=2, finished=True, done=True))
    assert owed_trial(study) is None
    outside = open_study(tmp_path / "study.journal", "tpe", 0, MAE, name="other")
    carry_over(study, outside, lambda trial: {"views.noise": trial.suggest_float("views.noise", 0.0, 1.0)})
    again = searcher(outside, budget=Budget(deadline=0.0))
    assert again.suggest("b")["assignment"]["name"] == again.budget.completes == "0001"


@pytest.mark.parametrize("is_published", [True, False])
def test_as_long_as_there_is_no_result_the_scheduler_stops_every_trial_but_one(study, is_published):
    """With the published point outside the space the first trial is that one, whatever its value is."""
    if is_published:
        with_published(study)
    search = searcher(study, trials=9)
    is_spared = spares(0, search.budget)
    names = [search.suggest(name)["assignment"]["name"] for name in "abc"]
    assert [is_spared(name) for name in names] == [True, False, False]
    search.on_trial_complete("a", result(8.0, 2, n=2, finished=True, done=True))
    assert not any(map(is_spared, names))


def test_what_the_scheduler_stopped_after_the_end_of_the_budget_was_not_cut_by_the_budget(study):
    with_published(study)
    search = searcher(study)
    for name in "abc":
        search.suggest(name)
    search.budget.seconds, search.budget.deadline = 1e9, 0.0
    near = result(9.0, 9, name="0001", spent_seconds=1.0, epoch=9, progress=0.9)
    assert not search.budget("b", near)
    search.on_trial_complete("b", near)
    early = result(9.0, 1, name="0002", spent_seconds=1e9, epoch=1, progress=0.1)
    assert search.budget("c", early)
    search.on_trial_complete("c", early)
    assert states(study) == [TrialState.RUNNING, TrialState.PRUNED, TrialState.RUNNING]


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
    assert search.suggest("d") is None  # the refit may lose its slot, and be due again
    search.on_trial_complete("c", result(6.0, 2, finished=True))
    assert search.suggest("d") == Searcher.FINISHED
    assert searcher(study, trials=2).suggest("a") == Searcher.FINISHED
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


def test_a_space_that_returns_nonsense_is_refused_at_start():
    with pytest.raises(UserError, match="must return a dict"):
        check_space(lambda trial: None, published("brain_age"))
    with pytest.raises(UserError, match=r"'objective.temperture'.*did you mean 'objective.temperature'"):
        check_space(lambda trial: {"objective.temperture": 0.1}, published("brain_age"))


def test_what_stopped_a_trial_is_kept_with_it(study):
    pruner = Wilcoxon(0.1, study, "mae", MAE["mae"], 8)
    search = searcher(study, judgement=judgement_by(scheduler="asha", pruner=pruner))
    search.suggest("a")
    search.on_trial_complete("a", result(9.0, 4))
    search.suggest("b")
    pruner.reasons["b"] = "Wilcoxon p = 0.031"
    search.on_trial_complete("b", result(9.0, 10, n=5))
    assert [trial.user_attrs["reason"] for trial in study.get_trials()] == [
        "asha after epoch 4",
        "Wilcoxon p = 0.031",
    ]


def test_several_objectives_are_told_in_their_order_and_keep_what_was_reported(tmp_path):
    names = ("openbhb_score", "mae", "accelerator_seconds")
    study = open_study(tmp_path / "study.journal", "nsga2", 0, objectives(*names))
    search = searcher(study, judgement=judgement_by(*names), budget=Budget(devices=3.0))
    search.suggest("a")
    cells = [cell(4.0, 0.5), cell(6.0, 0.25)]
    score = np.mean([4.0 * 0.5**0.3, 6.0 * 0.25**0.3])
    search.on_trial_result("a", result(7.0, 1))
    search.on_trial_complete(
        "a", result(score, 2, n=2, cells=cells, spent_seconds=10.0, finished=True, done=True)
    )
    (trial,) = study.get_trials()
    assert trial.values == pytest.approx([score, 5.0, 30.0])
    assert reported(trial) == {1: 7.0}
    assert trial.user_attrs[CELL_VALUES] == pytest.approx([4.0 * 0.5**0.3, 6.0 * 0.25**0.3])


def test_a_finished_trial_without_a_value_has_failed(tmp_path):
    names = ("mae", "site_balanced_accuracy")
    study = open_study(tmp_path / "study.journal", "random", 0, objectives(*names))
    search = searcher(study, judgement=judgement_by(*names))
    search.suggest("a")
    undefined = [cell(5.0), cell(5.0, math.nan)]
    search.on_trial_complete("a", result(5.0, 2, n=2, cells=undefined, finished=True, done=True))
    (trial,) = study.get_trials()
    assert trial.state == TrialState.FAIL
    assert "'site_balanced_accuracy' is undefined" in trial.user_attrs["reason"]


def test_nothing_is_begun_once_improvement_is_unlikely_but_what_runs_is_finished(study):
    search = searcher(study, trials=5, refits=[{"name": "winner"}])
    search.suggest("a")
    search.budget.unlikely = True
    assert search.suggest("b") is None
    search.on_trial_complete("a", result(7.0, 2, n=1, finished=True, done=True))
    assert states(study) == [TrialState.COMPLETE]
    assert search.suggest("b") == {"assignment": {"name": "winner"}}
    assert "b" in search.budget.beyond


def test_the_terminator_is_asked_once_enough_trials_are_completed(study):
    asked = []
    terminator = SimpleNamespace(should_terminate=lambda study: bool(asked.append(len(study.trials))) or True)
    search = searcher(study, trials=100, judgement=judgement_by(terminator=terminator))
    for number in range(100):
        if not isinstance(search.suggest(str(number)), dict):
            break
        search.on_trial_complete(str(number), result(7.0, 2, n=2, finished=True, done=True))
    assert asked == [FEWEST_TRIALS]
    assert number == FEWEST_TRIALS
    assert search.budget.reason == "further improvement was judged unlikely"
