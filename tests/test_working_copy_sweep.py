"""Sweeps into an object store: from one machine to another, and on nodes that share no disk. Real Ray and S3 server."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import (
    command,
    end_marked,
    environment,
    finished_trials,
    free_ports,
    progress_of,
    run,
    study_of,
    wait_until,
)
from s3_server import KEYS, s3_server
from small_cohort import write_small_cohort
from test_survival import each_epoch_once

from distributed.run.working_copy import SCRATCH

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]


@pytest.fixture
def workplace(tmp_path):
    write_small_cohort(tmp_path / "cohort", subjects=24)
    return tmp_path


def test_a_sweep_into_an_object_store_goes_on_on_another_machine(workplace):
    """The power fails on one machine; the other has the address, and a disk on which nothing lies."""
    with s3_server("brains") as options:
        address = f"s3://brains/runs/demo?{options}"
        first, second = ({SCRATCH: str(workplace / name), **KEYS} for name in ("first", "second"))
        mark = f"away-{os.getpid()}"
        sweep = subprocess.Popen(
            command("sweep", "cohort", "--trials", 5, "--folds", 2, "--slots", 2, "--out", address,
                    "--scheduler", "none", "--set", "training.epochs=6"),
            cwd=workplace, env=environment(mark, **first), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        folder = Path(first[SCRATCH]) / quote(address, safe="")
        try:
            assert wait_until(lambda: len(finished_trials(folder)) >= 2, 400)
        finally:
            left = end_marked(mark, 20, [signal.SIGKILL])
            sweep.wait()
            killed_at = time.time()
        assert not left
        finished = {trial.number: (trial.value, trial.params) for trial in finished_trials(folder)}
        trained = sum(len(progress_of(folder, number)["history"]) for number in range(5))
        shutil.rmtree(first[SCRATCH])

        resumed = run("resume", address, cwd=workplace, mark=mark, **second)
        assert resumed.returncode == 0, resumed.stderr
        folder = Path(second[SCRATCH]) / quote(address, safe="")
        trials = study_of(folder).get_trials()
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
        assert {number: (trials[number].value, trials[number].params) for number in finished} == finished
        history = pd.read_csv(folder / "history.csv")
        assert len(history) == 5 * 2 * 6
        # each slot may have trained an epoch that was not sent any more
        assert (history["first_step_at"] < killed_at).sum() >= trained - 2

        shutil.rmtree(second[SCRATCH])
        report = run("report", address, cwd=workplace, **first)
        assert report.returncode == 0, report.stderr
        assert "Leaderboard" in report.stdout
        evaluated = run("evaluate", address, "cohort", cwd=workplace, **first)
        assert evaluated.returncode == 0, evaluated.stderr


class Nodes:
    """A Ray cluster on this machine whose second node sees an empty disk where the first has its working copies."""

    def __init__(self, workplace, mark, **more):
        self.scratch, self.mark, self.more = workplace / "scratch", mark, more | {"RAY_AUTH_MODE": "disabled"}
        self.scratch.mkdir()
        self.temporary = tempfile.mkdtemp(prefix="ray-")  # short: Ray's socket paths may have 107 bytes
        gcs, dashboard, agent, client = free_ports(4)
        self.address = f"127.0.0.1:{gcs}"
        self._start(
            mark, "--head", "--port", gcs, "--temp-dir", self.temporary, "--include-dashboard", "false",
            "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent, "--ray-client-server-port", client,
        )  # fmt: skip

    def given(self, mark):
        return environment(mark, **{SCRATCH: str(self.scratch), **self.more})

    def add(self, mark):
        """Another node, whose processes carry `mark`."""
        [agent] = free_ports(1)
        own_disk = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {self.scratch} && exec "$@"', "sh"]
        self._start(mark, "--address", self.address, "--dashboard-agent-listen-port", agent, before=own_disk)

    def _start(self, mark, *words, before=()):
        ray = Path(sys.executable).with_name("ray")
        size = ["--num-cpus", 1, "--object-store-memory", 80_000_000, "--disable-usage-stats"]
        started = subprocess.run(
            [*before, *map(str, [ray, "start", *words, *size])],
            env=self.given(mark), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk of its own for a node")
def test_nodes_without_a_disk_in_common_one_of_which_is_lost(workplace):
    marks = [f"apart-{number}-{os.getpid()}" for number in range(3)]
    with s3_server("brains") as options:
        address = f"s3://brains/runs/demo?{options}"
        nodes = Nodes(workplace, marks[0], **KEYS)
        folder = nodes.scratch / quote(address, safe="")
        words = command(
            "sweep", "cohort", "--trials", 6, "--folds", 2, "--slots", 2, "--scheduler", "none", "--out", address,
            "--set", "training.epochs=4", "--address", nodes.address,
        )  # fmt: skip
        with (workplace / "log").open("w") as log:
            try:
                nodes.add(marks[1])
                sweep = subprocess.Popen(
                    words, cwd=workplace, env=nodes.given(marks[0]), stdout=log, stderr=log
                )
                assert wait_until(lambda: len(finished_trials(folder)) >= 2, 400), (
                    workplace / "log"
                ).read_text()
                seen = [progress_of(folder, number)["history"] for number in range(6)]
                assert not all(
                    seen[trial.number] for trial in finished_trials(folder)
                )  # one is on the other's disk
                assert not end_marked(marks[1], 20, [signal.SIGKILL])
                nodes.add(marks[2])
                sweep.wait(timeout=500)
            finally:
                left = [end_marked(mark) for mark in marks]
                shutil.rmtree(nodes.temporary, ignore_errors=True)
        assert sweep.returncode == 0, (workplace / "log").read_text()[-3000:]
        assert [trial.state for trial in study_of(folder).get_trials()] == [TrialState.COMPLETE] * 6
        each_epoch_once(folder, 6, 2, 4)
        assert not any(left)
