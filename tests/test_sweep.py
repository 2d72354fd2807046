"""Sweeps as a user runs them: a second process, real Ray, real files, real kills."""

import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import (
    command,
    end_marked,
    environment,
    marked,
    run,
    study_of,
    wait_until,
)
from small_cohort import write_small_cohort

from core.evaluation.calibration import calibrate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPACE = """
def space(trial):
    # the fourth trial diverges, whatever it is given
    name = "sgd" if trial.number == 3 else "adam"
    rate = 1e30 if trial.number == 3 else trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    noise = trial.suggest_categorical("views.noise", [0.0, 0.1])
    return {"optimiser.name": name, "optimiser.learning_rate": rate, "views.noise": noise}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    write_small_cohort(folder / "cohort", subjects=30)
    (folder / "mine.py").write_text(SPACE)
    return folder


def epochs_done(progress):
    return len(json.loads(progress.read_text())["history"]) if progress.exists() else 0


def test_a_sweep_from_beginning_to_end(workplace):
    mark = f"whole-{os.getpid()}"
    done = run(
        "sweep", "cohort", "--space", "mine.py:space", "--trials", 6, "--folds", 2, "--slots", 2, "--out", "run",
        "--scheduler", "asha", "--refit-seeds", 2, cwd=workplace, mark=mark,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = workplace / "run"

    trials = study_of(folder).get_trials()
    assert [trial.number for trial in trials] == list(range(6))
    assert trials[3].state == TrialState.FAIL
    assert "not finite" in trials[3].user_attrs["reason"] or "became" in trials[3].user_attrs["reason"]
    rest = [trial for trial in trials if trial.number != 3]
    assert {trial.state for trial in rest} <= {TrialState.COMPLETE, TrialState.PRUNED}

    table = pd.read_csv(folder / "trials.csv")
    cells = pd.read_csv(folder / "cells.csv")
    for trial in rest:
        if trial.state == TrialState.COMPLETE:
            errors = cells.loc[cells["number"] == trial.number, "mae"]
            assert len(errors) == 2
            assert trial.value == pytest.approx(errors.mean())
            assert trial.user_attrs["sd"] == pytest.approx(errors.std())
        else:
            assert trial.intermediate_values
    assert table["state"].tolist() == [trial.state.name for trial in trials]

    holdout = pd.read_csv(folder / "holdout.csv")
    assert holdout["method"].value_counts().to_dict() == {
        "search winner": 2, "published": 2, "L1 baseline": 2, "voxels": 1, "training median": 1,
    }  # fmt: skip
    predictions = pd.read_csv(folder / "predictions.csv")
    held_out = pd.read_csv(folder / "splits.csv").query("role == 'holdout'")["subject"]
    assert set(predictions["subject"]) == set(held_out)

    for name in ("report.html", "trials.parquet", "best/model.safetensors", "best/probe.json", "run.json"):
        assert (folder / name).exists(), name
    about = json.loads((folder / "run.json").read_text())
    assert about["best"]["number"] == study_of(folder).best_trial.number
    assert about["finished"]
    calibration = json.loads((folder / "best" / "calibration.json").read_text())
    assert calibration["source"] == f"trial {about['best']['number']}, 2 cells"
    kept = [
        pd.read_csv(folder / "trials" / f"{about['best']['number']:04d}" / f"predictions-{fold}-0.csv")
        for fold in range(2)
    ]
    out_of_fold = pd.concat(kept)
    assert calibration["subjects"] == len(out_of_fold) == 30 - len(held_out)
    assert not set(out_of_fold["subject"]) & set(held_out)
    expected = calibrate(*(out_of_fold[name].to_numpy() for name in ("predicted", "truth", "subject")))
    assert (calibration["slope"], calibration["half_width"]) == pytest.approx(
        (expected.slope, expected.half_width)
    )
    assert {path.parent.name for path in (folder / "tensorboard").glob("000*/events*")} == {
        f"{number:04d}" for number in range(6)
    }
    assert "Leaderboard" in done.stdout
    assert "brainsweep predict run" in done.stdout
    assert "Traceback" not in done.stderr
    assert wait_until(lambda: not marked(mark), 20), marked(mark)

    evaluated = run("evaluate", "run", "cohort", cwd=workplace)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"only its {len(held_out)} held-out subjects" in evaluated.stdout
    assert f"of {len(held_out)} subjects" in evaluated.stdout


def test_a_killed_sweep_is_resumed_without_loss_or_repetition(workplace):
    folder = workplace / "killed"
    mark = f"killed-{os.getpid()}"
    sweep = subprocess.Popen(
        command("sweep", "cohort", "--trials", 5, "--folds", 2, "--slots", 2, "--out", "killed", "--scheduler", "none",
                "--set", "training.epochs=6"),
        cwd=workplace, env=environment(mark),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def finished():
        return [trial for trial in study_of(folder).get_trials() if trial.state.is_finished()]

    try:
        assert wait_until(lambda: (folder / "study.journal").exists() and len(finished()) >= 2, 400)
    finally:
        left = end_marked(mark, 20, [signal.SIGKILL])  # driver, slots, workers, Ray: as when the power fails
        sweep.wait()
        killed_at = time.time()
    assert not left
    before = {trial.number: (trial.value, trial.params) for trial in finished()}
    interrupted = {
        trial.number: epochs_done(folder / "trials" / f"{trial.number:04d}" / "progress.json")
        for trial in study_of(folder).get_trials(states=(TrialState.RUNNING,))
    }

    resumed = run("resume", "killed", cwd=workplace)
    assert resumed.returncode == 0, resumed.stderr
    trials = study_of(folder).get_trials()
    assert [trial.number for trial in trials] == list(range(5))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert before == {trial.number: (trial.value, trial.params) for trial in trials if trial.number in before}
    history = pd.read_csv(folder / "history.csv")
    for number in range(5):
        epochs = history.loc[history["number"] == number, ["fold", "epoch"]].to_numpy().tolist()
        assert epochs == [[fold, epoch] for fold in range(2) for epoch in range(1, 7)]
    for number, epochs in interrupted.items():  # continued, not begun again
        rows = history[history["number"] == number]
        assert (rows["first_step_at"] < killed_at).sum() >= epochs
    again = run("resume", "killed", cwd=workplace)
    assert again.returncode == 0
    assert "nothing left" in again.stdout


def test_ctrl_c_stops_gracefully_and_leaves_a_resumable_run(workplace):
    folder = workplace / "stopped"
    sweep = subprocess.Popen(
        command("sweep", "cohort", "--trials", 40, "--folds", 2, "--slots", 1, "--out", "stopped",
                "--scheduler", "none"),
        cwd=workplace, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert wait_until(
        lambda: (
            (folder / "study.journal").exists()
            and any(trial.state.is_finished() for trial in study_of(folder).get_trials())
        ),
        400,
    )
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert "brainsweep resume stopped" in out
    states = {trial.state for trial in study_of(folder).get_trials()}
    assert TrialState.PRUNED not in states
    assert TrialState.FAIL not in states
    assert (folder / "report.html").exists()
