"""Who may write a run, and what a killed writer leaves in its journal. Second processes, no Ray."""

import os
import subprocess
import sys

import pytest
from process_helpers import ROOT
from rich.console import Console

from core.errors import UserError
from core.run_names import LOCK
from distributed.run.lock import claim, refuse_url

QUIET = Console(quiet=True)
HOLDER = """
import sys
from pathlib import Path
from rich.console import Console
from distributed.run.lock import claim
with claim(Path(sys.argv[1]), Console(quiet=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert started.stdout.readline() == "held\n"
    yield started
    started.kill()
    started.wait()


def test_a_second_writer_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with (
        pytest.raises(UserError, match=f"is being written by process {holder.pid} on "),
        claim(tmp_path, QUIET),
    ):
        pass


def test_the_lock_of_a_killed_writer_is_gone(holder, tmp_path):
    holder.kill()
    holder.wait()
    with claim(tmp_path, QUIET):
        assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    with claim(tmp_path, QUIET):  # and so is that of one that ended by itself
        pass


def test_the_same_folder_by_another_path_is_the_same_run(holder, tmp_path):
    (tmp_path.parent / "another-path").unlink(missing_ok=True)
    (tmp_path.parent / "another-path").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is being written"), claim(tmp_path.parent / "another-path", QUIET):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="gone"), claim(tmp_path / "gone", QUIET):
        pass


@pytest.mark.parametrize("out", ["s3://bucket/run", "s3:/bucket/run", "gs://bucket/run", "abfss://x@y/run"])
def test_a_run_in_an_object_store_is_refused(out):
    with pytest.raises(UserError, match="storage that all nodes mount"):
        refuse_url(out)


def test_folders_are_not_taken_for_addresses(tmp_path):
    for out in (tmp_path, "runs/2026-11-21", "a:b/c", "./s3:/x"):
        refuse_url(out)
