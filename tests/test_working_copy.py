"""Runs in an object store: trials that go on on another machine, what is sent and brought, what is refused. No Ray."""

import json
import shutil
from pathlib import Path

import optuna
import pytest
from of_age import MAE, assign
from rich.console import Console
from s3_server import KEYS, s3_server
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.files import places
from core.files.places import list_files
from core.run_access import read_access
from core.run_names import CHECKPOINT
from distributed.batches.in_process import InMemory
from distributed.run import working_copy
from distributed.run.access import AccessRecord
from distributed.run.assignment import HOLDOUT, Cell
from distributed.run.lock import claim
from distributed.run.working_copy import (
    SCRATCH,
    address_of,
    bring,
    bring_run,
    forget,
    kept_up,
    place_of_run,
    refuse_taken,
    run_as_typed,
    send,
    send_driver,
)
from distributed.search.study import open_study
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.sweep import Launch, run_sweep
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner
from search_spaces import published

CELLS = [{"fold": 0, "seed": 0}, {"fold": 1, "seed": 0}]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def server():
    with s3_server("brains") as options:
        yield options


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """The working copy of a run that is not there yet."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    return place_of_run(f"s3://brains/runs/{tmp_path.name}?{server}")


def at_address(run):
    return [name for name, _ in list_files(address_of(run)[0])]


def another_machine(run):
    """As on a machine that has not seen the run: nothing lies in its place, and nothing is known to be sent."""
    kept = run.with_name(f"of-machine-{len(list(run.parent.iterdir()))}")
    run.rename(kept)
    working_copy._SENT.clear()
    return kept


def test_a_path_spells_its_address_and_back(run):
    url, name = address_of(run / "trials" / "0001" / "progress.json")
    assert place_of_run(url) == run
    assert name == "trials/0001/progress.json"
    assert address_of(run) == (url, "")
    assert run_as_typed(run) == url
    assert address_of(Path("/tmp/runs/a b%3A")) is None
    assert place_of_run("runs/demo") == Path("runs/demo")
    assert run_as_typed(Path.cwd() / "runs" / "demo") == "runs/demo"


def test_keys_in_an_address_are_refused_and_not_shown():
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as refused:
        place_of_run("s3://mykey:mysecret@bucket/run")
    assert "mysecret" not in str(refused.value)


def test_only_what_has_changed_is_sent_progress_last_and_some_names_never(run, monkeypatch):
    sent = []
    upload = working_copy.upload_file
    monkeypatch.setattr(
        working_copy, "upload_file", lambda file, *where: (sent.append(file.name), upload(file, *where))
    )
    for name in ("z.csv", "progress.json", "model-0/weights", "half.tmp", "tune/state"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    send(run, ["tune"])
    assert sent == ["weights", "z.csv", "progress.json"]
    assert at_address(run) == ["model-0/weights", "progress.json", "z.csv"]
    (run / "z.csv").write_text("changed")
    send(run, ["tune"])
    assert sent[3:] == ["z.csv"]
    forget(run / "z.csv")
    forget(run / "model-0")
    forget(run / "never.there")
    assert at_address(run) == ["progress.json"]


def test_bringing_makes_a_folder_what_lies_at_its_address(run):
    (run / "sub").mkdir(parents=True)
    (run / "sub" / "a").write_text("new")
    (run / "checkpoint.pt").write_text("its own")
    send(run)
    (run / "sub" / "a").write_text("stale, and longer")
    (run / "sub" / "b").write_text("was deleted elsewhere")
    (run / "checkpoint.pt").write_text("local")
    bring(run, checkpoints=False)
    assert (run / "sub" / "a").read_text() == "new"
    assert not (run / "sub" / "b").exists()
    assert (run / "checkpoint.pt").read_text() == "local"
    bring(run)
    assert (run / "checkpoint.pt").read_text() == "its own"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    cohort = write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")
    return Subjects(
        InMemory.of(cohort), cohort.manifest, make_splits(cohort.manifest, folds=2), ("stiffness",)
    )


def settings():
    return resolve(merge(published("brain_age"), SMALL)).model_dump(mode="json")


def history(folder):
    rows = json.loads((folder / "progress.json").read_text())["history"]
    return [(row["fold"], row["epoch"], row["loss"], str(row["mae"])) for row in rows]


def epochs(runner, assignment, count):
    return [runner(assignment) for _ in range(count)][-1]


def test_a_trial_that_wanders_between_machines_ends_with_the_numbers_of_one_that_stayed(
    run, subjects, tmp_path
):
    epochs(Runner(subjects), assign(tmp_path / "stayed", settings(), CELLS), 4)
    assignment = assign(run / "trials" / "0000", settings(), CELLS)
    epochs(Runner(subjects), assignment, 1)
    first = another_machine(run)
    epochs(Runner(subjects), assignment, 2)
    another_machine(run)
    first.rename(run)  # back on the first, which knows one epoch only
    answer = epochs(Runner(subjects), assignment, 1)
    assert answer["done"]
    assert history(run / "trials" / "0000") == history(tmp_path / "stayed")
    kept = ["predictions-0-0.csv", "predictions-1-0.csv", "progress.json"]
    assert at_address(run) == [f"trials/0000/{name}" for name in kept]
    shutil.rmtree(run)
    assert Runner(subjects)(assignment) == answer  # nothing is trained again


def test_a_refit_leaves_its_predictions_and_its_model_at_the_address(run, subjects):
    assignment = assign(
        run / "refits" / "winner", settings(), [{"fold": HOLDOUT, "seed": 0}], keep_model=True
    )
    assert epochs(Runner(subjects), assignment, 2)["done"]
    there = set(at_address(run))
    assert {f"refits/winner/{name}" for name in ("predictions-0.csv", "progress.json")} < there
    assert any(name.startswith("refits/winner/model-0/") for name in there)
    assert f"refits/winner/{CHECKPOINT}" not in there


def test_first_reads_are_noted_at_the_address(run):
    AccessRecord(run / "access").note([3, 1], Cell(0, 0, "0000"))
    another_machine(run)
    bring(run / "access")
    assert read_access(run / "access")["row"].tolist() == [1, 3]


def test_a_store_that_cannot_be_written_stops_the_sweep_and_not_only_the_trial(run, subjects, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("When completing multiple part upload: SLOW_DOWN")

    monkeypatch.setattr(places.fs, "copy_files", refuse)
    answer = Runner(subjects)(assign(run / "trials" / "0000", settings(), CELLS))
    assert answer["storage"]
    assert "cannot write to s3://brains/runs/" in answer["failed"]
    assert "SLOW_DOWN" in answer["failed"]
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"SLOW_DOWN.*lies in"), kept_up(run, QUIET):
        pass


def test_a_run_is_brought_without_checkpoints_and_without_what_only_its_machine_needs(run):
    for name in (
        "run.json",
        "trials/0000/progress.json",
        "trials/0000/checkpoint.pt",
        "tune/x",
        "access/a.csv",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    send(run / "trials")
    send_driver(run)
    assert at_address(run) == ["run.json", "trials/0000/checkpoint.pt", "trials/0000/progress.json"]
    another_machine(run)
    bring_run(run, QUIET)
    found = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert found == ["run.json", "trials/0000/progress.json", "writer.lock"]


def test_a_run_that_is_being_written_here_is_left_alone(run):
    (run / "trials").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    send(run)
    (run / "run.json").write_text('{"newer": 1}')
    with claim(run, QUIET):
        bring_run(run, QUIET)
    assert json.loads((run / "run.json").read_text()) == {"newer": 1}


def test_what_is_no_run_or_no_bucket_is_said_in_one_line(run, server):
    with pytest.raises(UserError, match=r"^s3://brains/runs/\S+ is not a run: it has no run.json$"):
        bring_run(run, QUIET)
    with pytest.raises(UserError, match="there is no bucket 'nobody'"):
        bring_run(place_of_run(f"s3://nobody/run?{server}"), QUIET)


def test_a_new_run_does_not_begin_where_something_lies_nor_with_a_population(run, tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort")
    with pytest.raises(UserError, match="pbt needs --out on storage that all nodes mount"):
        run_sweep(Launch(cohort.folder, SweepRequest(scheduler="pbt", trials=6), run, None, QUIET))
    (run / "run.json").parent.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    send(run)
    shutil.rmtree(run)
    with pytest.raises(
        UserError, match=r"is not empty: it has run.json; continue a run with `brainsweep resume s3:"
    ):
        run_sweep(Launch(cohort.folder, SweepRequest(), run, None, QUIET))
    refuse_taken(tmp_path)  # a folder is looked at by others


def test_a_study_is_there_on_another_machine_as_far_as_it_was_sent(run):
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    study = open_study(run / "study.journal", "random", 0, MAE)
    study.ask().suggest_float("x", 0, 1)
    with kept_up(run, QUIET):
        study.tell(0, 1.0)
    another_machine(run)
    bring_run(run, QUIET)
    (trial,) = open_study(run / "study.journal", "random", 0, MAE).get_trials()
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, 1.0)
