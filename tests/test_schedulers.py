"""What stops trials early: against laws, Optuna's own pruner, and what a resumed search would have decided."""

import json
import math
from collections import Counter
from itertools import count

import numpy as np
import optuna
import pytest
from of_age import MAE, assign
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from core.errors import UserError
from core.run_names import AFTER_CELLS, CELL_VALUES, LABEL, PUBLISHED, SETTINGS
from distributed.run.assignment import METRIC, identity, trial_name
from distributed.search.budget import Budget
from distributed.search.schedulers import (
    SCHEDULERS,
    TIME,
    Hyperband,
    Wilcoxon,
    make_scheduler,
    pruner_threshold,
    replay,
    spares,
)
from distributed.search.study import hear_missed, progress_reader, report_missing
from distributed.sweeps.tables import accelerator_seconds


class Trial:
    """What Tune shows of a trial: every one of them has an id of its own, also if it continues an earlier one."""

    ids = count()

    def __init__(self, name):
        self.trial_id = f"tune-{next(self.ids)}"
        self.config = {"assignment": {"name": trial_name(name) if isinstance(name, int) else name}}


def run(scheduler, number, curve, report=lambda epochs, value: None, *, done=0):
    """Epochs until `scheduler` stops the trial, or all; it continues after `done` epochs."""
    trial = Trial(number)
    scheduler.on_trial_add(None, trial)
    for epochs, value in enumerate(curve[done:], start=done + 1):
        report(epochs, value)
        shown = {TIME: epochs, METRIC: value}
        if scheduler.on_trial_result(None, trial, shown) != TrialScheduler.CONTINUE or epochs == len(curve):
            scheduler.on_trial_complete(None, trial, shown)
            return epochs
    return None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_scheduler_decides_like_one_that_saw_everything(name):
    """A law: replaying finished trials leaves the scheduler in the state it would have been in."""
    generator = np.random.default_rng(0)
    curves = generator.uniform(5, 15, (16, 1)) * np.linspace(1.5, 1, 8)
    study = optuna.create_study()
    lived = make_scheduler(name, epochs=4, cells=2)
    for number, curve in enumerate(curves[:8]):
        trial = study.ask()
        run(lived, number, curve, lambda epochs, value, trial=trial: trial.report(value, epochs))
        study.tell(trial, state=TrialState.PRUNED)
    resumed = make_scheduler(name, epochs=4, cells=2)
    replay(resumed, study.get_trials())
    decided = [
        (run(lived, number, curve), run(resumed, number, curve))
        for number, curve in enumerate(curves[8:], start=8)
    ]
    assert all(before == after for before, after in decided)
    if name != "none":
        assert min(before for before, _ in decided) < 8  # the law is not about nothing


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_search_that_is_killed_decides_like_one_that_was_not(name):
    """A law, for every moment: four trials run side by side, and continue under other ids in another process."""
    generator = np.random.default_rng(2)
    curves = [list(curve) for curve in generator.uniform(5, 15, (12, 1)) * np.linspace(1.5, 1, 8)]
    for killed_after in range(1, 8):
        study, lived = optuna.create_study(), make_scheduler(name, epochs=4, cells=2)
        asked = [study.ask() for _ in curves[:8]]
        for number in range(4):
            run(
                lived,
                number,
                curves[number],
                lambda epochs, value, to=asked[number]: to.report(value, epochs),
            )
            study.tell(asked[number], state=TrialState.PRUNED)
        going = []
        for number in range(4, 8):
            trial, decisions = Trial(number), []
            lived.on_trial_add(None, trial)
            for epochs in range(1, killed_after + 1):
                value = curves[number][epochs - 1]
                asked[number].report(value, epochs)
                decisions.append(lived.on_trial_result(None, trial, {TIME: epochs, METRIC: value}))
                if decisions[-1] != TrialScheduler.CONTINUE:
                    lived.on_trial_complete(None, trial, {TIME: epochs, METRIC: value})
                    study.tell(asked[number], state=TrialState.PRUNED)
                    break
            else:
                going.append(number)
        resumed = make_scheduler(name, epochs=4, cells=2)
        replay(resumed, study.get_trials())
        for scheduler in (lived, resumed):
            scheduler.decided = [
                run(scheduler, number, curves[number], done=killed_after) for number in going
            ]
            scheduler.decided += [run(scheduler, number, curves[number]) for number in range(8, 12)]
        assert lived.decided == resumed.decided, killed_after
    if name != "none":
        assert min(lived.decided) < 8  # the law is not about nothing


