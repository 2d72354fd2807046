"""What is recorded of the uses of subjects, and of the looks at the hold-out."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from fake_run import make_run
from of_age import MAE, TASK
from of_age import SETTINGS as OF_AGE
from optuna.trial import TrialState
from rich.console import Console
from small_cohort import write_small_cohort

from core.files.tables import write_table
from core.report.answer.honesty import looks_in_words
from core.report.answer.record import read_run
from core.run_access import EVALUATION, read_access
from core.run_description import Look
from core.run_names import LABEL, OUTSIDE, PROGRESS, PUBLISHED, SETTINGS
from core.volumes.cohort.reader import Cohort
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell, read_progress
from distributed.run.folder import create_run, open_run
from distributed.sweeps.looks import count_looks, looks_beside, looks_of, tell_looks
from distributed.sweeps.refits import after_search, share_refit
from distributed.sweeps.request import SweepRequest


def test_every_use_is_kept_not_the_first_of_each_row(tmp_path):
    record = AccessRecord(tmp_path)
    refit, trial = Cell(HOLDOUT, 1, "winner"), Cell(0, 0, "0003")
    for cell in (refit, trial, refit):
        record.note([4, 5], cell)
        record.note([5], cell)  # the same cell: no other use
    record.note([6], refit)
    used = read_access(tmp_path).set_index(["row", "fold"])["uses"]
    assert used.to_dict() == {(4, HOLDOUT): 2, (5, HOLDOUT): 2, (6, HOLDOUT): 1, (4, 0): 1, (5, 0): 1}


def test_a_search_that_reads_a_held_out_row_after_a_refit_is_found(tmp_path):
    """The first use of the row was that of the refit: a record of first uses would hide the second."""
    record = AccessRecord(tmp_path)
    record.note([7], Cell(HOLDOUT, 1, "winner"))
    record.note([7], Cell(2, 0, "0009"))
    assert set(read_access(tmp_path)["fold"]) == {HOLDOUT, 2}


def test_records_of_version_0_2_are_read(tmp_path):
    (tmp_path / "node-1.csv").write_text("10.5,3,0\n11.5,4,0\n20.0,9,-1\n")
    table = read_access(tmp_path)[["row", "fold", "first", "uses"]]
    assert table.to_numpy().tolist() == [
        [3, 0, 10.5, 1],
        [4, 0, 11.5, 1],
        [9, -1, 20, 1],
    ]


SEARCH = SimpleNamespace(
    base={"task": "brain_age"}, first="mae", objectives=MAE, task=TASK, about=TASK.about, settings=OF_AGE
)
"""What refits need of a search."""


@pytest.fixture
def run(tmp_path):
    return create_run(
        tmp_path / "run", "sweep", {}, {"task": "brain_age"}, write_small_cohort(tmp_path / "cohort", 6)
    )


def study_of(values, label=PUBLISHED):
    study = optuna.create_study()
    for value in values:
        trial = study.ask()
        trial.set_user_attr(LABEL, label)
        trial.set_user_attr(SETTINGS, "{}")
        study.tell(trial, value, state=TrialState.FAIL if value is None else None)
    return study


def test_without_a_winner_nobody_looks(run):
    assert after_search(run, SweepRequest(), SEARCH, study_of([None, None])) == []
    assert run.about.looks == ()


def test_refits_that_are_continued_are_one_look_and_those_after_more_trials_another(run):
    for values in ([5.0], [5.0], [5.0, 4.0]):
        after_search(run, SweepRequest(), SEARCH, study_of(values))
    assert [(look.trials, look.winner) for look in run.about.looks] == [(1, 0), (2, 1)]


def test_another_winner_among_the_same_trials_is_another_look(run):
    """The space was changed, and the former winner lies outside: nothing ran since, and somebody else is refitted."""
    study = study_of([4.0, 5.0])
    after_search(run, SweepRequest(), SEARCH, study)
    changed = optuna.create_study()
    for trial in study.get_trials():
        if trial.number == 0:
            trial.user_attrs[OUTSIDE] = {}
        changed.add_trial(trial)
    after_search(run, SweepRequest(), SEARCH, changed)
    assert [(look.trials, look.winner) for look in run.about.looks] == [(2, 0), (2, 1)]


def test_a_search_that_went_on_without_finishing_a_trial_has_looked_again(run):
    """Its unfinished trials were there to be seen."""
    study = study_of([5.0])
    after_search(run, SweepRequest(), SEARCH, study)
    study.ask()
    after_search(run, SweepRequest(), SEARCH, study)
    assert [(look.trials, look.begun) for look in run.about.looks] == [(1, 1), (1, 2)]


def test_the_published_configuration_is_refitted_once_if_it_wins(run):
    study = study_of([5.0, 4.0])
    first = [Path(each["folder"]).name for each in after_search(run, SweepRequest(), SEARCH, study)]
    assert "winner" in first
    assert "published" not in first
    share_refit(run, study)
    assert not run.refit(PUBLISHED).exists()  # nothing is known yet
    write_progress(run.refit("winner"), answer={"value": 4.0})
    (run.refit("winner") / "model-1").mkdir()
    share_refit(run, study)
    assert read_progress(run.refit(PUBLISHED)) == read_progress(run.refit("winner"))
    assert not (run.refit(PUBLISHED) / "model-1").exists()
    study.add_trial(study_of([3.0], label="enqueued").trials[0])  # another winner
    again = [Path(each["folder"]).name for each in after_search(run, SweepRequest(), SEARCH, study)]
    assert {"winner", "published"} <= set(again)
    assert read_progress(run.refit(PUBLISHED))["answer"] == {"value": 4.0}


def test_half_a_shared_refit_is_made_again(run):
    study = study_of([4.0])
    write_progress(run.refit("winner"), answer={"value": 4.0})
    (run.refit("winner") / "predictions-1.csv").write_text("predicted\n")
    run.refit(PUBLISHED).mkdir(parents=True)  # a kill, or a run that was stopped while it refitted this one
    share_refit(run, study)
    assert (run.refit(PUBLISHED) / "predictions-1.csv").exists()


def write_progress(folder, answer):
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"of": "x", "history": [], "cells": [], "answer": answer}
    (folder / PROGRESS).write_text(json.dumps(kept))


def test_resume_says_that_the_hold_out_was_seen_before_it_goes_on(run):
    def told(trials):
        console = Console(file=io.StringIO(), width=500)
        tell_looks(run, study_of([5.0]), trials, console)
        return console.file.getvalue()

    assert told(trials=3) == ""
    after_search(run, SweepRequest(), SEARCH, study_of([5.0]))
    assert "were looked at once (last refits: " in told(trials=3)
    assert "after 1 trial)" in told(trials=3)
    assert told(trials=1) == ""  # only refits are left


def test_a_run_of_version_0_2_that_was_refitted_has_been_looked_at(run):
    run.update(finished="2026-11-20T09:00:00+00:00", refitted=3)
    assert looks_of(run) == ()
    run.refit("published").mkdir(parents=True)
    (look,) = looks_of(run)
    assert (look.when, look.winner, look.trials) == ("2026-11-20T09:00:00+00:00", 3, None)


def test_evaluations_of_the_own_hold_out_are_counted_here_and_in_runs_beside(run, tmp_path):
    """Of three runs of one cohort two held out the same people; a third one other people."""

    def held(folder, people):
        write_table(
            pd.DataFrame(
                {
                    "subject": ["a", "b", "c"],
                    "role": ["holdout" if each in people else "fold 0" for each in "abc"],
                }
            ),
            folder / "splits.csv",
        )

    cohort = Cohort.open(tmp_path / "cohort")
    same, other = (
        create_run(tmp_path / name, "train", {}, {"task": "brain_age"}, cohort) for name in ("same", "other")
    )
    held(run.path, "ab")
    held(same.path, "b")
    held(other.path, "c")
    assert (count_looks(run), looks_beside(run, {"a", "b"})) == (0, {})
    for each in (same, same, other, run):
        AccessRecord(each.access).note([0, 1], Cell(HOLDOUT, 0, EVALUATION))
        AccessRecord(each.access).note([0, 1], Cell(HOLDOUT, 1, "winner"))  # a refit is counted in run.json
    assert (count_looks(run), looks_beside(run, {"a", "b"})) == (1, {"same": 2})
    after_search(run, SweepRequest(), SEARCH, study_of([5.0]))
    assert count_looks(run) == 2
    (tmp_path / "same" / "run.json").write_text("{")
    assert looks_beside(run, {"a", "b"}) == {}


def test_looks_of_nested_searches_are_found_from_outside_and_from_inside(run, tmp_path):
    """A hold-out of the nested search has the same people; seen from it, so has the run beside the nested search."""
    cohort = Cohort.open(tmp_path / "cohort")
    create_run(tmp_path / "nested", "nested", {"outer": 2}, {"task": "brain_age"}, cohort)
    child, other = (
        create_run(tmp_path / "nested" / f"outer-{number}", "sweep", {}, {"task": "brain_age"}, cohort)
        for number in (1, 2)
    )
    for folder, held_out in ((run, "ab"), (child, "ab"), (other, "c")):
        roles = ["holdout" if each in held_out else "fold 0" for each in "abc"]
        write_table(pd.DataFrame({"subject": list("abc"), "role": roles}), folder.path / "splits.csv")
        AccessRecord(folder.access).note([0, 1], Cell(HOLDOUT, 0, EVALUATION))
    assert looks_beside(run, {"a", "b"}) == {"nested/outer-1": 1}
    assert looks_beside(child, {"a", "b"}) == {"run": 1}


def test_a_run_beside_that_is_a_link_is_named_by_the_link(run, tmp_path):
    cohort, elsewhere = Cohort.open(tmp_path / "cohort"), tmp_path / "elsewhere" / "other"
    create_run(elsewhere, "train", {}, {"task": "brain_age"}, cohort)
    (tmp_path / "linked").symlink_to(elsewhere)
    for folder in (run.path, elsewhere):
        write_table(pd.DataFrame({"subject": ["a"], "role": ["holdout"]}), folder / "splits.csv")
    AccessRecord(elsewhere / "access").note([0], Cell(HOLDOUT, 0, EVALUATION))
    assert looks_beside(run, {"a"}) == {"linked": 1}


def test_evaluations_are_on_the_page_and_in_what_resume_says(tmp_path):
    folder = make_run(tmp_path / "run")
    record = read_run(folder)
    assert looks_in_words(record) == "once, after the search"
    open_run(folder).update(looks=(Look(when="2026-11-20T09:14:05+00:00", trials=6),))
    (folder / "access").mkdir()
    lines = [
        "1.79e9,evaluate,-1,0,3 4",
        "1.78e9,evaluate,-1,0,3 4",
        "1.79e300,evaluate,-1,0,3",
        "1.5e9,winner,-1,1,3",
    ]
    (folder / "access" / "node-1.csv").write_text("\n".join([*lines, ""]))
    told = looks_in_words(read_run(folder))
    by = "UTC, by `brainsweep evaluate`"
    assert (
        told
        == f"3 times (2026-05-28 20:26 {by}; 2026-09-21 14:13 {by}; 2026-11-20 09:14 UTC, after 6 trials)"
    )
    console = Console(file=io.StringIO(), width=500)
    tell_looks(open_run(folder), study_of([5.0]), 3, console)
    assert "were looked at 3 times (last refits: 2026-11-20" in console.file.getvalue()
