"""Who may write a run, and what a killed writer leaves in its journal. Second processes, no Ray."""

import json
import multiprocessing
import os
import subprocess
import sys

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from process_helpers import ROOT
from rich.console import Console

from core.errors import UserError
from core.run_names import LOCK
from distributed.run.lock import claim, mend_journal, refuse_url

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


def study_in(journal):
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(storage=storage, study_name="brainsweep", load_if_exists=True)


def ask_once(journal):
    study_in(journal).ask()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_line_torn_off_anywhere_costs_that_line_alone(tmp_path, kept):
    journal = tmp_path / "study.journal"
    study = study_in(journal)
    for value in (1.0, 2.0):
        study.tell(study.ask(), value)
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole[: -len(last)] + last[: max(1, int(kept * len(last)) - 1)])

    torn = mend_journal(journal)
    assert torn == max(1, int(kept * len(last)) - 1)
    resumed = study_in(journal)
    resumed.tell(1, 2.0)  # the value that was torn off
    resumed.tell(resumed.ask(), 3.0)
    assert [trial.value for trial in study_in(journal).trials] == [1.0, 2.0, 3.0]
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())
    assert mend_journal(journal) == 0


def test_unmended_the_study_could_be_read_no_more(tmp_path):
    """Why `mend_journal` is there; if this fails, Optuna mends it by itself."""
    journal = tmp_path / "study.journal"
    study_in(journal).tell(study_in(journal).ask(), 1.0)
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,')
    with pytest.raises(ValueError, match=r"Expecting|Invalid|delimiter"):
        ask_once(journal)


def test_the_lock_of_a_writer_killed_in_a_folder_since_moved_is_cleared(tmp_path):
    (tmp_path / "here").mkdir()
    journal = tmp_path / "here" / "study.journal"
    ask_once(journal)
    (tmp_path / "here" / "study.journal.lock").symlink_to(journal)  # as Optuna makes it
    moved = (tmp_path / "here").rename(tmp_path / "there") / "study.journal"

    process = multiprocessing.get_context("fork").Process(target=ask_once, args=(moved,))
    mend_journal(moved)
    process.start()
    process.join(20)
    waits = process.is_alive()
    process.kill()
    assert not waits
    assert len(study_in(moved).trials) == 2


@pytest.mark.parametrize("out", ["s3://bucket/run", "s3:/bucket/run", "gs://bucket/run", "abfss://x@y/run"])
def test_a_run_in_an_object_store_is_refused(out):
    with pytest.raises(UserError, match="storage that all nodes mount"):
        refuse_url(out)


def test_folders_are_not_taken_for_addresses(tmp_path):
    for out in (tmp_path, "runs/2026-11-21", "a:b/c", "./s3:/x"):
        refuse_url(out)
