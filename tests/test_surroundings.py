"""Machines that lack something: a name for the user, a home, short paths, the time to start Ray."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from rich.console import Console

from core.errors import UserError
from distributed.slots import cluster

ROOT = Path(__file__).parents[1]


def in_a_process_without_a_name(code):
    """Run `code` where the user id has no name, as in a container; returns what it printed."""
    nameless = (
        "import pwd\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
    )
    return subprocess.run(
        [sys.executable, "-c", nameless + code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_user_id_without_a_name_is_enough():
    asks = "import getpass; print(getpass.getuser())"
    assert "uid not found" in in_a_process_without_a_name(asks).stderr
    named = in_a_process_without_a_name("import core\n" + asks)
    assert named.stdout == f"user-{os.getuid()}\n"


def test_ray_gets_a_token_where_home_cannot_be_written(tmp_path, monkeypatch):
    for name in (cluster.TOKEN, f"{cluster.TOKEN}_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster._ensure_token()
    assert cluster.TOKEN not in os.environ  # Ray keeps its own in ~/.ray
    monkeypatch.setenv("HOME", "/proc/nowhere")
    cluster._ensure_token()
    token = os.environ[cluster.TOKEN]
    assert len(token) == 64
    cluster._ensure_token()
    assert os.environ[cluster.TOKEN] == token
    monkeypatch.delenv(cluster.TOKEN)
    # Without HOME the home of a user comes from passwd, and a user without a name has no entry there.
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    cluster._ensure_token()
    assert len(os.environ.pop(cluster.TOKEN)) == 64


@pytest.mark.parametrize("length", [4, 38, 39, 40, 60, 100])
def test_a_long_tmpdir_is_not_used_for_sockets(tmp_path, monkeypatch, length):
    monkeypatch.setattr(cluster.tempfile, "tempdir", "/" + "x" * (length - 1))
    monkeypatch.setattr(cluster, "own_folder", lambda folder, variable: None)
    chosen = cluster._short_folder() or f"{cluster.tempfile.gettempdir()}/ray"
    # The path of a socket as Ray makes it, of the longest process id of Linux.
    socket = f"{chosen}/session_2026-11-26_17-14-31_741148_4194304/sockets/plasma_store"
    assert len(socket.encode()) <= 107
    assert chosen.startswith("/x") == (length <= 39)


def test_ray_that_does_not_start_is_one_line(monkeypatch):
    def times_out(**options):
        raise Exception("The current node timed out during startup.\nThis could happen")  # as Ray raises it

    monkeypatch.setattr(ray, "init", times_out)
    said = "Ray did not start: The current node timed out"
    with pytest.raises(UserError, match=said) as refused, cluster.connect(None, Console(file=io.StringIO())):
        pass
    assert "\n" not in str(refused.value)
    assert "TMPDIR" in str(refused.value)
