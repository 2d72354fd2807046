"""Where a run finds its cohort again: recorded, beside it after a copy, or told; and never another one. No Ray."""

import json
import shutil

import pytest
from small_cohort import write_small_cohort

from core.errors import UserError
from distributed.run.folder import cohort_of, create_run, open_run


@pytest.fixture
def study(tmp_path):
    """A folder with a cohort and, further down, a run on it."""
    folder = tmp_path / "here"
    cohort = write_small_cohort(folder / "cohorts" / "small", subjects=6)
    create_run(folder / "runs" / "mine", "sweep", {}, {}, cohort)
    return folder


def recorded(run):
    return json.loads((run / "run.json").read_text())["cohort"]["path"]


def test_where_it_was_recorded(study):
    assert cohort_of(open_run(study / "runs" / "mine")).folder == study / "cohorts" / "small"


def test_beside_the_run_after_both_were_moved_and_this_is_recorded(study, tmp_path):
    there = study.rename(tmp_path / "there")
    assert cohort_of(open_run(there / "runs" / "mine")).folder == there / "cohorts" / "small"
    assert recorded(there / "runs" / "mine") == str(there / "cohorts" / "small")


def test_by_another_path_to_the_same_folder(study, tmp_path):
    (tmp_path / "mounted").symlink_to(study)
    run = open_run(tmp_path / "mounted" / "runs" / "mine")
    assert cohort_of(run).description.hash
    assert recorded(study / "runs" / "mine") == str(study / "cohorts" / "small")


def test_where_it_is_told_to_be(study, tmp_path):
    shutil.move(study / "cohorts" / "small", tmp_path / "elsewhere")
    run = open_run(study / "runs" / "mine")
    with pytest.raises(UserError, match=r"is not at .*cohorts/small; give its new place with --cohort"):
        cohort_of(run)
    assert cohort_of(run, tmp_path / "elsewhere").folder == tmp_path / "elsewhere"
    assert cohort_of(run).folder == tmp_path / "elsewhere"  # from now on


def test_another_cohort_is_refused_wherever_it_lies(study, tmp_path):
    write_small_cohort(tmp_path / "other", subjects=6, seed=1)
    with pytest.raises(UserError, match="another cohort than the run began with"):
        cohort_of(open_run(study / "runs" / "mine"), tmp_path / "other")
    shutil.rmtree(study / "cohorts" / "small")
    write_small_cohort(study / "cohorts" / "small", subjects=7)
    with pytest.raises(UserError, match="would not be comparable"):
        cohort_of(open_run(study / "runs" / "mine"))


def test_a_run_in_an_object_store_is_refused_before_anything_is_made(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cohort = cohort_of(open_run(study / "runs" / "mine"))
    with pytest.raises(UserError, match="s3 address"):
        create_run("s3://bucket/run", "sweep", {}, {}, cohort)
    assert not (tmp_path / "s3:").exists()


def test_a_run_and_its_cohort_that_moved_together_are_found_though_another_cohort_took_the_old_place(
    study, tmp_path
):
    there = tmp_path / "there"
    shutil.move(study, there)
    write_small_cohort(study / "cohorts" / "small", subjects=7)
    assert cohort_of(open_run(there / "runs" / "mine")).folder == there / "cohorts" / "small"
