"""Sweeps on a running Ray cluster, as cluster.yaml sets it up: token, localhost dashboard, submitted jobs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import (
    MADE_SMALL,
    ROOT,
    end_marked,
    environment,
    free_ports,
    study_of,
    wait_until,
)
from small_cohort import write_small_cohort

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PACKAGES = ("core", "distributed", "search_spaces")
FILES = ("brainsweep.py", ".rayignore")
THIS_RUN = f"jobs-{os.getpid()}"  # two runs of these tests must not end each other
TOKEN = "0123456789abcdef" * 4
LEFT_BEHIND = (
    "run.json",
    "study.journal",
    "trials.csv",
    "holdout.csv",
    "report.html",
    "best/model.safetensors",
)


class Head:
    """A head started by `ray start`, and how to talk to it."""

    def __init__(self, folder):
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's socket paths may have 107 bytes
        token = folder / "token"
        token.write_text(TOKEN)
        self.environment = environment(
            THIS_RUN,
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_JOB_STOP_SIGNAL="SIGINT",
            RAY_JOB_STOP_WAIT_TIME_S="60",
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="900",
        )
        del self.environment["PYTHONPATH"]  # a job runs what it brought along
        gcs, dashboard, agent, client = free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        started = self.run(
            "ray", "start", "--head", "--port", gcs, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard,
            # A second cluster on one machine would fail to bind the agent's usual port, and take no jobs.
            "--dashboard-agent-listen-port", agent, "--ray-client-server-port", client, "--num-cpus", 2,
            "--object-store-memory", 200_000_000, "--temp-dir", self.temporary, "--disable-usage-stats", cwd=folder,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr

    def run(self, *words, cwd):
        return subprocess.run(
            list(map(str, words)),
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def job(self, *words, cwd, wait=True):
        options = ["--address", self.dashboard, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.run(
            "ray", "job", "submit", *options, "--", "python", "-m", "distributed", *words, cwd=cwd
        )

    def stop(self):
        """End what this head started, found by the mark in the environment: another Ray may run here."""
        left = end_marked(THIS_RUN)
        shutil.rmtree(self.temporary, ignore_errors=True)
        assert not left, f"processes left behind: {left}"


def status_of(address, token=None):
    request = urllib.request.Request(f"{address}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user submits from: the sources, among data and runs that must not travel."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, folder)
    for heavy in (
        "cohorts/study/shards/00000.h5",
        "runs/old/run.json",
        "scan.nii.gz",
        ".mypy_cache/3.11/a.json",
    ):
        (folder / heavy).parent.mkdir(parents=True, exist_ok=True)
        (folder / heavy).write_text("stays here")
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Stands for the storage that every node mounts."""
    folder = tmp_path_factory.mktemp("shared")
    write_small_cohort(folder / "cohort", subjects=24)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        yield head
    finally:
        head.stop()


def sweep(shared, out, trials=3):
    cells = ["--folds", 2, "--slots", 1]
    return ["sweep", shared / "cohort", "--trials", trials, *cells, "--out", shared / out, *MADE_SMALL]


def check_run(folder, trials):
    for name in LEFT_BEHIND:
        assert (folder / name).exists(), name
    about = json.loads((folder / "run.json").read_text())
    assert about["finished"]
    assert len(pd.read_csv(folder / "trials.csv")) == trials


def test_without_the_token_nothing_is_answered(head):
    assert status_of(head.dashboard) == 401
    assert status_of(head.dashboard, "f" * 64) in (401, 403)
    assert status_of(head.dashboard, TOKEN) == 200
    port = int(head.dashboard.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):  # another address of this machine, as a stranger would come
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_driver_with_another_token_is_refused(head, shared, tmp_path):
    (tmp_path / "token").write_text("f" * 64)
    stranger = head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    words = [*sweep(shared, "refused", 1), "--address", head.address]
    done = subprocess.run(
        [sys.executable, "-m", "distributed", *map(str, words)],
        cwd=ROOT, env=stranger, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"no Ray cluster at {head.address}" in done.stderr
    assert not (shared / "refused" / "trials.csv").exists()


def test_a_submitted_sweep_runs_and_leaves_its_run_folder(head, checkout, shared):
    done = head.job(*sweep(shared, "submitted"), cwd=checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout + done.stderr
    assert "Leaderboard" in done.stdout
    check_run(shared / "submitted", trials=3)

    [uploaded] = head.temporary.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    travelled = {str(path.relative_to(uploaded)) for path in uploaded.rglob("*") if path.is_file()}
    assert "distributed/commands/app.py" in travelled
    assert {Path(name).parts[0] for name in travelled} <= {*PACKAGES, *FILES}


def test_a_connected_driver_sweeps_on_the_same_cluster(head, shared):
    done = head.run(sys.executable, "-m", "distributed", *sweep(shared, "connected", 2), "--address", head.address,
                      cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(shared / "connected", trials=2)


def test_a_stopped_job_ends_gracefully_and_says_how_to_resume(head, checkout, shared):
    submitted = head.job(*sweep(shared, "stopped", 60), "--scheduler", "none", cwd=checkout, wait=False)
    assert submitted.returncode == 0, submitted.stderr[-3000:]
    job = next(word.strip("'") for word in submitted.stdout.split() if word.startswith("'raysubmit_"))
    finished = shared / "stopped" / "trials" / "0001" / "progress.json"
    assert wait_until(finished.exists, 90)
    stopped = head.run("ray", "job", "stop", "--address", head.dashboard, job, cwd=checkout)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    logs = head.run("ray", "job", "logs", "--address", head.dashboard, job, cwd=checkout).stdout
    assert "brainsweep resume" in logs, logs[-3000:]
    assert (shared / "stopped" / "report.html").exists()
    assert not json.loads((shared / "stopped" / "run.json").read_text())["finished"]


def states(folder):
    return [trial.state for trial in study_of(folder).get_trials()]


def connected(head, shared, out, *more):
    """A driver in the background that is connected to the cluster."""
    words = [*sweep(shared, out, 4), "--scheduler", "none", "--address", head.address, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "distributed", *map(str, words)], cwd=ROOT, env=head.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.campaign
def test_what_a_killed_driver_had_reserved_is_free_for_the_next_sweep(head, shared):
    killed = connected(head, shared, "killed", "--slots", 2, "--set", "training.epochs=50")
    assert wait_until((shared / "killed" / "trials" / "0001" / "progress.json").exists, 300)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    following = connected(head, shared, "following", "--slots", 2)  # both CPUs, which the killed one had
    out, err = following.communicate(timeout=400)
    assert following.returncode == 0, out[-2000:] + err[-2000:]
    assert "2 slots of 1 worker(s)" in out
    assert states(shared / "following") == [TrialState.COMPLETE] * 4


@pytest.mark.campaign
def test_two_sweeps_at_once_that_both_want_the_whole_cluster_both_end(head, shared):
    sweeps = [connected(head, shared, name, "--slots", 2) for name in ("one", "other")]
    for name, started in zip(("one", "other"), sweeps, strict=True):
        out, err = started.communicate(timeout=400)
        assert started.returncode == 0, out[-2000:] + err[-2000:]
        assert states(shared / name) == [TrialState.COMPLETE] * 4
        check_run(shared / name, trials=4)