def test_a_trial_that_continues_keeps_its_value_at_a_rung_that_it_has_passed():
    """The rung of epoch 2 compares values of epoch 2, and the continued trial is now in epoch 4."""
    study = optuna.create_study()
    unfinished = study.ask()
    for epochs, value in enumerate([9.0, 8.0, 3.0], start=1):
        unfinished.report(value, epochs)
    scheduler = make_scheduler("asha", epochs=8, cells=1)
    replay(scheduler, study.get_trials())
    assert run(scheduler, 0, [9.0, 8.0, 3.0, 2.0, 2.0], done=3) == 5
    assert run(scheduler, 1, [7.9] * 3) == 3  # better than 8, the value at the rung; 2 came later


def test_the_published_trial_is_no_measure_after_a_resume_either():
    study = optuna.create_study()
    study.enqueue_trial({}, user_attrs={LABEL: PUBLISHED})
    published = study.ask()
    for epochs in range(1, 9):
        published.report(1.0, epochs)
    study.tell(published, 1.0)
    scheduler = make_scheduler("asha", epochs=4, cells=2)
    replay(scheduler, study.get_trials())
    assert run(scheduler, 1, [9.0] * 8) == 8


@pytest.mark.parametrize("is_own", [True, False])
def test_a_search_hears_nothing_of_another_configuration_with_the_same_number(tmp_path, is_own):
    """After a study has lost its end: the folder of the number still holds what another configuration did."""
    study, cells = optuna.create_study(), [{"fold": 0, "seed": 0}]
    trial = study.ask()
    trial.set_user_attr(SETTINGS, json.dumps({"optimiser.learning_rate": 0.01}))
    settings = {"optimiser.learning_rate": 0.01 if is_own else 0.1}
    made = identity(assign(tmp_path / "0000", settings, cells))
    (tmp_path / "0000").mkdir()
    history = [{"value": 9.0, "spent_seconds": 3.0}, {"value": 8.0, "spent_seconds": 4.0}]
    progress = {"of": made, "history": history, "cells": [], "answer": None}
    (tmp_path / "0000" / "progress.json").write_text(json.dumps(progress))
    read = progress_reader(lambda name: tmp_path / name, cells, "mae")
    assert accelerator_seconds(study, 2.0, read) == {"0000": 14.0 if is_own else 0.0}
    hear_missed(study, study.get_trials(), read)
    assert study.get_trials()[0].intermediate_values == ({1: 9.0, 2: 8.0} if is_own else {})


def test_what_a_killed_search_did_not_hear_is_recorded_once():
    study = optuna.create_study()
    trial = study.ask()
    trial.report(9.0, 1)
    frozen = study.get_trials(deepcopy=False)[0]
    report_missing(study, frozen, {1: 9.0, 2: 8.0, 3: 7.0})
    report_missing(study, study.get_trials(deepcopy=False)[0], {1: 5.0, 3: 5.0})
    assert study.get_trials()[0].intermediate_values == {1: 9.0, 2: 8.0, 3: 7.0}


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_startup_trials_are_compared_and_never_stopped(name):
    """Others see them as without the option: with values that get worse, those after them are stopped alike."""
    curves = [[float(5 + number)] * 8 for number in range(10)]
    plain, spared = (make_scheduler(name, 4, 2, spares(number, Budget())) for number in (0, 6))
    assert min(run(plain, number, curve) for number, curve in enumerate(curves[:6])) < 8
    assert [run(spared, number, curve) for number, curve in enumerate(curves[:6])] == [8] * 6
    later = [run(spared, number, curve) for number, curve in enumerate(curves[6:], start=6)]
    assert min(later) < 8
    assert later[0] == run(plain, 6, curves[6])


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_the_trial_that_has_to_be_completed_is_compared_and_never_stopped(name):
    budget = Budget(completes="0007")
    plain, sparing = make_scheduler(name, 4, 2), make_scheduler(name, 4, 2, spares(0, budget))
    curves = [[float(5 + number)] * 8 for number in range(8)]
    stopped = [run(plain, number, curve) for number, curve in enumerate(curves)]
    assert [run(sparing, number, curve) for number, curve in enumerate(curves[:7])] == stopped[:7]
    assert (stopped[7] < 8, run(sparing, 7, curves[7])) == (True, 8)


