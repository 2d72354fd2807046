"""Sweeps that are shot at, as second processes with real Ray: nothing finished is lost, nothing is done twice."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import (
    end_marked,
    finished_trials,
    marked,
    progress_of,
    run,
    start,
    study_of,
    trials_of,
    wait_until,
)
from small_cohort import write_small_cohort

survival = pytest.importorskip("benchmarks.survival", reason="run as `python -m pytest` from the repository")
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]


@pytest.fixture
def workplace(tmp_path):
    write_small_cohort(tmp_path / "cohort", subjects=24)
    return tmp_path


@pytest.fixture
def mark(request):
    name = f"{request.node.name}-{os.getpid()}"
    yield name
    assert not end_marked(name, 15)


def each_epoch_once(folder, trials, folds, epochs):
    history = pd.read_csv(folder / "history.csv")
    wanted = [[fold, epoch] for fold in range(folds) for epoch in range(1, epochs + 1)]
    for number in range(trials):
        visited = history.loc[history["number"] == number, ["fold", "epoch"]].to_numpy().tolist()
        assert visited == wanted, number


def test_a_driver_killed_at_random_moments_loses_and_repeats_nothing(tmp_path, monkeypatch):
    orders = [("driver", "first epoch", 0.5), ("driver", "refit", 0.5)]
    monkeypatch.setattr(survival, "plan", lambda kills, seed: orders[:kills])
    kills = survival.campaign(tmp_path, kills=1, seed=0)
    kills = survival.campaign(tmp_path, kills=2, seed=0)  # goes on
    assert [(kill.sweep, kill.victim, kill.moment) for kill in kills] == [
        (0, "driver", "first epoch"),
        (1, "driver", "refit"),
    ]
    assert sum(kill.epochs for kill in kills) > 0
    assert [(kill.finished_lost, kill.epochs_lost) for kill in kills] == [(0, 0)] * len(kills)
    assert all(kill.complete for kill in kills)
    assert survival.table_of(kills)["kills"].sum() == 2


def test_worker_mailbox_and_slot_are_killed_in_one_sweep_and_no_trial_notices(workplace, mark):
    """The slot is killed wherever it stands, also while it is being given its next trial."""
    folder = workplace / "run"
    sweep = start(
        "sweep", "cohort", "--trials", 6, "--folds", 2, "--slots", 1, "--scheduler", "none", "--out", "run",
        "--set", "training.epochs=4", cwd=workplace, mark=mark,
    )  # fmt: skip
    victims = {1: "ray::RayTrainWorker", 2: "ray::Mailbox", 3: ("ray::Slot", "ray::ResourceTrainable")}
    killed = []
    try:
        for after, name in victims.items():
            assert wait_until(lambda after=after: len(finished_trials(folder)) >= after, 400), sweep.poll()
            [victim] = [process for process, words in marked(mark).items() if words.startswith(name)]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        _, err = sweep.communicate(timeout=500)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, err[-3000:]
    assert len(killed) == 3
    trials = study_of(folder).get_trials()
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(6)]
    each_epoch_once(folder, 6, 2, 4)
    assert set(pd.read_csv(folder / "holdout.csv")["method"]) >= {"search winner", "published", "L1 baseline"}


def test_ctrl_c_twice_ends_at_once_and_leaves_a_resumable_run(workplace, mark):
    folder = workplace / "run"
    sweep = start(
        "sweep", "cohort", "--trials", 40, "--folds", 2, "--slots", 1, "--scheduler", "none", "--out", "run",
        "--set", "training.epochs=200", cwd=workplace, mark=mark,
    )  # fmt: skip
    assert wait_until(lambda: progress_of(folder, 0)["history"], 400)
    os.killpg(sweep.pid, signal.SIGINT)  # a terminal interrupts the driver and all that Ray started from it
    time.sleep(0.5)  # two signals of one kind that wait together are one
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=90)
    assert sweep.returncode == 130, (out[-2000:], err[-2000:])
    assert "press Ctrl-C again" in out
    assert "Traceback" not in out
    assert wait_until(lambda: not marked(mark), 40), marked(mark)
    assert {trial.state for trial in trials_of(folder)} == {TrialState.RUNNING}
    assert progress_of(folder, 0)["history"]
    refused = run("sweep", "cohort", "--out", "run", cwd=workplace, mark=mark)
    assert refused.returncode == 2
    assert "brainsweep resume" in refused.stderr


def fill(path):
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(2**16))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_stops_the_sweep_which_goes_on_once_there_is_room(workplace, mark):
    disk = workplace / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        folder = disk / "run"
        sweep = start("sweep", "cohort", "--trials", 6, "--folds", 2, "--slots", 1, "--scheduler", "none",
                      "--out", "disk/run", cwd=workplace, mark=mark)  # fmt: skip
        assert wait_until(lambda: finished_trials(folder), 400), sweep.poll()
        fill(disk / "ballast")
        out, err = sweep.communicate(timeout=300)
        assert sweep.returncode == 2, (out[-2000:], err[-2000:])
        last = err.strip().splitlines()[-1]
        assert "No space left on device" in last
        assert "brainsweep resume disk/run" in last
        before = {trial.number: (trial.state, trial.value) for trial in finished_trials(folder)}
        assert {state for state, _ in before.values()} == {TrialState.COMPLETE}

        (disk / "ballast").unlink()
        resumed = run("resume", "disk/run", cwd=workplace, mark=mark)
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        trials = {trial.number: (trial.state, trial.value) for trial in study_of(folder).get_trials()}
        assert before.items() <= trials.items()
        assert [trials[number][0] for number in range(6)] == [TrialState.COMPLETE] * 6
        each_epoch_once(folder, 6, 2, 2)
    finally:
        end_marked(mark)
        subprocess.run(["umount", "-l", disk], check=False)


def test_a_run_that_was_copied_with_its_cohort_is_continued_there(workplace, mark):
    here, there = workplace / "here", workplace / "there"
    here.mkdir()
    (workplace / "cohort").rename(here / "cohort")
    sweep = start("sweep", "cohort", "--trials", 4, "--folds", 2, "--slots", 1, "--scheduler", "none",
                  "--out", "runs/mine", "--set", "training.epochs=100", cwd=here, mark=mark)  # fmt: skip
    assert wait_until(lambda: finished_trials(here / "runs" / "mine"), 400), sweep.poll()
    second = run("resume", "runs/mine", cwd=here, mark=mark)  # while the first still runs
    assert second.returncode == 2
    assert f"is being written by process {sweep.pid} on " in second.stderr
    sweep.kill()
    sweep.wait()
    before = {trial.number: trial.value for trial in finished_trials(here / "runs" / "mine")}
    assert wait_until(lambda: not marked(mark), 240)  # Ray notices after a minute
    here.rename(there)
    about = json.loads((there / "runs" / "mine" / "run.json").read_text())
    about["code"]["sources"] = "another"
    (there / "runs" / "mine" / "run.json").write_text(json.dumps(about))

    (there / "cohort").rename(there / "gone")
    lost = run("resume", there / "runs" / "mine", cwd=workplace, mark=mark)
    assert lost.returncode == 2
    assert "--cohort" in lost.stderr
    (there / "gone").rename(there / "cohort")
    resumed = run("resume", there / "runs" / "mine", cwd=workplace, mark=mark)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "the code has changed" in resumed.stdout
    after = {trial.number: trial.value for trial in study_of(there / "runs" / "mine").get_trials()}
    assert sorted(after) == [0, 1, 2, 3]
    assert before.items() <= after.items()
    each_epoch_once(there / "runs" / "mine", 4, 2, 100)
    assert not here.exists()
