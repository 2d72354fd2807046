"""Budgets: what they count, whom they stop, and when the terminator says that it is enough."""

import dataclasses
import io
import math
import time
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from of_age import MAE
from optuna.terminator import report_cross_validation_scores
from rich.console import Console

from core.errors import UserError
from distributed.search.budget import FEWEST_TRIALS, Budget, judge_improvement, make_terminator
from distributed.sweeps.display import Display, TensorBoard
from search_spaces import load_space


def result(name="0000", seconds=0.0, **more):
    return {"name": name, "spent_seconds": seconds, "fold": 0, "done": False} | more


def test_the_clock_of_a_budget_starts_with_the_first_result():
    budget = Budget(seconds=1000.0)
    assert budget.remaining() == ["1000 s"]
    assert budget.deadline is None
    assert not budget("a", result())
    assert budget.deadline is not None
    assert not budget.spent


def test_a_spent_budget_stops_trials_but_neither_refits_nor_what_is_done():
    spent = Budget(deadline=0.0, seconds=5.0, beyond={"repeated"})
    assert spent("a", result())
    assert not spent("a", result(done=True))
    assert not spent("a", result(fold=-1))
    assert not spent("repeated", result())
    assert not Budget()("a", result())
    assert spent.reason == "the time budget of 5 s was used up"


def test_a_trial_may_finish_its_cell_when_little_is_left_of_it():
    """Of 100 s one tenth is near: 9 of 12 epochs of 3 s are done, and 9 s are left; of 8 epochs 12 s are."""
    spent = Budget(deadline=0.0, seconds=100.0)
    assert not spent("a", result(seconds=63.0, epoch=9, progress=9 / 12, epochs=12 + 9))
    assert spent("a", result(seconds=60.0, epoch=8, progress=8 / 12, epochs=12 + 8))
    assert spent(
        "a", result(seconds=72.0, epoch=12, progress=1.0, epochs=24)
    )  # the cell is done: no next one
    hours = Budget(accelerator_hours=0.02, devices=2.0, used={"0001": 100.0})
    assert not hours(
        "a", result(seconds=30.0, epoch=10, progress=10 / 11, epochs=10)
    )  # 3 s of 2 devices are near
    assert hours("a", result(seconds=30.0, epoch=5, progress=5 / 11, epochs=5))


def test_one_trial_is_completed_whatever_the_budget_says():
    spent = Budget(deadline=0.0, seconds=5.0, completes="0000", epochs=24)
    assert not spent("a", result("0000", 9.0, epochs=1, progress=0.1, epoch=1))
    assert spent("b", result("0001", 9.0, epochs=1, progress=0.1, epoch=1))


def told_twice(budget, name, spent, epochs=1):
    """The second answer is `spent` more than the first: the first epoch also warms up, and does not count."""
    for done in (0, 1):
        more = {"epochs": epochs + done, "epoch": epochs + done, "progress": (epochs + done) / 100}
        budget("a", result(name, 30.0 + spent * done, **more))


@pytest.mark.parametrize(("each", "refused"), [(3.9, False), (6.0, True)])
def test_a_sweep_whose_first_trial_ends_far_beyond_the_budget_is_refused_with_the_figures(each, refused):
    """22 more epochs of 3.9 s are about 86 s, of 6 s 132 s; twice the budget of 50 s is 100 s."""
    budget = Budget(seconds=50.0, completes="0000", epochs=24)
    told_twice(budget, "0000", each)
    assert (budget.hopeless is not None, budget.interrupted) == (refused, refused)
    if refused:
        assert "(22 more epochs of 6 s) needs about 132 s in all, more than 2 times" in budget.hopeless
        assert "budget of 50 s; give --time-budget 133 or more" in budget.hopeless


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        (
            Budget(seconds=50.0, completes="0000", epochs=24, elapsed=60.0),
            22 * 2.0 + 60,
        ),  # after the L1 baseline
        (Budget(seconds=50.0, completes="l1-0000", epochs=24, later_epochs=24, share=0.1), (22 + 24) * 2.5),
        (
            Budget(seconds=50.0, epochs=24, later_epochs=24),
            24 * 4.5,
        ),  # members of a population, which may be cut
    ],
)
def test_everything_that_is_completed_in_any_case_is_counted(budget, seconds):
    """Of two trials of the same length each alone would fit; 1 s less and the sweep is begun."""
    each = (seconds - budget.elapsed) / (22 * bool(budget.completes) + budget.later_epochs)
    begun = dataclasses.replace(budget, first_answers={}, seconds=seconds / 2 + 1)
    told_twice(begun, budget.completes or "0003", each)
    assert begun.hopeless is None
    told_twice(budget, budget.completes or "0003", each)
    assert f"about {seconds:.0f} s in all" in budget.hopeless