def test_the_pruner_spares_startup_trials_too():
    study = optuna.create_study()
    done = study.ask()
    done.set_user_attr(CELL_VALUES, [1.0] * 6)
    study.tell(done, 1.0)
    bad = {TIME: 20, "done": False, "name": "0003", "cells": [{"mae": 9.0 + index} for index in range(5)]}
    assert Wilcoxon(0.1, study, "mae", MAE["mae"], 6, spares(3, Budget()))("id", bad)
    assert not Wilcoxon(0.1, study, "mae", MAE["mae"], 6, spares(4, Budget()))("id", bad)


def test_asha_stops_the_worse_half_and_never_a_refit():
    scheduler = make_scheduler("asha", epochs=4, cells=2)
    decisions = []
    for number, value in enumerate([5.0, 6.0, 9.0, 4.0]):
        trial = Trial(number)
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {TIME: 1, "value": value}))
    assert decisions == ["CONTINUE", "STOP", "STOP", "CONTINUE"]


@pytest.mark.parametrize(("best_until", "stopped"), [(0, 2), (2, 4), (4, 8), (8, 16)])
def test_asha_compares_at_a_quarter_and_a_half_of_the_first_cell_then_at_doublings(best_until, stopped):
    scheduler = make_scheduler("asha", epochs=8, cells=3)
    assert run(scheduler, 0, [5.0] * 24) == 24
    curve = [4.0] * best_until + [6.0] * (24 - best_until)
    assert run(scheduler, 1, curve) == stopped


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_reports_no_time_is_never_stopped(name):
    scheduler = make_scheduler(name, epochs=4, cells=2)
    for number in range(6):
        run(scheduler, number, [3.0] * 8)
    refit = Trial("winner")
    scheduler.on_trial_add(None, refit)
    for epochs in range(1, 9):
        assert scheduler.on_trial_result(None, refit, {"epochs": epochs, "value": math.nan}) == "CONTINUE"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_reported_no_time_is_no_measure_for_others(name):
    """The published trial is the first to end; those after it are judged as if it had not been there."""
    curves = np.random.default_rng(1).uniform(5, 15, (12, 8))
    alone, after = (make_scheduler(name, epochs=4, cells=2) for _ in range(2))
    published = Trial(0)
    after.on_trial_add(None, published)
    after.on_trial_result(None, published, {METRIC: 1.0})
    after.on_trial_complete(None, published, {METRIC: 1.0})
    decided = [
        [run(scheduler, number, curve) for number, curve in enumerate(curves, 1)]
        for scheduler in (alone, after)
    ]
    assert decided[0] == decided[1]


def test_hyperband_gives_every_bracket_the_same_number_of_epochs():
    """Li et al. 2018: every bracket has the same budget when all its trials are halved as planned."""
    scheduler = Hyperband(epochs=4, cells=27, better="low")  # 108 epochs, the first comparison after 1
    assert len(scheduler.brackets) == 5
    dealt = Counter(scheduler.bracket_number(number) for number in range(600))
    last = len(scheduler.brackets) - 1
    budgets = []
    for bracket, trials in dealt.items():
        rungs = last - bracket + 1
        budgets.append(trials * 3**bracket * rungs)
    assert np.ptp(budgets) < 0.1 * np.mean(budgets)


def test_hyperband_has_a_bracket_that_stops_nobody_early():
    scheduler = Hyperband(epochs=4, cells=3, better="low")
    last = len(scheduler.brackets) - 1
    patient = [number for number in range(60) if scheduler.bracket_number(number) == last]
    grace = 3**last
    assert (grace, len(patient) > 2) == (9, True)
    assert all(run(scheduler, number, [float(number)] * 12) >= grace for number in patient)


