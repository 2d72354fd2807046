"""The SLURM template, run: two nodes that are this machine, and in place of srun and scontrol what starts them here."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from optuna.trial import TrialState
from process_helpers import (
    MADE_SMALL,
    ROOT,
    end_marked,
    environment,
    finished_trials,
    marked,
    trials_of,
    wait_until,
)
from small_cohort import write_small_cohort

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]

# srun OPTIONS… COMMAND…: the options that the template uses, then the command in this very process.
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do
    if [ "$1" = -w ]; then echo "$2" >> "$SHIM_LOG"; shift; fi
    shift
done
stat -c '%a' "$RAY_AUTH_TOKEN_PATH" >> "$SHIM_LOG"
exec "$@"
"""
SCONTROL = "#!/bin/bash\necho node-a\necho node-b\n"


@pytest.fixture
def allocation(tmp_path):
    """What sbatch gives a job of two nodes with one CPU each."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "secrets").mkdir()
    write_small_cohort(tmp_path / "cohort", subjects=24)
    mark = f"slurm-{os.getpid()}"
    given = environment(
        mark,
        PATH=f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        SLURM_JOB_ID=str(os.getpid() % 300 + 300),
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_CPUS_PER_TASK="1",
        BRAINSWEEP_VENV=str(tmp_path / "none"),
        BRAINSWEEP_SECRETS=str(tmp_path / "secrets"),
        SHIM_LOG=str(tmp_path / "shim.log"),
    )
    yield tmp_path, given
    assert not end_marked(mark, 10)


def sbatch(folder, given, trials):
    words = [
        folder / "run",
        folder / "cohort",
        "--trials",
        trials,
        "--folds",
        2,
        "--scheduler",
        "none",
        *MADE_SMALL,
    ]
    return subprocess.Popen(
        ["bash", "distributed/clusters/slurm.sbatch", *map(str, words)],
        cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_job_runs_on_its_nodes_is_stopped_in_time_and_continued_by_the_same_line(allocation):
    folder, given = allocation
    run = folder / "run"
    job = sbatch(folder, given, 5)
    assert wait_until(lambda: finished_trials(run) or job.poll() is not None, 400)
    assert job.poll() is None, job.communicate()[0][-3000:]

    base = 20000 + int(given["SLURM_JOB_ID"]) % 300 * 40
    address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    socket.create_connection((address, base), timeout=5).close()  # the head, which asks for the token
    socket.create_connection(("127.0.0.1", base + 1), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # the dashboard, as the network sees it
        socket.create_connection((address, base + 1), timeout=5)
    [token] = (folder / "secrets").glob(".brainsweep-*/token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    shim = (folder / "shim.log").read_text().split()
    assert shim == ["node-a", "600", "node-b", "600"]
    stranger = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", f"{address}:{base}"],
        env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert stranger.returncode != 0
    assert "Resources" not in stranger.stdout

    job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@600 does
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 0, out[-3000:]
    assert "head on node-a" in out
    assert "2 slots of 1 worker(s)" in out
    assert "brainsweep resume" in out
    before = {trial.number: trial.value for trial in finished_trials(run)}
    assert 1 <= len(before) < 5
    assert not list((folder / "secrets").iterdir())
    assert wait_until(lambda: not marked(given["BRAINSWEEP_TEST"]), 40), marked(given["BRAINSWEEP_TEST"])

    again = sbatch(folder, given, 5)
    out = again.communicate(timeout=500)[0]
    assert again.returncode == 0, out[-3000:]
    after = {trial.number: trial.value for trial in trials_of(run, TrialState.COMPLETE)}
    assert sorted(after) == list(range(5))
    assert before.items() <= after.items()
    assert json.loads((run / "run.json").read_text())["finished"]
    assert len(pd.read_csv(run / "trials.csv")) == 5