def test_after_a_step_back_in_time_the_next_epoch_is_measured_alone():
    """A member took the weights of one that had used less time: 8, 5, then 11 s are an epoch of 6 s, not two of 1.5."""
    budget = Budget(seconds=50.0, epochs=24, later_epochs=24)
    for done, spent in enumerate((8.0, 5.0, 11.0), start=1):
        budget("a", result("0003", spent, epochs=done, epoch=done, progress=done / 100))
    assert "(24 more epochs of 6 s)" in budget.hopeless


def test_a_sweep_that_was_found_to_fit_is_not_refused_later():
    budget = Budget(seconds=50.0, completes="0000", epochs=24)
    told_twice(budget, "0000", 1.0)
    told_twice(budget, "0001", 100.0)
    assert budget.hopeless is None


def test_the_advice_inside_a_nested_search_is_about_what_the_user_gave():
    """Five hold-outs share 250 s; each needs 132 s."""
    budget = Budget(seconds=50.0, completes="0000", epochs=24, time_shares=5)
    told_twice(budget, "0000", 6.0)
    said, _, advice = budget.hopeless.partition("; give --time-budget ")
    assert said.endswith("the time budget of 50 s that each of 5 hold-outs has")
    assert 660 <= int(advice.removesuffix(" or more")) <= 662
    hours = Budget(accelerator_hours=0.01, completes="0000", epochs=24, hour_shares=5)
    told_twice(hours, "0000", 6.0)
    needed = 5 * (36 + 22 * 6) / 3600
    assert f"give --accelerator-hours {needed:.2g} or more" in hours.hopeless


def test_accelerator_hours_of_the_first_trial_are_projected_with_what_it_used_before():
    budget = Budget(accelerator_hours=0.05, devices=2.0, completes="0000", epochs=24)
    budget("a", result("0000", 100.0, epochs=10, progress=0.5, epoch=10))
    budget("a", result("0000", 110.0, epochs=11, progress=0.6, epoch=11))
    hours = (110 + 13 * 10) * 2 / 3600
    assert (
        f"needs about {hours:.2g} CPU-hours in all, more than 2 times the budget of 0.05" in budget.hopeless
    )


def test_accelerator_hours_are_those_of_all_trials_times_the_devices_of_a_slot():
    budget = Budget(accelerator_hours=1.0, devices=4.0, unit="GPU", used={"0000": 1200.0})
    assert not budget("b", result("0001", 100.0))
    assert not budget("b", result("0001", 300.0))  # a trial says what it has used in all
    assert budget.hours_used == pytest.approx((1200 + 4 * 300) / 3600)
    assert budget.remaining() == ["0.333 GPU-hours"]
    assert budget("c", result("0002", 300.0))
    assert budget.is_over
    assert budget.reason == "1 GPU-hours used of 1"


def study_of(trials, learning, noise=0.3):
    """A study of the brain-age space whose random points matter (`learning`), or make hardly a difference."""
    space, _ = load_space("brain_age")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    generator = np.random.default_rng(0)
    for _ in range(trials):
        trial = study.ask()
        settings = space(trial)
        mean = 5 + learning * abs(math.log10(settings["optimiser.learning_rate"] / 3e-4))
        cells = list(mean + generator.normal(0, noise, 5))
        report_cross_validation_scores(trial, cells)
        study.tell(trial, float(np.mean(cells)))
    return study


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_terminator_waits_for_enough_trials_and_tells_noise_from_promise():
    terminator = make_terminator("regret", 0, 1, 5)
    assert not judge_improvement(terminator, study_of(FEWEST_TRIALS - 1, 0.0, noise=3.0))
    # what is left to gain drowns in the noise of the cells; and where it does not
    assert judge_improvement(terminator, study_of(30, 0.01, noise=3.0))
    assert not judge_improvement(terminator, study_of(30, 3.0, noise=0.01))
    assert not judge_improvement(None, study_of(30, 0.01, noise=3.0))


