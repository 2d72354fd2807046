"""Sweeps as second processes: how tests start them, wait for what they leave, and see that nothing stays behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend
from small_cohort import SMALL

ROOT = Path(__file__).parents[1]
MARK = "BRAINSWEEP_TEST"
"""The environment variable by which a test finds all processes that come of one it started, and no others."""
MADE_SMALL = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def command(*arguments):
    """`brainsweep ARGUMENTS`; a sweep of brain age is made small first, so that ARGUMENTS have the last word."""
    first, *rest = map(str, arguments)
    is_small = first != "sweep" or "--task" in rest
    return [sys.executable, "-m", "distributed", first, *([] if is_small else MADE_SMALL), *rest]


def environment(mark="", **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    wanted = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120", MARK: mark}
    return kept | wanted | more


def run(*arguments, cwd, **more):
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def start(*arguments, cwd, **more):
    """A sweep in the background, in a process group of its own as a shell would start it."""
    return subprocess.Popen(
        command(*arguments), cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def marked(mark):
    """Processes, zombies aside, that carry the mark in their environment, and their command lines."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        try:
            is_other = entry.name.isdigit() and int(entry.name) != os.getpid()
            if is_other and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def kill_when(condition, sweep, mark):
    """Kill the driver of `sweep` as soon as `condition` holds, and wait until its Ray has ended, too."""
    try:
        assert wait_until(lambda: condition() or sweep.poll() is not None, 400)
        assert sweep.poll() is None, f"it ended by itself, with exit code {sweep.returncode}"
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    assert wait_until(lambda: not marked(mark), 240), "Ray outlived its driver"


def end_marked(mark, patience=8, signals=(signal.SIGTERM, signal.SIGKILL)):
    """End what carries the mark, by one signal after another; returns what is left."""
    for number in signals:
        for process in marked(mark):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        if wait_until(lambda: not marked(mark), patience):
            break
    return marked(mark)


def wait_until(condition, seconds):
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def study_of(folder):
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name="brainsweep", storage=storage)


def trials_of(folder, *states):
    """The trials of a run in `states` (all, if none are given), also while its study is not there yet."""
    if not (folder / "study.journal").exists():
        return []
    try:
        return study_of(folder).get_trials(states=states or None)
    except KeyError:
        return []


def finished_trials(folder):
    return [trial for trial in trials_of(folder) if trial.state.is_finished()]


def progress_of(folder, number):
    path = folder / "trials" / f"{number:04d}" / "progress.json"
    return json.loads(path.read_text()) if path.exists() else {"history": [], "cells": [], "answer": None}
