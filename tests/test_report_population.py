"""What a report says of a population, against a run whose members, exchanges and values are written by hand."""

import io
import json
from pathlib import Path

import pytest
from fake_population import CELLS, EPOCHS, PIECES, VALUES, make_population_run
from fake_run import make_run
from matplotlib.patches import StepPatch
from matplotlib.text import Annotation
from rich.console import Console

from core.report.answer.findings import caveats, states
from core.report.answer.honesty import schedule_line
from core.report.answer.population import (
    FOLLOWED,
    FoundSchedule,
    course_texts,
    exchange_table,
    found_in_words,
    found_schedule,
    members,
)
from core.report.answer.record import NothingToShow, RunRecord, read_run
from core.report.answer.tables import leaderboard, print_leaderboard, winner_beside_published
from core.report.figures import population as population_figure
from core.report.figures import search as figures
from core.report.page import OF_POPULATIONS, draw_all, render
from core.run_names import FOUND
from distributed.search.population_methods import CHANGEABLE

FOLLOWED_VALUES = (12.0, 9.0, 7.6, 6.6, 6.0, 5.6)
"""Of member 0 in epochs 1 and 2, of member 1 in 3 and 4, of member 2 in 5 and 6."""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(make_population_run(tmp_path_factory.mktemp("runs") / "population"))


@pytest.fixture(scope="module")
def found(record: RunRecord) -> FoundSchedule:
    schedule = found_schedule(record)
    assert schedule is not None
    return schedule


def test_words_exist_for_every_setting_that_a_population_changes() -> None:
    assert tuple(FOLLOWED) == CHANGEABLE


def test_a_course_says_from_which_epoch_on_each_value_holds(found: FoundSchedule) -> None:
    assert found.course("objective.temperature") == [(1, 0.1), (3, 0.07), (5, 0.05)]
    assert found.course("optimiser.learning_rate") == [(1, 1e-3), (5, 5e-4)]
    assert found.course("objective.width") == [(1, 2.0)]
    assert found.course("optimiser.decay") == []  # a shape of its own
    assert found.course("objective.temperature.values") == []
    assert found.followed == [(0, 2), (1, 4), (2, 6)]


@pytest.mark.parametrize("epochs", [2, 7, 50, 1000])
def test_a_change_after_any_epoch_is_told_as_beginning_with_the_next(epochs: int) -> None:
    for after in range(1, epochs):
        pieces = {"shape": "piecewise", "values": [0.1, 0.2], "until": [after / epochs]}
        settings = {"training": {"epochs": epochs}, "objective": {"temperature": pieces}}
        assert FoundSchedule(1, 0, settings, []).course("objective.temperature") == [
            (1, 0.1),
            (after + 1, 0.2),
        ]


def test_the_schedule_in_words_is_whole_or_short_enough_for_a_table(record: RunRecord) -> None:
    changed = "learning rate 1e-3 → 5e-4 (epoch 5), temperature 0.1 → 0.07 (epoch 3) → 0.05 (epoch 5)"
    assert found_in_words(record) == changed
    pieces = {"shape": "piecewise", "values": [0.1, 0.2, 0.3, 0.4], "until": [0.1, 0.2, 0.3]}
    often = FoundSchedule(1, 0, {"training": {"epochs": 10}, "objective": {"temperature": pieces}}, [])
    assert (
        course_texts(often)["objective.temperature"] == "0.1 → 0.2 (epoch 2) → 0.3 (epoch 3) → 0.4 (epoch 4)"
    )
    assert course_texts(often, short=True)["objective.temperature"] == "0.1 → … → 0.4 (epoch 4)"


def test_the_leaderboard_says_what_was_found_and_who_was_a_member(record: RunRecord) -> None:
    table = leaderboard(record.trials, found=found_in_words(record, 7)).set_index("trial")
    assert table.loc[6, "what"] == f"{FOUND}: {found_in_words(record)}"
    assert table.loc[6, "value"] == "6.40 ± 1.13"  # of 5.6 and 7.2
    assert table.loc[5, "what"] == "published: τ 0.1, lr 1e-4"
    assert table.loc[2, "what"] == "member, began with: τ 0.3, lr 5e-4"
    assert table.loc[2, "state"] == "member, epoch 6"
    assert table["rank"].tolist() == ["1", "2", "–", "–", "–", "–", "–"]
    console = Console(width=100, file=io.StringIO())
    print_leaderboard(console, record)
    told = " ".join(console.file.getvalue().split())
    assert "nothing was searched" not in told
    assert "The mean of trial 6 includes the cell in which its schedule was chosen." in told


def test_the_winner_beside_the_published_one_shows_its_courses(record: RunRecord) -> None:
    table = winner_beside_published(record).set_index("setting")
    assert table.loc["objective.temperature"].tolist() == ["0.1", "0.1 → 0.07 (epoch 3) → 0.05 (epoch 5)"]
    assert table.loc["optimiser.learning_rate"].tolist() == ["1e-4", "1e-3 → 5e-4 (epoch 5)"]


def test_the_cell_of_the_choice_is_told_apart_from_the_others(record: RunRecord) -> None:
    line = schedule_line(record)
    assert "Trial 6 follows the schedule of member 2" in line
    assert "the best of 5 members" in line
    assert f"{CELLS[6][0]:.2f} there, {CELLS[6][1]:.2f} in the other cell" in line
    assert f"(published: {CELLS[5][0]:.2f} and {CELLS[5][1]:.2f})" in line
    assert "The refits and the held-out subjects had no part in the choice." in line
    assert line in caveats(record)


