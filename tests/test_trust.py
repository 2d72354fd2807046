"""What a run may execute, read and overwrite when others could have written it: keys, names, links, owners."""

import io
import os
import re

import pytest
from rich.console import Console
from small_cohort import SMALL, write_small_cohort

from core.errors import UserError
from core.files.places import check_keyless, check_name, list_files, open_file
from core.volumes.cohort.reader import Cohort
from distributed.run import working_copy
from distributed.run.folder import open_run
from distributed.run.trust import check_trusted
from distributed.run.working_copy import SCRATCH, bring, own_working_copy, place_of_run
from distributed.sweeps import sweep as sweeps
from distributed.sweeps.nested import resume_run, run_or_resume
from distributed.sweeps.request import ResumeRequest, SweepRequest
from distributed.sweeps.sweep import Launch

SPACE = """
from pathlib import Path
Path(__file__).with_suffix(".executed").touch()
def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-2, log=True)
    return dict(trial.params)
"""
NOBODY = 65534
"""A user id that is not ours."""


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "..", "", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="not below it"):
        check_name(tmp_path, name)
    with pytest.raises(UserError, match="not below it"):
        open_file(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "shards/00000.h5", "a..b/..c", "outer-1/run.json", "a\\b"])
def test_other_names_are_names(name):
    assert check_name("s3://bucket/run", name) == name


class Hostile:
    """A store whose listing has a key that climbs out."""

    def __init__(self, *keys):
        self.keys = keys

    def get_file_info(self, selector):
        from pyarrow import fs

        return [fs.FileInfo(f"bucket/run/{key}", type=fs.FileType.File, size=1) for key in self.keys]


@pytest.mark.parametrize(
    "key", ["../../../home/user/.ssh/authorized_keys", "trials/../../x", "/etc/cron.d/x"]
)
def test_a_store_cannot_write_outside_the_working_copy(tmp_path, monkeypatch, key):
    monkeypatch.setattr(
        "core.files.places._connected", lambda url, _: (Hostile("run.json", key), "bucket/run")
    )
    monkeypatch.setattr(working_copy, "download", lambda url, name, file: file.write_text("planted"))
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    run = place_of_run("s3://bucket/run")
    with pytest.raises(UserError, match="not below it"):
        list(list_files("s3://bucket/run"))
    with pytest.raises(UserError, match="not below it"):
        bring(run)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_in_a_working_copy_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("core.files.places._connected", lambda url, _: (Hostile("trials/0/x"), "bucket/run"))
    monkeypatch.setattr(working_copy, "download", lambda url, name, file: file.write_text("planted"))
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    run = place_of_run("s3://bucket/run")
    bring(run)
    assert (run / "trials" / "0" / "x").read_text() == "planted"
    (tmp_path / "elsewhere" / "0").mkdir(parents=True)
    (run / "trials" / "0" / "x").unlink()
    (run / "trials" / "0").rmdir()
    (run / "trials").rmdir()
    (run / "trials").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        bring(run)
    assert list((tmp_path / "elsewhere" / "0").iterdir()) == []


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", subjects=3)
    cohort.manifest["shard"] = "../../secret.h5"
    with pytest.raises(
        UserError, match=r"names the file 'shards/\.\./\.\./secret\.h5', which is not below it"
    ):
        Cohort(cohort.location, cohort.description, cohort.manifest).read([0])


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:abc/def+x@bucket/cohort",
        "s3://AKIA:secret@bucket/cohort?region=eu",
        "abfss://container:password@account.dfs.core.windows.net/x",
        "s3://bucket/c?region=eu&secret_key=hidden",
        "abfs://c@account/x?sv=2020&sig=hidden",
        "gs://bucket/c?access_token=hidden",
    ],
)
def test_an_address_with_keys_is_refused_wherever_it_is_given(address):
    for use in (check_keyless, place_of_run, Cohort.open):
        with pytest.raises(UserError, match="must not contain keys") as refused:
            use(address)
        assert not re.search("secret@|abc/def|password@|hidden", str(refused.value))


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/a@b/c", "gs://anonymous@bucket/c", "abfss://container@account.dfs.core.windows.net/x",
     "s3://b/c?scheme=http&endpoint_override=host%3A9000&region=us-east-1", "/data/a:b@c"],
)  # fmt: skip
def test_an_address_without_keys_is_an_address(address):
    check_keyless(address)


def test_a_working_copy_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(SCRATCH, raising=False)
    run = place_of_run("s3://bucket/run")
    own_working_copy(run / "trials" / "0000")
    assert run.is_relative_to(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in (run, run.parent)} == {0o700}
    run.parent.chmod(0o777)
    own_working_copy(run)
    assert run.parent.stat().st_mode & 0o777 == 0o700
    run.rmdir()
    run.symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"is a link, so others could change what lies in it; set {SCRATCH}"):
        own_working_copy(run)