def study_with_best(values):
    study = optuna.create_study()
    trial = study.ask()
    for step, value in enumerate(values):
        trial.report(value, step)
    trial.set_user_attr(CELL_VALUES, list(values))
    study.tell(trial, float(np.mean(values)))
    return study


@pytest.mark.parametrize("seed", range(30))
def test_wilcoxon_decides_as_optunas_pruner_does(seed):
    generator = np.random.default_rng(seed)
    best = generator.normal(5, 0.5, 8)
    mine = best + generator.normal(generator.choice([-0.3, 0.0, 0.5]), 0.5, 8)
    mine[0] = best[0]  # a difference of zero
    study = study_with_best(best)
    other = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=0)
    stopper = Wilcoxon(0.1, study, "mae", MAE["mae"], 8)
    for n in range(1, 8):
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING, intermediate_values=dict(enumerate(mine[:n]))
        )
        result = {TIME: n, "done": False, "cells": [{"mae": value} for value in mine[:n]]}
        assert stopper("a", result) == other.prune(study, frozen), n
        if "a" in stopper.reasons:
            break


def test_wilcoxon_leaves_refits_the_published_and_the_first_trial_alone():
    worse = [{"mae": 9.0}] * 6
    stopper = Wilcoxon(0.1, study_with_best([5.0] * 8), "mae", MAE["mae"], 8)
    assert stopper("a", {TIME: 6, "done": False, "cells": worse})
    assert "p = 0.0" in stopper.reasons["a"]
    assert not stopper("b", {"epochs": 6, "done": False, "cells": worse})
    assert not Wilcoxon(0.1, optuna.create_study(), "mae", MAE["mae"], 8)(
        "c", {TIME: 6, "done": False, "cells": worse}
    )


def test_wilcoxon_compares_values_after_equally_many_cells():
    """With the fifth cell the best trial's other cells became better: what it was after four is compared with four."""
    study = optuna.create_study()
    best = study.ask()
    best.set_user_attr(CELL_VALUES, [3.0] * 6)
    best.set_user_attr(AFTER_CELLS, [[8.0] * cells for cells in range(1, 5)] + [[3.0] * 5, [3.0] * 6])
    study.tell(best, 3.0)
    stopper = Wilcoxon(0.1, study, "mae", MAE["mae"], 6)
    for cells, stopped in [(4, False), (5, True)]:
        result = {TIME: cells, "done": False, "cells": [{"mae": 7.0}] * cells}
        assert stopper("a", result) is stopped


def test_a_mean_that_got_worse_later_does_not_spare_whoever_is_worse_after_equally_many_cells():
    """The best trial had 5 in each of five cells, and its sixth cell is bad: the others had 6 in five."""
    study = optuna.create_study()
    best = study.ask()
    best.set_user_attr(CELL_VALUES, [5.0] * 5 + [50.0])
    best.set_user_attr(AFTER_CELLS, [[5.0] * cells for cells in range(1, 6)] + [[5.0] * 5 + [50.0]])
    study.tell(best, 12.5)
    stopper = Wilcoxon(0.1, study, "mae", MAE["mae"], 6)
    assert stopper("a", {TIME: 5, "done": False, "cells": [{"mae": 6.0}] * 5})


@pytest.mark.parametrize(
    ("text", "cells", "message"),
    [
        ("wilcoxn", 9, "did you mean 'wilcoxon'"),
        ("wilcoxon=x", 9, "between 0 and 1"),
        ("wilcoxon=1.5", 9, "between 0 and 1"),
        ("wilcoxon=0.05", 5, "could never stop a trial: after 4 of 5 cells"),
    ],
)
def test_a_pruner_that_cannot_act_is_refused(text, cells, message):
    with pytest.raises(UserError, match=message):
        pruner_threshold(text, cells)


def test_pruners_that_can():
    assert pruner_threshold("none", 2) is None
    assert pruner_threshold("wilcoxon", 5) == 0.1
    assert pruner_threshold("wilcoxon=0.05", 6) == 0.05


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(UserError, match="did you mean 'asha'"):
        make_scheduler("ashaa", 4, 2)
