"""One command begins a run or continues it, whatever an earlier process has left; no Ray."""

import io
import shutil

import optuna
import pandas as pd
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from small_cohort import SMALL, write_small_cohort

from core.errors import UserError
from core.run_names import JOURNAL, RUN_JSON, SPLITS
from distributed.run import folder as folders
from distributed.run.folder import open_run
from distributed.sweeps import sweep as sweeps
from distributed.sweeps import train_one as training
from distributed.sweeps.launch import Launch
from distributed.sweeps.nested import resume_run, run_or_resume
from distributed.sweeps.request import ResumeRequest, SweepRequest, TrainRequest
from distributed.training.trial import Runner

RATE = "optimiser.learning_rate"
SPACE = f"""
def space(trial):
    trial.suggest_float("{RATE}", 1e-5, 1e-2, log=True)
    return dict(trial.params)
"""


class KilledError(BaseException):
    """In place of a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small", subjects=24)


@pytest.fixture
def begin(cohort, tmp_path, monkeypatch):
    """begin(name): the command of a batch job, whose sweep runs nothing; returns what it printed."""
    (tmp_path / "mine.py").write_text(SPACE)
    (tmp_path / "points.yaml").write_text(yaml.safe_dump([{RATE: 3e-3}, {RATE: 4e-3}]))
    monkeypatch.setattr(sweeps.Sweep, "execute", lambda sweep: sweep.folder)

    def command(name, **changes):
        request = SweepRequest(space=f"{tmp_path}/mine.py:space", folds=2, trials=6, changes=SMALL, **changes)
        said = Console(file=io.StringIO(), width=300)
        run_or_resume(Launch(cohort.address, request, tmp_path / name, None, said, tmp_path / "points.yaml"))
        return said.file.getvalue()

    return command


def points_of(run):
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(run / JOURNAL)))
    study = optuna.load_study(study_name="brainsweep", storage=storage)
    return [(trial.system_attrs["fixed_params"], trial.user_attrs) for trial in study.get_trials()]


MOMENTS = {
    "before run.json is there": (folders, "write_text", 1),
    "before the study": (sweeps, "open_study", 1),
    "before the splits": (sweeps, "write_splits", 1),
    "before the first point": (sweeps, "enqueue", 1),
    "between the points": (sweeps, "enqueue", 2),
    "before it is marked as begun": (folders.RunFolder, "update", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_of_its_beginning_it_begins_again(begin, tmp_path, monkeypatch, moment):
    begin("whole")
    owner, name, times = MOMENTS[moment]
    real, calls = getattr(owner, name), []

    def counted(*arguments, **more):
        calls.append(1)
        if len(calls) == times:
            raise KilledError
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(KilledError):
            begin("half")
    begin("half")
    assert open_run(tmp_path / "half").about.begun
    assert points_of(tmp_path / "half") == points_of(tmp_path / "whole")
    assert [attributes.get("label") for _, attributes in points_of(tmp_path / "half")] == [
        "published",
        "enqueued",
        "enqueued",
    ]
    assert (tmp_path / "half" / SPLITS).read_bytes() == (tmp_path / "whole" / SPLITS).read_bytes()


def test_a_folder_with_what_is_no_run_is_not_taken(begin, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        begin("mine")


def test_a_run_of_another_kind_is_not_continued_as_a_sweep(begin, tmp_path):
    begin("run")
    open_run(tmp_path / "run").update(kind="train")
    with pytest.raises(
        UserError, match="is a 'train' run, and this command begins or continues a 'sweep' run"
    ):
        begin("run")


def test_what_is_recorded_wins_and_is_said(begin, tmp_path):
    assert "goes on as it was recorded" not in begin("run")
    assert "goes on as it was recorded" not in begin("run")
    said = begin("run", search_seed=3, time_budget=60)
    assert "note: " in said
    assert "goes on as it was recorded: search-seed 0, not 3" in said
    assert "time" not in said.partition("recorded")[2].splitlines()[0]


def test_a_run_that_has_not_begun_is_not_changed(begin, tmp_path):
    begin("run")
    open_run(tmp_path / "run").update(begun=False)
    with pytest.raises(UserError, match=r"stopped before its first trial.*cannot be changed \(--trials\)"):
        resume_run(tmp_path / "run", ResumeRequest(trials=9, change_search=True), None, Console(quiet=True))
    assert (tmp_path / "run" / JOURNAL).exists()


def test_a_training_run_goes_on_from_its_last_epoch(cohort, tmp_path, monkeypatch):
    request = TrainRequest(folds=2, changes=SMALL | {"training.epochs": 4})
    console = Console(quiet=True)
    training.train_one(cohort.address, request, tmp_path / "whole", None, console)
    epochs = []

    def killed_in_the_third(runner, assignment, real=Runner.__call__):
        if len(epochs) == 2:
            raise KilledError
        epochs.append(1)
        return real(runner, assignment)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "__call__", killed_in_the_third)
        with pytest.raises(KilledError):
            training.train_one(cohort.address, request, tmp_path / "half", None, console)
    with pytest.raises(UserError, match=r"a training run cannot be changed \(--trials\)"):
        resume_run(tmp_path / "half", ResumeRequest(trials=9), None, console)
    resume_run(tmp_path / "half", ResumeRequest(), None, console)
    whole, half = (pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "half"))
    same = ["epoch", "loss", "mae", "learning_rate"]
    pd.testing.assert_frame_equal(whole[same], half[same])
    assert (tmp_path / "half" / "best").is_dir()
    assert len(half["first_step_at"].unique()) == 4
    assert open_run(tmp_path / "half").about.finished
    resume_run(tmp_path / "half", ResumeRequest(), None, console)  # nothing left to do
    # Stopped before anything but run.json was there.
    shutil.copytree(
        tmp_path / "whole", tmp_path / "early", ignore=lambda path, names: set(names) - {RUN_JSON}
    )
    open_run(tmp_path / "early").update(finished=None)
    resume_run(tmp_path / "early", ResumeRequest(), None, console)
    pd.testing.assert_frame_equal(whole[same], pd.read_csv(tmp_path / "early" / "history.csv")[same])