@pytest.mark.parametrize(
    ("name", "objectives", "shared", "message"),
    [
        ("regrett", 1, 3, "did you mean 'regret'"),
        ("regret", 2, 3, "defined for one objective, and 2"),
        ("emmr", 1, 0, "needs a setting that every configuration has"),
    ],
)
def test_a_terminator_that_cannot_judge_is_refused(name, objectives, shared, message):
    with pytest.raises(UserError, match=message):
        make_terminator(name, 0, objectives, shared)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_left_is_shown_live_in_a_terminal_and_in_a_line_per_trial_elsewhere(is_terminal):
    # As that of the commands: brackets are text, and colours are none of it.
    console = Console(
        file=io.StringIO(), force_terminal=is_terminal, width=120, markup=False, color_system=None
    )
    budget = Budget(seconds=60.0, accelerator_hours=2.0, unit="GPU", used={"0000": 3600.0})
    display = Display(console, 5, 2, budget, MAE["mae"])
    settings = {"objective": {"name": "supcon"}}
    trial = SimpleNamespace(
        trial_id="a",
        config={"assignment": {"name": "0000", "settings": settings, "cells": [{"fold": 0, "seed": 0}]}},
    )
    display.on_trial_start(0, [], trial)
    display.on_trial_result(0, [], trial, {"value": 4.25, "epochs": 2, "fold": 0, "finished": True})
    display.on_trial_complete(0, [], trial)
    if is_terminal:
        assert console.file.getvalue() == ""
        console.print(display._render())
        shown = console.file.getvalue()
        assert "left: 4 trials, 60 s, 1 GPU-hours" in shown
        assert "[" not in shown.replace("\x1b[", "")
        assert "best 4.25 years (trial 0000)" in shown
    else:
        expected = (
            "trial 0000 finished after 2 epochs, MAE 4.25 years  best 4.25 years (trial 0000)  left: 60 s, "
        )
        assert console.file.getvalue().splitlines() == [f"{expected}1 GPU-hours"]


def test_a_long_training_is_told_of_where_nobody_sees_the_live_display(monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    display = Display(console, 5, 20, Budget(), MAE["mae"])
    trial = SimpleNamespace(
        trial_id="a",
        config={"assignment": {"name": "0000", "settings": {}, "cells": [{"fold": 0, "seed": 0}]}},
    )
    answer = {"value": 4.25, "epochs": 2, "epoch": 2, "fold": 1, "seed": 0, "finished": False}
    now = time.monotonic()
    for seconds, lines in ((29, 0), (31, 1), (59, 1), (62, 2)):
        monkeypatch.setattr("distributed.sweeps.display.time.monotonic", lambda at=now + seconds: at)
        display.on_trial_result(0, [], trial, answer)
        assert len(console.file.getvalue().splitlines()) == lines
    assert "0000" in console.file.getvalue()
    assert "fold 1, seed 0, epoch 2/20  MAE 4.25 years" in console.file.getvalue()


def test_the_end_of_a_slots_workers_does_not_end_the_sweep_with_them(tmp_path):
    board = TensorBoard(tmp_path, ["views.noise"], ["value", "loss"], 1)
    trial = SimpleNamespace(
        trial_id="a", config={"assignment": {"name": "0000", "settings": {"views": {"noise": 0.1}}}}
    )
    ended = {"value": math.nan, "failed": "its workers ended: killed", "finished": False, "done": True}
    board.on_trial_result(0, [], trial, ended)
    board.on_trial_complete(0, [], trial)
    assert list((tmp_path / "0000").glob("events*"))
