"""A small file of a run may be empty, cut off or changed: a command works without it, or says so in one line."""

import io
import shutil
from pathlib import Path

import pytest
from fake_run import make_run
from rich.console import Console
from typer.testing import CliRunner

from core.errors import UserError
from core.report.answer.record import read_run
from core.report.answer.tables import print_leaderboard
from core.report.page import render
from distributed.commands.app import app
from distributed.run.folder import open_run
from distributed.sweeps import sweep as sweeps

RUN = Path(__file__).parent / "fixtures" / "run_0_1"
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "changed": lambda content: content[: len(content) // 3] + b"\xff" + content[len(content) // 3 + 1 :],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A copy of a run and its cohort; every test puts back what it damages."""
    return shutil.copytree(RUN, tmp_path_factory.mktemp("damaged") / "study")


def outcome(*arguments):
    """The error of a command, "" if it worked; anything but the error for people is raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, UserError):
        assert "\n" not in str(done.exception)
        return str(done.exception)
    if done.exception is not None:
        raise done.exception
    return ""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "splits.csv",
        "best/input.json",
        "best/probe.json",
        "best/settings.json",
        "best/model.safetensors",
    ],
)
def test_evaluate_names_what_it_cannot_read(study, name, damage):
    path = study / "run" / name
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    try:
        said = outcome("evaluate", study / "run", study / "cohort")
        # A changed weight, or a letter in a text that nothing reads, cannot be told.
        assert said or (damage == "changed" and name in ("best/model.safetensors", "run.json"))
        if said:
            assert str(path) in said or path.parent.name in said
            assert "backup" in said
    finally:
        path.write_bytes(content)
    assert outcome("evaluate", study / "run", study / "cohort") == ""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["splits.csv", "trials/0001/progress.json", "study.journal"])
def test_resume_mends_or_names_what_is_damaged(tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(sweeps.Sweep, "execute", lambda sweep: sweep.folder)
    shutil.copytree(RUN, tmp_path / "study")
    run = tmp_path / "study" / "run"
    if name == "study.journal":
        assert outcome("resume", run, "--trials", 7, "--change-search") == ""  # it makes the copy
    path = run / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    said = outcome("resume", run)
    assert bool(said) == (name == "splits.csv")
    assert not said or (str(path) in said and "backup" in said)


@pytest.mark.parametrize(
    "content", ["", "subject,first_read,fold\nsub-000,not a time,0\n", "subject,first\nsub-000,1\n"]
)
def test_the_report_is_made_without_a_damaged_table(study, content):
    path = study / "run" / "access.csv"
    kept = path.read_bytes()
    path.write_text(content)
    try:
        assert outcome("report", study / "run") == ""
        page = (study / "run" / "report.html").read_text()
        assert "access.csv" in page
    finally:
        path.write_bytes(kept)


def test_a_table_that_was_cut_at_the_end_of_a_line_is_named(tmp_path):
    """Such a file looks whole; run.json says how many lines it had."""
    folder = make_run(tmp_path / "run")
    path = folder / "predictions.csv"
    lines = path.read_text().splitlines(keepends=True)
    open_run(folder).update(rows={"predictions": len(lines) - 1, "holdout": 2})
    assert not read_run(folder).cut
    path.write_text(lines[0])
    assert "predictions has 0 of " in read_run(folder).cut[0]
    path.write_text("".join(lines[:-3]))
    line = f"predictions has {len(lines) - 4} of {len(lines) - 1} lines: it was cut off; put it back from a backup"
    record = read_run(folder)
    assert (record.cut, record.missing[0]) == ((line,), line)
    console = Console(file=io.StringIO(), width=500)
    print_leaderboard(console, record)
    assert f"note: {line}" in console.file.getvalue()
    assert line in render(record)


def test_nothing_in_access_records_ends_a_command(tmp_path):
    """A quote that nobody closes, a line of 25,000 rows, and a folder with the name of a record."""
    from core.run_access import read_access

    rows = range(25_000)
    long = f"5.0,winner,-1,0,{' '.join(map(str, rows))}\n"
    (tmp_path / "node-1.csv").write_text('4.0,0001,0,0,"7 8\n' + "x" * 200_000 + "\n" + long)
    (tmp_path / "node-2.csv").mkdir()
    assert sorted(read_access(tmp_path)["row"]) == list(rows)


def test_half_a_line_of_an_access_record_costs_that_line_alone(tmp_path):
    from core.run_access import read_access

    (tmp_path / "a-1.csv").write_text("1.0,0000,0,0,1 2\n2.0,0000,0,0,3 x\n3.0,0000,1,0,4\n4.0,0000,on")
    assert list(read_access(tmp_path)["row"]) == [1, 2, 4]
