"""Settings: dotted names, merging, and errors that help."""

import itertools

import optuna
import pytest

from core.config import flatten, known_names, merge, parse_changes, resolve
from core.errors import UserError
from search_spaces import SPACES, load_space, published


def test_published_brain_age_settings_are_those_of_the_paper():
    settings = resolve(published("brain_age"))
    assert (settings.model.name, settings.model.width) == ("resnet18", 1.0)
    assert settings.objective.name == "exponential"
    assert (settings.objective.kernel, settings.objective.width(0.5)) == ("rbf", 2.0)
    assert settings.objective.temperature(0.3) == 0.1
    assert (settings.optimiser.learning_rate, settings.optimiser.weight_decay) == (1e-4, 5e-5)
    assert (settings.training.epochs, settings.training.batch_size) == (50, 32)


def test_resolved_settings_survive_json_and_resolve_to_themselves():
    settings = resolve(published("brain_age"))
    assert resolve(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("20", 20), ("null", None), ("true", True), ("adam", "adam"), ("[a, b]", ["a", "b"])],
)
def test_typed_values(text, value):
    assert parse_changes([f"optimiser.learning_rate={text}"]) == {"optimiser.learning_rate": value}


def test_a_setting_may_be_a_schedule():
    changes = parse_changes(["objective.temperature={shape: linear, start: 0.2, end: 0.1}"])
    settings = resolve(merge(published("brain_age"), changes))
    assert settings.objective.temperature(0.5) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("optimiser.learning_rat=1", "did you mean 'optimiser.learning_rate'"),
        ("learning_rate=1", "did you mean 'optimiser.learning_rate'"),
        ("optimiser.learning_rate", "has no '='"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(assignment, said):
    with pytest.raises(UserError, match=said):
        parse_changes([assignment])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.epochs": "many"}, "'training.epochs'.*got 'many'"),
        ({"views.noise": -1}, "'views.noise'.*got -1"),
        ({"objective.name": "suppcon"}, "'objective.name'.*did you mean 'supcon'"),
        ({"objective.name": "supcon", "objective.kernel": "rbf"}, "'objective.kernel' cannot act here"),
        ({"optimiser.momentum": 0.9}, "'optimiser.momentum' cannot act here"),
    ],
)
def test_a_wrong_value_names_setting_and_value_in_one_line(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve(merge(published("brain_age"), changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "optimiser.learning_rate",
        "optimiser.weight_decay",
        "objective.temperature",
        "objective.width",
        "objective.neighbours.end",
    ],
)
def test_a_wrong_piecewise_block_names_its_field_and_what_would_be_right(name):
    """In a setting that may also be a number, too: it is not told to be one."""
    for block, said in (
        ({"values": [0.2, 0.1]}, rf"'{name}\.until': must hold one number fewer than values, which are 2"),
        (
            {"values": [0.2, 0.1], "until": [1.5]},
            rf"'{name}\.until': must rise, .* below 1 .*, got \[1\.5\]$",
        ),
        ({"values": [0.2, "x"], "until": [0.5]}, rf"'{name}\.values\.1': .* a valid number, .* got 'x'$"),
        ({}, rf"'{name}\.values': field required"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(merge(published("brain_age"), {name: {"shape": "piecewise"} | block}))
    right = {"shape": "piecewise", "values": [0.2, 0.1], "until": [0.5]}
    assert flatten(resolve(merge(published("brain_age"), {name: right})).model_dump(mode="json"))[
        f"{name}.values"
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1.0, "'optimiser.learning_rate': input should be greater than 0, got -1.0"),
        ("fast", "'optimiser.learning_rate': input should be a valid number.*got 'fast'"),
        (
            {"shape": "piecewise", "values": [0.1, 0.0], "until": [0.5]},
            "'optimiser.learning_rate': values must be above 0",
        ),
        (
            {"shape": "linear", "start": 1, "end": 2},
            "'optimiser.learning_rate.shape': input should be 'piecewise'",
        ),
    ],
)
def test_a_number_that_may_be_piecewise_is_checked_as_what_it_is(value, said):
    with pytest.raises(UserError, match=said):
        resolve(merge(published("brain_age"), {"optimiser.learning_rate": value}))


def test_another_objective_drops_what_belonged_to_the_old_one():
    merged = merge(published("brain_age"), {"objective.temperature": 0.3, "objective.name": "supcon"})
    assert merged["objective"] == {"name": "supcon", "temperature": 0.3}


def test_the_same_objective_keeps_what_stands_beside_it():
    merged = merge(published("brain_age"), {"objective.name": "exponential", "objective.width": 5.0})
    assert merged["objective"]["kernel"] == "rbf"


def test_the_order_of_changes_does_not_matter():
    changes = {
        "optimiser.decay.end": 0.7, "optimiser.decay.start": 1.0, "optimiser.decay.shape": "cosine",
        "optimiser.name": "sgd", "optimiser.momentum": 0.5,
    }  # fmt: skip
    expected = {"name": "sgd", "momentum": 0.5, "decay": {"shape": "cosine", "start": 1.0, "end": 0.7}}
    for order in itertools.permutations(changes.items()):
        assert merge(published("brain_age"), dict(order))["optimiser"] == expected


def test_no_shape_is_no_block():
    merged = merge(published("brain_age"), {"objective.neighbours.shape": None})
    assert merged["objective"]["neighbours"] is None


def test_merge_leaves_its_input_alone():
    base = published("brain_age")
    merge(base, {"model.width": 0.5, "objective.name": "supcon"})
    assert base == published("brain_age")


@pytest.mark.parametrize("name", SPACES)
def test_every_point_of_a_space_is_a_valid_configuration_and_takes_effect(name):
    space, base = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(100):
        trial = study.ask()
        resolved = flatten(resolve(merge(base, space(trial))).model_dump(mode="json"))
        for setting, value in trial.params.items():
            assert setting in known_names()
            if value is not None:  # a block that is off has no settings of its own
                assert resolved[setting] == value


def test_a_space_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def few(trial):\n    return {'training.epochs': trial.suggest_int('training.epochs', 2, 4)}\n"
    )
    space, base = load_space(f"{file}:few")
    trial = optuna.trial.FixedTrial({"training.epochs": 3})
    assert resolve(merge(base, space(trial))).training.epochs == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("brian_age", "unknown space 'brian_age'; did you mean 'brain_age'"),
        ("nowhere.py:space", "no file nowhere.py"),
    ],
)
def test_an_unknown_space(name, said):
    with pytest.raises(UserError, match=said):
        load_space(name)


def test_an_unknown_function_of_a_space_file(tmp_path):
    (tmp_path / "mine.py").write_text("def few(trial):\n    return {}\n")
    with pytest.raises(UserError, match=r"unknown function .* 'fev'; did you mean 'few'"):
        load_space(f"{tmp_path / 'mine.py'}:fev")


def test_a_space_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "mine.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        load_space(f"{tmp_path / 'mine.py'}:few")