def test_members_are_not_called_stopped_early(record: RunRecord) -> None:
    assert states(record) == "2 completed, 5 evolved in one cell"
    assert not any("stopped early" in line for line in caveats(record))
    labels = [line.get_label() for line in figures.optimisation_history(record).axes[0].lines]
    assert "member, one cell" in labels
    assert "pruned" not in labels
    curves = figures.learning_curves(record).axes[0]
    assert not [line for line in curves.lines if line.get_marker() == "x"]


def test_every_exchange_is_listed_also_one_that_left_no_descendant(record: RunRecord) -> None:
    rows = [tuple(row) for row in exchange_table(record).itertuples(index=False)]
    assert rows == [
        (2, 1, 0, "temperature to 0.07"),
        (2, 4, 3, ""),
        (4, 2, 1, "temperature to 0.05, learning rate to 5e-4"),
        (4, 4, 1, "learning rate to 8e-4"),
    ]


def test_the_path_of_the_best_weights_is_what_the_schedule_repeated(
    record: RunRecord, found: FoundSchedule
) -> None:
    values = {member.number: member.intermediate_values for member in members(record)}
    path = population_figure.followed_values(found, values)
    assert path == dict(enumerate(FOLLOWED_VALUES, start=1))
    assert record.study is not None
    assert path == record.study.get_trials()[6].intermediate_values


def test_members_are_drawn_with_an_arrow_from_what_was_given_up_to_what_was_taken(record: RunRecord) -> None:
    axes = population_figure.population(record).axes[0]
    arrows = [each for each in axes.texts if isinstance(each, Annotation) and each.arrow_patch is not None]
    ends = sorted((each.xy[0], float(each.xyann[1]), float(each.xy[1])) for each in arrows)
    assert ends == [(2, 11.0, 9.0), (2, 14.0, 10.0), (4, 8.0, 6.6), (4, 9.5, 6.6)]
    (best,) = (line for line in axes.lines if line.get_label() == "the best weights")
    assert tuple(best.get_ydata()) == FOLLOWED_VALUES
    begun_by_donor = [line for line in axes.lines if list(line.get_xdata()[:1]) == [4]]
    assert sorted(list(line.get_ydata()) for line in begun_by_donor) == [[6.6, 6.0, 5.6], [6.6, 6.7, 6.5]]
    assert axes.get_ylim()[1] < max(
        value for own in VALUES for value in own
    )  # one wild epoch flattens nothing


def test_the_schedule_is_drawn_in_steps_that_change_where_it_did(record: RunRecord) -> None:
    figure = population_figure.steps(record)
    drawn = {}
    for axes in figure.axes:
        (patch,) = (each for each in axes.patches if isinstance(each, StepPatch))
        assert list(patch.get_data().edges) == list(range(EPOCHS + 1))
        drawn[axes.get_title(loc="left")] = list(patch.get_data().values)
    assert drawn["temperature"] == [0.1, 0.1, 0.07, 0.07, 0.05, 0.05]
    assert drawn["learning rate"] == [1e-3] * 4 + [5e-4] * 2
    assert drawn["kernel width (years): constant 2"] == [2.0] * EPOCHS


def test_a_shape_of_its_own_is_drawn_beside_what_the_population_changed() -> None:
    objective = {"temperature": {"shape": "linear", "start": 0.5, "end": 0.1}}
    rate = {"shape": "piecewise", "values": [1e-5, 1e-2], "until": [0.5]}
    settings = {"training": {"epochs": 4}, "objective": objective, "optimiser": {"learning_rate": rate}}
    found = FoundSchedule(1, 0, settings, [])
    assert found.every_epoch("objective.temperature") == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert found.every_epoch("optimiser.learning_rate") == [1e-5, 1e-5, 1e-2, 1e-2]
    assert found.every_epoch("objective.width") == []


def test_the_page_of_a_population_has_its_section_and_says_what_was_found(record: RunRecord) -> None:
    page = render(record)
    drawn = {name: str(drawing.svg) for name, drawing in draw_all(record).items() if drawing.svg is not None}
    assert page.count("<svg ") == len(drawn)
    assert OF_POPULATIONS.keys() < drawn.keys()
    assert 'id="figure-population"' in page
    assert 'id="figure-steps"' in page
    assert "nothing was searched" not in page
    assert '<a href="#population">' in page
    assert "0.1 → 0.07 (epoch 3) → 0.05 (epoch 5)" in page
    assert page.count("in the other cell") == 2  # beside the schedule, and among the limits
    assert "after epoch 4 member 2 went on from member 1" in drawn["population"]


def test_a_run_without_a_population_has_no_such_section(tmp_path: Path) -> None:
    page = render(read_run(make_run(tmp_path / "run", trials=3)))
    assert "population" not in page
    assert "schedule found" not in page


def test_without_its_study_the_page_says_why_nothing_is_drawn(tmp_path: Path) -> None:
    run = make_population_run(tmp_path / "run")
    (run / "study.journal").unlink()
    record = read_run(run)
    for draw in (population_figure.population, population_figure.steps):
        with pytest.raises(NothingToShow, match="study is absent"):
            draw(record)
    assert (
        leaderboard(record.trials, found=found_in_words(record))["what"][0] == f"{FOUND}: see schedule.yaml"
    )
    assert schedule_line(record) == ""
    assert "Not drawn: no schedule was found" in render(record)


def test_a_schedule_that_changed_nothing_says_so(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.study is not None
    trials = record.study.get_trials()
    settings = json.loads(trials[6].user_attrs["settings"])
    for name in PIECES:
        block, key = name.split(".")
        settings[block][key] = settings[block][key]["values"][0]
    trials[6].user_attrs["settings"] = json.dumps(settings)
    monkeypatch.setattr(record.study, "get_trials", lambda **kwargs: trials)
    assert found_in_words(record) == "as member 2 throughout, τ 0.1, lr 1e-3"
    assert "No setting changed on the way" in render(record)