def test_a_working_copy_that_somebody_else_made_before_us_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(SCRATCH, raising=False)
    theirs = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    run = place_of_run("s3://bucket/run")
    run.mkdir(parents=True)
    run.parent.chmod(0o777)
    with pytest.raises(UserError, match=f"brainsweep-{NOBODY} belongs to user {theirs}, .*set {SCRATCH}"):
        own_working_copy(run)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that has begun, with a space in a file of the user."""
    monkeypatch.setattr(sweeps.Sweep, "execute", lambda sweep: sweep.folder)
    cohort = write_small_cohort(tmp_path / "cohort")
    (tmp_path / "mine.py").write_text(SPACE)
    request = SweepRequest(space=f"{tmp_path}/mine.py:space", folds=2, trials=3, changes=SMALL)
    command = (cohort.address, request, tmp_path / "run", None)
    run_or_resume(Launch(*command, Console(quiet=True)))
    (tmp_path / "mine.executed").unlink()
    return command


def resumed(run, **asked):
    console = Console(file=io.StringIO(), width=400)
    resume_run(run, ResumeRequest(**asked), None, console)
    return console.file.getvalue()


def test_resume_says_what_it_executes_and_executes_nothing_that_changed(run, tmp_path):
    folder, mine = tmp_path / "run", tmp_path / "mine.py"
    assert f"note: executing {mine}, unchanged" in resumed(folder)
    (tmp_path / "mine.executed").unlink()
    mine.write_text(SPACE + "\n# one more line\n")
    with pytest.raises(UserError, match=r"would execute .*mine\.py, and it has changed .*--trust-space"):
        resumed(folder)
    assert not (tmp_path / "mine.executed").exists()
    assert "trusted by you" in resumed(folder, trust_space=True)
    assert "unchanged" in resumed(folder)  # what was trusted is known from now on
    mine.write_text(SPACE)
    run_or_resume(Launch(*run, Console(quiet=True)))  # typed again, so it is meant


def test_a_file_of_another_owner_or_named_by_another_is_not_executed(run, tmp_path, monkeypatch):
    folder, ours = open_run(tmp_path / "run"), os.getuid()
    known = folder.about.space_file
    folder.update(space_file=known.model_copy(update={"owner": NOBODY}))
    with pytest.raises(
        UserError, match=f"belonged to user {NOBODY} when the run began, and now to user {ours}"
    ):
        resumed(folder.path)
    folder.update(space_file=known)
    monkeypatch.setattr("distributed.run.trust._is_ours", lambda path: path.name != "run.json")
    with pytest.raises(UserError, match=r"run\.json, which names it, belongs to another user"):
        resumed(folder.path)
    monkeypatch.setattr("distributed.run.trust._is_ours", lambda path: path.name == "run.json")
    with pytest.raises(UserError, match=f"it belongs to user {ours}"):
        resumed(folder.path)
    assert not (tmp_path / "mine.executed").exists()
    monkeypatch.undo()
    monkeypatch.setattr("distributed.run.trust.address_of", lambda path: ("s3://bucket/run", ""))
    with pytest.raises(UserError, match="everyone who can write to"):
        check_trusted(folder, f"{tmp_path}/mine.py:space", Console(quiet=True), is_trusted=False)
    check_trusted(folder, f"{tmp_path}/mine.py:space", Console(quiet=True), is_trusted=True)
    check_trusted(folder, "brain_age", Console(quiet=True), is_trusted=False)


@pytest.mark.parametrize("name", ["mine.py", "run/run.json"])
def test_a_file_that_every_user_may_write_is_not_executed(run, tmp_path, name):
    (tmp_path / name).chmod(0o666)
    with pytest.raises(UserError, match=f"every user of this machine may write .*{name}"):
        resumed(tmp_path / "run")
    # Nor does an option that is kept in run.json make it a file of ours first.
    for _ in range(2):
        with pytest.raises(UserError, match=f"every user of this machine may write .*{name}"):
            resumed(tmp_path / "run", accelerator_hours=3.0)
    assert not (tmp_path / "mine.executed").exists()
    assert "trusted by you" in resumed(tmp_path / "run", trust_space=True)


def test_a_run_of_an_older_version_goes_on_and_says_that_no_checksum_was_kept(run, tmp_path):
    open_run(tmp_path / "run").update(space_file=None)
    assert "of which no checksum was kept" in resumed(tmp_path / "run")
    assert "unchanged" in resumed(tmp_path / "run")
