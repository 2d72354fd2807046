"""The study of a run: the user's own points, and what becomes of its trials in another space."""

import warnings

import optuna
import pytest
from of_age import MAE
from optuna.trial import TrialState

from core.config import resolve
from core.errors import UserError
from distributed.search.study import (
    best_trial,
    carry_over,
    check_space,
    enqueue,
    open_study,
    read_points,
    report_cells,
    report_value,
)
from search_spaces import pin, published

BASE = resolve(published("brain_age")).model_dump(mode="json")


def space(trial):
    rate = trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    method = trial.suggest_categorical("objective.name", ["supcon", "exponential"])
    if method == "supcon":
        trial.suggest_float("objective.bin_width", 1.0, 10.0)
    assert rate
    return dict(trial.params)


def points(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return read_points(tmp_path / "mine.yaml", space)


def test_a_member_of_a_population_is_no_trial_of_the_point_with_which_it_began(tmp_path):
    study = open_study(tmp_path / "study.journal", "tpe", 0, MAE)
    point = {"optimiser.learning_rate": 1e-3, "objective.name": "exponential"}
    assert enqueue(study, [point], "enqueued") == 1
    study.ask().set_user_attr("label", "member of the population")
    assert enqueue(study, [point], "published") == 1
    assert enqueue(study, [point], "published") == 0


def test_own_configurations_are_tried_next_in_their_order_and_once(tmp_path):
    mine = points(
        tmp_path,
        """
- {optimiser.learning_rate: 1e-3, objective.name: exponential}
- optimiser: {learning_rate: 0.002}
  objective: {name: supcon, bin_width: 4}
""",
    )
    study = open_study(tmp_path / "study.journal", "tpe", 0, MAE)
    assert enqueue(study, mine, "enqueued") == 2
    assert (
        enqueue(study, [*mine, {"optimiser.learning_rate": 0.01, "objective.name": "exponential"}], None) == 1
    )
    asked = []
    for _ in range(3):
        trial = study.ask()
        asked.append(space(trial))
        assert trial.params == asked[-1]
    assert asked[:2] == [
        {"optimiser.learning_rate": 1e-3, "objective.name": "exponential"},
        {"optimiser.learning_rate": 0.002, "objective.name": "supcon", "objective.bin_width": 4.0},
    ]
    assert [trial.user_attrs.get("label") for trial in study.trials] == ["enqueued", "enqueued", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {objective.name: supcon}",
            r"entry 1 of .*mine.yaml: setting 'optimiser.learning_rate' is missing",
        ),
        (
            "- {optimiser.learning_rate: 1e-3, objective.name: exponential}\n"
            "- {optimiser.learning_rate: 1.0, objective.name: exponential}",
            r"entry 2 of .*: setting 'optimiser.learning_rate' is 1.0, which is not a number from 0.0001 to 0.01",
        ),
        (
            "- {optimiser.learning_rate: 1e-3, objective.name: simclr}",
            r"'objective.name' is 'simclr', which is not one of 'supcon', 'exponential'",
        ),
        (
            "- {optimiser.learning_rate: 1e-3, objective.name: exponential, objective.bin_width: 2}",
            r"'objective.bin_width' is not searched here",
        ),
        ("objective.name: supcon", "must hold a list of configurations, got dict"),
        ("- 3", "entry 1 of .* must be a mapping"),
        ("- {a: [", "cannot read"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_it(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        points(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.fixture
def old(tmp_path):
    """Two completed trials of each method, a pruned one, one interrupted in each method, one that waits."""
    study = open_study(tmp_path / "study.journal", "random", 0, MAE)
    kinds = ["supcon", "exponential", "supcon", "exponential", "supcon", "exponential", "supcon"]
    for number, method in enumerate(kinds):
        point = {"optimiser.learning_rate": 1e-3 * (number + 1), "objective.name": method}
        enqueue(study, [point | ({"objective.bin_width": 2.0} if method == "supcon" else {})], None)
    for number in range(7):
        trial = study.ask()
        space(trial)
        report_value(trial, 9.0 - number, 1)
        trial.set_user_attr("settings", f"those of {number}")
        if number < 4:
            study.tell(trial, 9.0 - number)
        if number == 4:
            study.tell(trial, state=TrialState.PRUNED)
    enqueue(study, [{"optimiser.learning_rate": 2e-4, "objective.name": "exponential"}], "enqueued")
    return study


def test_narrowing_keeps_every_number_and_value_and_learns_from_what_lies_inside(old, tmp_path):
    narrow = pin(space, {"objective.name": "supcon"})
    fresh = open_study(tmp_path / "study.journal", "tpe", 0, MAE, name="brainsweep-2")
    carried = carry_over(old, fresh, narrow, {"objective.name": "supcon"})
    assert (carried.inside, carried.outside, carried.dropped) == (4, [1, 3, 5], 1)
    before, after = old.get_trials(), fresh.get_trials()
    assert [trial.number for trial in after] == list(range(7))
    assert [trial.values for trial in after] == [trial.values for trial in before[:7]]
    assert after[2].params == {"optimiser.learning_rate": 0.003, "objective.bin_width": 2.0}
    assert after[3].params == {}
    assert after[3].user_attrs["outside"] == before[3].params
    assert [trial.state for trial in after[4:]] == [TrialState.PRUNED, TrialState.PRUNED, TrialState.RUNNING]
    assert "outside" in after[5].user_attrs["reason"]
    assert (best_trial(old).number, best_trial(fresh).number) == (3, 2)  # 3 was better, and is outside
    again = optuna.Trial(fresh, after[6]._trial_id)  # what was interrupted goes on with its own values
    assert narrow(again)["optimiser.learning_rate"] == before[6].params["optimiser.learning_rate"]
    fresh.tell(again, 1.0)
    for _ in range(12):
        trial = fresh.ask()
        assert narrow(trial)["objective.name"] == "supcon"
        fresh.tell(trial, 5.0)


def test_the_winner_is_the_best_completed_trial_inside_the_space():
    study = optuna.create_study()
    for state, value in [
        ("PRUNED", 1.0),
        ("FAIL", 2.0),
        ("COMPLETE", 5.0),
        ("COMPLETE", 3.0),
        ("RUNNING", 2.5),
    ]:
        trial = study.ask()
        report_value(trial, value, 1)
        if state != "RUNNING":
            study.tell(trial, value if state == "COMPLETE" else None, state=TrialState[state])
    assert study.get_trials()[0].value == 1.0  # Optuna gives a pruned trial its last reported value
    assert best_trial(study).number == 3
    study.add_trial(optuna.trial.create_trial(value=2.0, user_attrs={"outside": {}}))
    assert best_trial(study).number == 3


def test_widening_a_choice_is_another_study_where_optuna_would_refuse(old, tmp_path):
    def wide(trial):
        trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-1, log=True)
        method = trial.suggest_categorical("objective.name", ["supcon", "exponential", "threshold"])
        if method == "supcon":
            trial.suggest_float("objective.bin_width", 1.0, 10.0)
        return dict(trial.params)

    fresh = open_study(tmp_path / "study.journal", "tpe", 0, MAE, name="brainsweep-2")
    carried = carry_over(old, fresh, wide)
    assert carried.outside == []
    seen = set()
    for _ in range(30):
        trial = fresh.ask()
        seen.add(wide(trial)["objective.name"])
        fresh.tell(trial, 5.0)
    assert "threshold" in seen
    old.ask()  # the one that waits
    another = old.ask()
    with pytest.raises(ValueError, match="dynamic value space"):
        wide(another)


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "nsga2"])
def test_a_resumed_sampler_draws_on_and_does_not_begin_again(sampler, tmp_path):
    asked = []
    for _ in range(3):  # three processes
        study = open_study(tmp_path / "study.journal", sampler, 0, MAE)
        for _ in range(4):
            trial = study.ask()
            asked.append(space(trial)["optimiser.learning_rate"])
            study.tell(trial, 5.0)
    assert len(set(asked)) == 12


def test_the_profile_of_a_space_tells_what_every_configuration_has():
    profile = check_space(space, BASE)
    assert profile.always == {"optimiser.learning_rate", "objective.name"}
    assert profile.conditional == ["objective.bin_width"]
    assert profile.numbers() == ["optimiser.learning_rate"]
    assert profile.as_json() == check_space(space, BASE).as_json()
    assert profile.as_json() != check_space(pin(space, {"objective.name": "supcon"}), BASE).as_json()


def test_the_cells_of_a_trial_are_kept_for_optunas_terminator_without_a_word():
    study = optuna.create_study()
    trial = study.ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_cells(trial, [3.0, 5.0])
    assert [3.0, 5.0] in study.get_trials()[0].system_attrs.values()
