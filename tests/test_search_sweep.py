"""One sweep with all that a search can be asked for, then the same run in a narrower space until its hours are used."""

import json

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import run, study_of
from small_cohort import write_small_cohort

from core.report.answer.honesty import access_line, measured_again
from core.report.answer.record import read_run, reported

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OBJECTIVES = ("mae", "site_balanced_accuracy", "accelerator_seconds")
SPACE = """
def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    trial.suggest_categorical("views.noise", [0.0, 0.1])
    return dict(trial.params)
"""
OWN = "- {optimiser.learning_rate: 3e-3, views.noise: 0.1}\n"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The run of a sweep of two cells and three seeds, and what it printed."""
    workplace = tmp_path_factory.mktemp("search")
    write_small_cohort(workplace / "cohort", subjects=30)
    (workplace / "mine.py").write_text(SPACE)
    (workplace / "own.yaml").write_text(OWN)
    done = run(
        "sweep", "cohort", "--space", "mine.py:space", "--trials", 6, "--folds", 3, "--seeds", 2, "--refit-seeds", 2,
        "--confirm-seeds", 1, "--slots", 2, "--sampler", "nsga2", "--scheduler", "hyperband", "--pruner", "wilcoxon",
        "--objectives", ",".join(OBJECTIVES), "--enqueue", "own.yaml", "--accelerator-hours", 5, "--out", "run",
        cwd=workplace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workplace / "run", done.stdout


def test_every_objective_is_the_mean_or_sum_of_what_was_measured(swept):
    folder, _ = swept
    cells, history = pd.read_csv(folder / "cells.csv"), pd.read_csv(folder / "history.csv")
    trials = study_of(folder).get_trials()
    assert len(trials) == 6
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert {0, 1} <= {trial.number for trial in completed} | {1}
    for trial in completed:
        mine = cells[cells["number"] == trial.number]
        assert len(mine) == 6
        assert trial.values[:2] == pytest.approx([mine["mae"].mean(), mine["site_balanced_accuracy"].mean()])
        seconds = history.loc[history["number"] == trial.number, "spent_seconds"].sum()
        devices = trial.values[2] / seconds
        assert devices == pytest.approx(round(devices))  # the CPUs of a slot
        assert reported(trial)
    for trial in trials:
        if trial.state == TrialState.PRUNED:
            assert trial.user_attrs["reason"].startswith(("hyperband after epoch", "Wilcoxon p"))


def test_the_users_own_configuration_comes_after_the_published_one(swept):
    first, second = study_of(swept[0]).get_trials()[:2]
    assert (first.user_attrs["label"], second.user_attrs["label"]) == ("published", "enqueued")
    assert second.params == {"optimiser.learning_rate": 3e-3, "views.noise": 0.1}


def test_no_process_read_a_held_out_subject_before_the_search_was_over(swept):
    folder, _ = swept
    roles = pd.read_csv(folder / "splits.csv", dtype=str).set_index("subject")["role"]
    names = ["time", "trial", "fold", "seed", "row"]
    parts = [pd.read_csv(path, names=names) for path in (folder / "access").glob("*.csv")]
    assert len(parts) == 2  # a worker of each slot
    reads = pd.concat(parts).assign(row=lambda table: table["row"].astype(str).str.split()).explode("row")
    reads["row"] = reads["row"].astype(int)
    held_out = reads[reads["row"].map(lambda row: roles.iloc[row] == "holdout")]
    assert set(held_out["fold"]) == {-1}
    assert set(reads["row"]) == set(range(30))  # the record is no empty promise: everyone was read by someone
    ended = max(trial.datetime_complete.timestamp() for trial in study_of(folder).get_trials())
    assert held_out["time"].min() > ended
    assert "by a refit" in access_line(read_run(folder))


def test_the_winner_is_measured_again_with_seeds_that_the_search_never_used(swept):
    folder, _ = swept
    searched = set(pd.read_csv(folder / "cells.csv")["seed"])
    again = pd.read_csv(folder / "confirmed.csv")
    holdout = pd.read_csv(folder / "holdout.csv")
    assert searched == {0, 1}
    assert set(again["seed"]) == {2}
    assert set(holdout.loc[holdout["method"] != "training median", "seed"]) == {2, 3}
    assert len(again[again["method"] == "search winner"]) == 3
    assert len(measured_again(read_run(folder))) == 3
    page = (folder / "report.html").read_text()
    assert "Was the winner lucky?" in page
    assert "The Pareto front" in page


def test_what_is_left_is_said_quietly(swept):
    lines = [line for line in swept[1].splitlines() if line.startswith("trial 0")]
    assert len(lines) == 6
    assert all("left: " in line and "CPU-hours" in line for line in lines)


def test_another_space_on_purpose_then_the_hours_are_used_up(swept):
    folder, _ = swept
    before = {trial.number: (trial.values, trial.params) for trial in study_of(folder).get_trials()}
    used = read_run(folder).trials["accelerator_seconds"].sum() / 3600
    narrower = ["--trials", 60, "--set", "views.noise=0.1", "--accelerator-hours", used + 3 / 3600]
    refused = run("resume", "run", *narrower, cwd=folder.parent)
    assert refused.returncode == 2
    assert "views.noise is fixed at 0.1; 6 trials become 60" in refused.stderr
    elsewhere = run("resume", "run", "--set", "training.epochs=3", "--change-search", cwd=folder.parent)
    assert elsewhere.returncode == 2
    assert "training.epochs=3 is not a setting that this run searches" in elsewhere.stderr

    done = run("resume", "run", *narrower, "--change-search", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "The search ended early" in done.stdout
    about = json.loads((folder / "run.json").read_text())
    (change,) = about["changes"]
    assert (change["after_trials"], change["holdout_seen"]) == (6, True)
    assert "CPU-hours used of" in about["ended"]
    record = read_run(folder)
    after = record.study.get_trials()
    assert 6 < len(after) < 60
    for number, (values, params) in before.items():
        inside = params["views.noise"] == 0.1
        assert after[number].values == values  # nothing finished is lost
        assert ("outside" in after[number].user_attrs) != inside
    assert all(set(trial.params) == {"optimiser.learning_rate"} for trial in after[6:])
    assert record.trial(record.best)["views.noise"] != 0.0 or record.best > 5
    assert "looked at 2 times" in (folder / "report.html").read_text()
