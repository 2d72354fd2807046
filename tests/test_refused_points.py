"""Points that a space or the settings refuse: their trials say why, and the search goes on."""

import json
import warnings

import optuna
import pytest
from optuna.trial import TrialState
from test_search import searcher

from core.errors import StorageError, UserError
from core.run_names import REASON
from distributed.search.samplers import grid_points
from distributed.search.study import check_space, published_parameters, read_points
from search_spaces import pin, published
from search_spaces.points import Asked, OutsideSpaceError, grid_of, point_of

BASE = published("brain_age")
RATE = "optimiser.learning_rate"


def bad_corner(trial):
    """Choices whose second raises, whose third is no value of the setting, and whose fourth is given up."""
    name = trial.suggest_categorical("model.name", ["resnet18", "densenet", "no_such", "slow"])
    rate = trial.suggest_float(RATE, 1e-5, 1e-2, log=True)
    if name == "densenet":
        raise ZeroDivisionError("no width for\ndensenet")
    if name == "slow":
        raise optuna.TrialPruned("too slow here")
    return {"model.name": name, RATE: rate}


@pytest.fixture
def study():
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_refused_point_is_a_trial_with_its_reason_and_the_next_one_begins(study):
    for name in ("densenet", "no_such", "slow", "resnet18"):
        study.enqueue_trial({"model.name": name, RATE: 1e-4})
    told = []
    search = searcher(study, trials=4, space=bad_corner, tell=told.append)
    assignment = search.suggest("a")["assignment"]
    assert assignment["name"] == "0003"
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING]
    reasons = [trial.user_attrs.get(REASON) for trial in study.get_trials()]
    assert reasons[0] == "the space raised ZeroDivisionError: no width for densenet"
    assert "no_such" in reasons[1]
    assert reasons[2:] == ["the space gave it up: too slow here", None]
    assert [text.partition(":")[0] for text in told] == [f"trial {n:04d} did not begin" for n in range(3)]


def test_a_search_in_which_every_point_is_refused_ends(study):
    def never(trial):
        trial.suggest_float(RATE, 0, 1)
        raise RuntimeError

    assert searcher(study, space=never, trials=5).suggest("a") == "FINISHED"
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL] * 5
    assert study.get_trials()[0].user_attrs[REASON] == "the space raised RuntimeError"


def test_a_study_that_cannot_be_written_is_no_fault_of_the_point(study):
    def fails(trial):
        raise StorageError(28, "No space left on device")

    search = searcher(study, space=fails, trials=5)
    assert search.suggest("a") == "FINISHED"
    assert search.broken == "cannot write the study: No space left on device"
    assert len(study.get_trials()) == 1


def test_a_space_is_refused_at_start_only_if_every_point_is():
    assert 0 < len(check_space(bad_corner, BASE).refused) < 30
    assert check_space(bad_corner, BASE).always == {"model.name", RATE}
    with pytest.raises(
        UserError,
        match="all of 30 random points of the space are refused; the first: the space raised KeyError: 'x'",
    ):
        check_space(lambda trial: {}["x"], BASE)


def test_choices_that_depend_on_another_value_are_refused_in_one_line():
    def dependent(trial):
        deep = trial.suggest_categorical("objective.name", ["supcon", "l1"]) == "l1"
        names = ["resnet18", "densenet"] if deep else ["resnet18"]
        return {"model.name": trial.suggest_categorical("model.name", names)}

    with pytest.raises(
        UserError, match=r"setting 'model.name' has to be one of .* and one of .*another name"
    ) as refused:
        check_space(dependent, BASE)
    assert "\n" not in str(refused.value)


def test_a_published_configuration_that_the_space_refuses_lies_outside(tmp_path):
    def space(trial):
        rate = trial.suggest_float(RATE, 1e-6, 1)
        if rate < 1e-3:
            raise ValueError("too slow")
        return {RATE: rate}

    assert published_parameters(space, BASE) is None
    with pytest.raises(OutsideSpaceError, match="too slow"):
        point_of(space, {RATE: 1e-4})
    (tmp_path / "mine.yaml").write_text(json.dumps([{RATE: 1e-2}, {RATE: 1e-4}]))
    with pytest.raises(UserError, match=r"entry 2 of .*mine.yaml: the space raised ValueError: too slow"):
        read_points(tmp_path / "mine.yaml", space)


def test_a_grid_has_its_refused_points_too():
    names = [point["model.name"] for point in grid_of(bad_corner, 1)]
    assert names == ["resnet18", "densenet", "no_such", "slow"]
    assert len(grid_points(bad_corner, 1, 0)) == 4


def test_a_trial_that_stands_in_has_the_methods_of_a_trial(study):
    """Also the old ones, with Optuna's own warning; pinned or not."""

    def old(trial):
        trial.set_user_attr("mine", trial.number)
        trial.report(1.0, step=0)
        return {
            RATE: trial.suggest_loguniform(RATE, 1e-5, 1e-2),
            "views.noise": trial.suggest_uniform("views.noise", 0, 0.1),
            "views.crop": trial.suggest_discrete_uniform("views.crop", 0.5, 1.0, 0.25),
            "optimiser.weight_decay": len(trial.user_attrs) * 1e-5 if not trial.should_prune() else 0,
        }

    public = {name for name in dir(optuna.trial.Trial) if not name.startswith("_")}
    lacking = public - set(dir(Asked)) - {"study", "relative_params"}
    assert not lacking
    with pytest.warns(FutureWarning, match="suggest_loguniform has been deprecated"):
        assert check_space(old, BASE).always == {RATE, "views.noise", "views.crop"}
    trial = study.ask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        proposed = pin(old, {"views.noise": 0.07, RATE: 1e-3})(trial)
    assert proposed["views.noise"] == 0.07
    assert proposed[RATE] == 1e-3
    assert set(trial.params) == {"views.crop"}
    assert trial.user_attrs == {"mine": 0}
