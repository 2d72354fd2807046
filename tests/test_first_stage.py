"""Two stages in one trial: shared, interrupted, charged, and without the people who are judged. Label budgets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from of_age import assign
from process_helpers import kill_when, run, start
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import labelled_order, make_splits
from core.report.answer.record import read_run
from core.report.figures.search import _values_over_epochs
from distributed.batches.in_process import InMemory
from distributed.run.access import AccessRecord
from distributed.run.assignment import Cell, read_progress
from distributed.training import first_stage, lease
from distributed.training.first_stage import STAGE
from distributed.training.lease import Lease
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects, rows_of_first_stage
from distributed.training.trial import Runner
from search_spaces import published

CELLS = [{"fold": 0, "seed": 0}, {"fold": 1, "seed": 0}]
STAGED = {
    "pretraining.task": "brain_age", "pretraining.objective.name": "simclr", "pretraining.training.epochs": 3,
    "pretraining.training.batch_size": 8, "pretraining.views.noise": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    base = published("brain_age") | {"pretraining": {"task": "brain_age"}}
    return resolve(merge(base, SMALL | STAGED | given)).model_dump(mode="json")


def subjects_of(cohort, folder, ages=None):
    manifest = cohort.manifest if ages is None else cohort.manifest.assign(age=ages)
    splits = make_splits(manifest, folds=2, holdout=0.25)
    held = InMemory.of(cohort)
    return Subjects(held, manifest, splits, ("stiffness",), access=AccessRecord(folder / "access"))


def run_to_the_end(runner, assignment):
    answers = [runner(assignment)]
    while not answers[-1]["done"]:
        answers.append(runner(assignment))
    return answers


def history(answerer, name):
    return read_progress(answerer / "trials" / name)["history"]


def stable(rows):
    """What does not depend on the clock."""
    return [
        {name: str(value) for name, value in row.items() if "seconds" not in name and "_at" not in name}
        for row in rows
    ]


def test_a_stage_comes_first_in_every_cell_and_is_neither_judged_nor_pruned(cohort, tmp_path):
    subjects = subjects_of(cohort, tmp_path)
    answers = run_to_the_end(Runner(subjects), assign(tmp_path / "trials" / "0000", settings_of(), CELLS))
    rows = history(tmp_path, "0000")
    assert [row.get("stage") for row in rows] == [STAGE] * 3 + [None] * 2 + [STAGE] * 3 + [None] * 2
    assert [answer["epochs"] for answer in answers] == list(range(1, 11))
    assert [answer["judged_epochs"] for answer in answers] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 4]
    assert [answer.get("prunable_epochs") for answer in answers] == [None] * 3 + [1, 2] + [None] * 3 + [3, 4]
    assert all(np.isnan(answer["value"]) for answer in answers[:3])
    assert answers[-1]["spent_seconds"] == pytest.approx(sum(row["spent_seconds"] for row in rows))


def test_the_second_stage_begins_with_the_weights_of_the_first(cohort, tmp_path):
    subjects = subjects_of(cohort, tmp_path)
    runner, assignment = Runner(subjects), assign(tmp_path / "trials" / "0000", settings_of(), CELLS)
    for _ in range(3):
        runner(assignment)
    earlier = {name: value.clone() for name, value in runner.trial.earlier.items()}
    training = runner.trial._current_cell()
    for name, value in training.model.encoder.state_dict().items():
        assert torch.equal(value, earlier[f"encoder.{name}"]), name
    runner._drop_trial()
    # They are those of the same training by itself.
    settings = resolve(settings_of()).pretraining
    alone = CellTraining(settings, subjects, Cell(0, 0), Place(), rows=np.sort(subjects.splits.training(0)))
    for _ in range(3):
        alone.run_epoch()
    alone.close()
    assert all(torch.equal(value, earlier[name]) for name, value in alone.model.state_dict().items())


def test_trials_with_the_same_first_stage_share_it_and_pay_for_it(cohort, tmp_path, monkeypatch):
    subjects = subjects_of(cohort, tmp_path)
    runner = Runner(subjects)
    run_to_the_end(runner, assign(tmp_path / "trials" / "0000", settings_of(), CELLS))
    begun = []
    real = first_stage.FirstStage._newest
    monkeypatch.setattr(first_stage.FirstStage, "_newest", lambda self: begun.append(self.cell) or real(self))
    other = assign(tmp_path / "trials" / "0001", settings_of(optimiser__learning_rate=1e-3), CELLS)
    answers = run_to_the_end(runner, other)
    assert not begun
    assert [answer["epochs"] for answer in answers] == [3, 4, 5, 8, 9, 10]
    first, second = history(tmp_path, "0000"), history(tmp_path, "0001")
    of_stage = [[row for row in rows if row.get("stage")] for rows in (first, second)]
    assert of_stage[0] == of_stage[1]
    assert answers[-1]["spent_seconds"] == pytest.approx(sum(row["spent_seconds"] for row in second))
    run_to_the_end(
        runner,
        assign(tmp_path / "trials" / "0002", settings_of(pretraining__objective__temperature=0.3), CELLS),
    )
    assert len(begun) == 2 * 3
    assert len(list((tmp_path / "stages").iterdir())) == 4


@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 4, 6, 8])
def test_a_trial_that_was_interrupted_in_any_stage_ends_as_one_that_was_not(
    cohort, tmp_path, interrupted_after
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_to_the_end(
        Runner(subjects_of(cohort, whole)), assign(whole / "trials" / "0000", settings_of(), CELLS)
    )
    assignment = assign(parts / "trials" / "0000", settings_of(), CELLS)
    runner = Runner(subjects_of(cohort, parts))
    for _ in range(interrupted_after):
        runner(assignment)
    for stage in (parts / "stages").iterdir():
        # Its process dies in an epoch: the lease stays, of a process that is no more.
        (stage / "lease").write_text(f"{os.uname().nodename} {dead_process()} 7")
    run_to_the_end(Runner(subjects_of(cohort, parts)), assignment)
    assert stable(history(whole, "0000")) == stable(history(parts, "0000"))


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_lease_is_of_one_process_until_it_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from distributed.training.lease import Lease\n"
        "print(Lease(Path(sys.argv[1])).take(), flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lease"], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    mine = Lease(tmp_path / "lease")
    assert not mine.take()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert mine.take()
    mine.release()
    assert not (tmp_path / "lease").exists()


def test_a_lease_of_another_machine_is_taken_when_it_no_longer_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 0.3)
    (tmp_path / "lease").write_text("elsewhere 17 4")
    mine = Lease(tmp_path / "lease")
    assert not mine.take()
    time.sleep(0.2)
    (tmp_path / "lease").write_text("elsewhere 17 5")
    assert not mine.take()
    time.sleep(0.4)
    assert mine.take()
    mine.release()


def used_by_stages(folder, fold):
    """The rows that first stages of a fold have used, from the records of access."""
    lines = [
        line.split(",")
        for path in (folder / "access").glob("*.csv")
        for line in path.read_text().splitlines()
    ]
    rows = [line[4].split() for line in lines if line[1].endswith(f"-{STAGE}") and int(line[2]) == fold]
    return {int(row) for line in rows for row in line}


def test_a_first_stage_uses_people_without_an_age_and_never_those_who_are_judged(cohort, tmp_path):
    ages = cohort.manifest["age"].to_numpy().copy()
    ages[::4] = np.nan
    subjects = subjects_of(cohort, tmp_path, ages)
    run_to_the_end(Runner(subjects), assign(tmp_path / "trials" / "0000", settings_of(), CELLS))
    held_out, unlabelled = set(subjects.splits.holdout.tolist()), set(np.flatnonzero(np.isnan(ages)).tolist())
    for fold in (0, 1):
        used = used_by_stages(tmp_path, fold)
        judged = set(subjects.splits.folds[fold].tolist()) - unlabelled
        assert not used & judged
        assert not used & held_out
        assert used == (set(subjects.splits.development.tolist()) - judged)
    # A stage that learns ages has no use for the others.
    of_ages = resolve(settings_of(pretraining__objective__name="supcon"))
    assert not set(rows_of_first_stage(of_ages, subjects, Cell(0, 0)).tolist()) & unlabelled


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pretraining": {"training": {}}}, "a first stage has settings of its own"),
        ({"pretraining.pretraining": {"task": "brain_age"}}, "a first stage has no first stage"),
        ({"pretraining.begin.weights": "x"}, "a first stage has no first stage, and starts where the trial starts"),
        ({"pretraining.training.epochs": 0}, "in 'pretraining': setting 'training.epochs'"),
    ],
)  # fmt: skip
def test_first_stages_that_cannot_be_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        resolve(merge(published("brain_age") | {"pretraining": {"task": "brain_age"}}, change))


def test_the_encoder_of_a_stage_is_that_of_the_trial_and_its_head_its_own():
    made = resolve(merge(published("brain_age") | {"pretraining": {"task": "brain_age"}}, {
        "model.width": 0.5, "pretraining.model.head.dimension": 32,
    }))  # fmt: skip
    assert made.pretraining.model.width == 0.5
    assert made.pretraining.model.head.dimension == 32
    assert made.model.head.dimension == 128
    again = resolve(made.model_dump(mode="json"))
    assert again == made


@pytest.mark.parametrize("kind", ["age", "group"])
def test_a_smaller_label_budget_is_a_part_of_a_larger_one_and_balanced(kind):
    draws = np.random.default_rng(0)
    table = pd.DataFrame(
        {"subject": [f"{row:03d}" for row in range(100)], "site": "", "age": draws.uniform(20, 80, 100)}
    )
    table["group"] = np.where(np.arange(100) % 5 == 0, "rare", "often")
    rows = np.arange(100)
    order = labelled_order(table, rows, kind, seed=3)
    assert sorted(order) == table["subject"].tolist()
    assert labelled_order(table, rows, kind, seed=3) == order
    assert labelled_order(table, rows, kind, seed=4) != order
    of = table.set_index("subject")
    for count in (10, 20, 50):
        chosen = of.loc[order[:count]]
        if kind == "group":
            assert abs((chosen["group"] == "rare").sum() - count / 5) <= 1
        else:
            fifths = pd.cut(
                chosen["age"], of["age"].quantile([0, 0.2, 0.4, 0.6, 0.8, 1]), include_lowest=True
            )
            assert abs(fifths.value_counts() - count / 5).max() <= 1


def test_budgets_limit_training_and_what_a_stage_may_know(cohort, tmp_path):
    subjects = subjects_of(cohort, tmp_path)

    def trained(budget):
        settings = resolve(settings_of(data__labelled=budget))
        training = CellTraining(settings, subjects, Cell(0, 0), Place())
        return set(training.training_rows.tolist()), set(training.evaluation_rows.tolist())

    everyone, judged = trained(None)
    few, same = trained(3)
    half, _ = trained(0.5)
    assert len(few) == 3
    assert few < half < everyone
    assert len(half) == round(len(everyone) / 2)
    assert same == judged
    with pytest.raises(
        UserError, match=r"data\.labelled=50 is more than the \d+ subjects that fold 0 trains on"
    ):
        trained(50)
    for objective, expected in (("simclr", everyone), ("supcon", few)):
        settings = resolve(settings_of(data__labelled=3, pretraining__objective__name=objective))
        assert set(rows_of_first_stage(settings, subjects, Cell(0, 0)).tolist()) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_of_two_stages_whose_driver_is_killed_in_one_goes_on_and_trains_no_stage_twice(tmp_path):
    write_small_cohort(tmp_path / "cohort")
    (tmp_path / "staged.py").write_text(
        "def space(trial):\n"
        "    trial.suggest_float('pretraining.objective.temperature', 0.05, 0.5, log=True)\n"
        "    trial.suggest_float('optimiser.learning_rate', 1e-5, 1e-3, log=True)\n"
        "    return dict(trial.params)\n"
    )
    (tmp_path / "staged.yaml").write_text(Path("search_spaces/brain_age.yaml").read_text())
    changes = {**SMALL, **STAGED, "pretraining.training.epochs": 12}
    changed = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    asked = (
        "sweep", "cohort", "--space", "staged.py:space", "--stages", 2, "--trials", 6, "--folds", 2, "--slots", 2,
        "--scheduler", "none", "--out", "run", *changed,
    )  # fmt: skip
    mark = "two-stages"
    sweep = start(*asked, cwd=tmp_path, mark=mark)
    folder = tmp_path / "run"
    kill_when(lambda: len(read_progress(folder / "trials" / "0000")["history"]) >= 4, sweep, mark)
    assert list((folder / "stages").iterdir())
    done = run("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = pd.read_csv(folder / "trials.csv")
    assert trials["state"].tolist() == ["COMPLETE"] * 6
    counts = trials["pretraining.objective.temperature"].value_counts()
    assert sorted(counts) == [3, 3]
    table = pd.read_csv(folder / "history.csv")
    for number in range(6):
        of_trial = table[table["number"] == number]
        visited = of_trial[["fold", "epoch"]].assign(stage=of_trial["stage"].fillna("")).to_numpy().tolist()
        assert visited == [
            [fold, epoch, stage]
            for fold in (0, 1) for stage, epochs in ((STAGE, 12), ("", 2)) for epoch in range(1, epochs + 1)
        ]  # fmt: skip
    # Trials of one first stage have the same epochs of it, to the last digit and second.
    of_stages = table[table["stage"].notna()].set_index("number")
    for _, alike in trials.groupby("pretraining.objective.temperature"):
        written = {of_stages.loc[number].to_csv(index=False) for number in alike["number"]}
        assert len(written) == 1
    # The page shows what is judged: two epochs of every cell.
    record = read_run(folder)
    assert len(record.history) == 6 * 2 * 2
    for number in range(6):
        trial = record.study.trials[number]
        assert max(_values_over_epochs(trial, record)) == 4
    # No weights are left behind.
    assert not (folder / "stages").exists()
    assert json.loads((folder / "run.json").read_text())["concluded"]


def test_budgets_of_labels_share_a_stage_that_trains_on_none(cohort, tmp_path, monkeypatch):
    """The runs of a curve have one folder for stages; whoever comes second has noted the people, too."""
    masked = {
        "pretraining": {"task": "masked_pretraining"}, "pretraining.training.epochs": 2,
        "pretraining.training.batch_size": 8,
    }  # fmt: skip
    base = {name: value for name, value in published("brain_age").items() if name != "pretraining"}
    trained = []
    real = CellTraining.run_epoch

    def counted(training):
        if training.cell.trial.endswith(STAGE):
            trained.append(training.cell.trial)
        return real(training)

    monkeypatch.setattr(CellTraining, "run_epoch", counted)
    keys = []
    for name, changes in (("few", {"data.labelled": 4}), ("all", {})):
        part = tmp_path / name
        settings = resolve(merge(base, SMALL | masked | changes)).model_dump(mode="json")
        runner = Runner(subjects_of(cohort, part), stages=tmp_path / "stages")
        run_to_the_end(runner, assign(part / "trials" / "0000", settings, CELLS[:1]))
        assert [row.get("stage") for row in history(part, "0000")] == [STAGE] * 2 + [None] * 2
        noted = pd.concat([pd.read_csv(path, header=None) for path in (part / "access").iterdir()])
        assert noted[1].str.endswith(STAGE).any()
        keys.append(sorted(path.name for path in (tmp_path / "stages").iterdir()))
        assert not (part / "stages").exists()
    assert keys[0] == keys[1]
    assert len(trained) == 2
    # A stage that trains on labels is another one in every budget.
    for changes in ({"data__labelled": 4}, {}):
        runner = Runner(subjects_of(cohort, tmp_path), stages=tmp_path / "supervised")
        runner(assign(tmp_path / "trials" / str(len(changes)), settings_of(**changes), CELLS[:1]))
    assert len(list((tmp_path / "supervised").iterdir())) == 2
