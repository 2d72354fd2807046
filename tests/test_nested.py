"""A nested search: everyone is held out once, the hold-outs are judged together, and any moment may be the last."""

import io
import json
import os
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from fake_run import make_run
from process_helpers import kill_when, run, start, study_of
from rich.console import Console
from small_cohort import SMALL, write_small_cohort

from core.errors import UserError
from core.evaluation.bootstrap import studentised_interval
from core.report.nested import (
    headline,
    lines,
    outer_table,
    print_nested,
    read_nested,
    write_nested,
)
from core.run_names import MEDIAN, WINNER
from distributed.run.assignment import read_progress
from distributed.run.folder import create_run, open_run
from distributed.search.study import published_parameters
from distributed.sweeps.nested import NestedSearch, resume_run, run_nested
from distributed.sweeps.request import ResumeRequest, SweepRequest
from distributed.sweeps.resolve import splits_of
from distributed.sweeps.sweep import Launch
from search_spaces import load_space


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A nested search of three made-up sweeps; their held-out subjects have other names each."""
    folder = tmp_path_factory.mktemp("nested")
    run = create_run(
        folder / "run",
        "nested",
        {"outer": 3},
        {"task": "brain_age"},
        write_small_cohort(folder / "cohort", 6),
    )
    for number in range(1, 4):
        child = make_run(run.path / f"outer-{number}", seed=number)
        table = pd.read_csv(child / "predictions.csv", dtype={"subject": str})
        table.assign(subject=f"{number}-" + table["subject"]).to_csv(child / "predictions.csv", index=False)
    return run.path


def test_everybody_counts_once_over_all_hold_outs(judged):
    """Mean and interval against the tables of the sweeps, read without our reader."""
    write_nested(judged)
    errors, means, of_median = [], [], []
    for number in range(1, 4):
        table = pd.read_csv(judged / f"outer-{number}" / "predictions.csv", dtype={"subject": str})
        winner = table[table["method"] == WINNER]
        errors += list((winner["predicted"] - winner["age"]).abs().groupby(winner["subject"]).mean())
        median = table[table["method"] == MEDIAN]
        of_median += list((median["predicted"] - median["age"]).abs().groupby(median["subject"]).mean())
        holdout = pd.read_csv(judged / f"outer-{number}" / "holdout.csv")
        means.append(holdout.loc[holdout["method"] == WINNER, "mae"].mean())
    low, high = studentised_interval(pd.Series(errors).to_numpy(), 0.95)
    page = (judged / "report.html").read_text()
    said = (
        f"{np.mean(errors):.2f} years over {len(errors)} subjects, each held out once, 95 % interval {low:.2f} to "
        f"{high:.2f} (SD over 3 hold-outs {np.std(means, ddof=1):.2f}); predicting the training median: "
        f"{np.mean(of_median):.2f}."
    )
    assert said in page
    assert len(pd.read_csv(judged / "outer.csv")) == 3
    assert page.count("<svg") == 3


def test_it_says_how_often_the_winners_were_of_one_kind(judged):
    nested = read_nested(judged)
    kinds = [
        json.loads((judged / f"outer-{number}" / "best" / "settings.json").read_text())["objective"]["name"]
        for number in range(1, 4)
    ]
    assert list(outer_table(nested)["kind"]) == kinds
    last = lines(nested)[-1]
    for kind in set(kinds):
        assert f"{kind} {kinds.count(kind)} of 3" in last
    console = quiet()
    print_nested(console, judged)
    assert last in console.file.getvalue().replace("\n", " ").replace("  ", " ")


def test_a_nested_search_that_is_not_done_says_so(judged, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(judged, half)
    shutil.rmtree(half / "outer-3")
    write_nested(half)
    assert "So far 2 of 3 hold-outs" in (half / "report.html").read_text()
    with pytest.raises(UserError, match="is no nested search"):
        read_nested(half / "outer-1")


def test_what_has_no_part_in_the_result_is_named(judged, tmp_path):
    """A hold-out whose search ended without a result, one whose budget ended it, and a folder that is none."""
    half = tmp_path / "half"
    shutil.copytree(judged, half)
    shutil.copytree(half / "outer-1", half / "outer-1-backup")
    predictions = half / "outer-2" / "predictions.csv"
    predictions.write_text(predictions.read_text().partition("\n")[0] + "\n")
    open_run(half / "outer-2").update(finished="2026-11-26T09:00:00+00:00")
    (half / "outer-2" / "trials.parquet").unlink(missing_ok=True)
    trials = half / "outer-2" / "trials.csv"
    trials.write_text(trials.read_text().replace("COMPLETE", "FAIL"))
    open_run(half / "outer-3").update(ended="the time budget of 5 s was used up")
    write_nested(half)
    page = (half / "report.html").read_text()
    assert "No result for hold-out 2: no trial was completed there." in page
    assert "So far" not in page
    assert "(hold-out 3: the time budget of 5 s was used up)" in page
    for number in (1, 3):
        table = half / f"outer-{number}" / "predictions.csv"
        table.write_text(table.read_text().partition("\n")[0] + "\n")
        open_run(half / f"outer-{number}").update(finished="2026-11-26T09:00:00+00:00")
    with pytest.raises(UserError, match=r"no hold-out of .* has a result"):
        read_nested(half)


def test_people_without_a_prediction_of_the_winner_are_not_counted(judged, tmp_path):
    """In one hold-out the refit of the winner failed, and those of the other methods did not."""
    half = tmp_path / "half"
    shutil.copytree(judged, half)
    path = half / "outer-2" / "predictions.csv"
    table = pd.read_csv(path, dtype={"subject": str})
    table[table["method"] != WINNER].to_csv(path, index=False)
    open_run(half / "outer-2").update(finished="2026-11-26T09:00:00+00:00")
    people = sum(
        pd.read_csv(half / f"outer-{number}" / "predictions.csv", dtype={"subject": str})["subject"].nunique()
        for number in (1, 3)
    )
    said = headline(read_nested(half))
    assert f" over {people} subjects, each held out once" in said
    assert said.endswith(" No result for hold-out 2: the refit of the winner failed there.")
    damaged = path.read_text()
    path.write_bytes(b"\xff")
    assert " No result for hold-out 2: its predictions.csv is damaged" in headline(read_nested(half))
    path.unlink()
    assert " No result for hold-out 2: the refit of the winner failed there." in headline(read_nested(half))
    path.write_text(damaged)
    for number in (1, 3):
        shutil.copy(path, half / f"outer-{number}")
        open_run(half / f"outer-{number}").update(finished="2026-11-26T09:00:00+00:00")
    with pytest.raises(UserError, match=r"no hold-out of .* has a result"):
        read_nested(half)


def test_what_is_judged_is_the_search_with_its_refit_in_every_sentence(judged):
    assert not [line for line in lines(read_nested(judged)) if "search winner" in line.lower()]


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    with pytest.raises(UserError, match=r"--holdout 0\.3 cannot act"):
        run_nested(
            Launch(cohort.address, SweepRequest(outer=3, holdout=0.3), tmp_path / "run", None, quiet())
        )
    with pytest.raises(UserError, match="needs at least 7"):
        run_nested(
            Launch(cohort.address, SweepRequest(outer=7, changes=SMALL), tmp_path / "run", None, quiet())
        )
    larger = write_small_cohort(tmp_path / "larger", 24)
    grid = SweepRequest(outer=3, folds=2, sampler="grid", grid_points=3, trials=2)
    with pytest.raises(UserError, match="the grid of this space has more than"):
        run_nested(Launch(larger.address, grid, tmp_path / "run", None, quiet()))
    points = tmp_path / "missing.yaml"
    with pytest.raises(UserError, match=r"cannot read .*missing\.yaml"):
        run_nested(
            Launch(
                larger.address, SweepRequest(outer=3, changes=SMALL), tmp_path / "run", None, quiet(), points
            )
        )
    assert not (tmp_path / "run").exists()


class Failing:
    """Sweeps of a nested search: that of `failing` ends without a result, that of `broken` does not end."""

    def __init__(self, judged, failing=(), broken=()):
        self.judged, self.failing, self.broken = judged, failing, broken
        self.begun = []

    def __call__(self, launch, shared):
        request, out = launch.request, launch.out
        self.begun.append((request.outer_fold + 1, shared.first))
        number = request.outer_fold + 1
        if number in self.broken:
            shutil.copytree(self.judged / f"outer-{number}", out)
            open_run(out).update(finished=None)
            raise UserError("the disk is full")
        shutil.copytree(self.judged / f"outer-{number}", out)
        open_run(out).update(finished="2026-11-26T09:00:00+00:00")
        if number in self.failing:
            table = out / "predictions.csv"
            table.write_text(table.read_text().partition("\n")[0] + "\n")
            raise UserError("all 8 trials failed; the first: the loss became NaN")


@pytest.fixture
def nested_of(judged, tmp_path, monkeypatch):
    """A nested search of three hold-outs, without Ray: (what becomes of the sweeps) -> (the run, the sweeps, said)."""

    def begin(**fates):
        cohort = write_small_cohort(tmp_path / "cohort", 24)
        sweeps, console = Failing(judged, **fates), quiet()
        monkeypatch.setattr("distributed.sweeps.nested.run_sweep", sweeps)
        monkeypatch.setattr("distributed.sweeps.nested.connect", lambda *_: nullcontext())
        monkeypatch.setattr("distributed.sweeps.nested.hold", lambda *_: None)
        points = tmp_path / "points.yaml"
        points.write_text(
            f"- {json.dumps(published_parameters(*load_space('brain_age')) | {'views.noise': 0.05})}\n"
        )
        request = SweepRequest(outer=3, folds=2, changes=SMALL)
        try:
            run_nested(Launch(cohort.address, request, tmp_path / "run", None, console, points))
        except UserError as error:
            console.print(str(error))
        return tmp_path / "run", sweeps, " ".join(console.file.getvalue().split())

    return begin


def test_a_hold_out_without_a_result_does_not_stop_the_others_and_is_named(nested_of):
    run, sweeps, said = nested_of(failing=[1])
    assert [number for number, _ in sweeps.begun] == [1, 2, 3]
    assert "hold-out 1 of 3: there is no result: all 8 trials failed; the first: the loss became NaN" in said
    assert "No result for hold-out 1" in said
    assert open_run(run).about.finished
    assert "No result for hold-out 1" in (run / "report.html").read_text()


def test_a_sweep_that_was_stopped_stops_the_search_and_nothing_is_called_finished(nested_of):
    run, sweeps, said = nested_of(broken=[2])
    assert [number for number, _ in sweeps.begun] == [1, 2]
    assert said.endswith("the disk is full")
    assert open_run(run).about.finished is None


def test_a_search_without_any_result_is_not_called_finished(nested_of):
    run, _, said = nested_of(failing=[1, 2, 3])
    assert said.endswith("has a result; read what each of its sweeps says")
    assert open_run(run).about.finished is None


def test_every_sweep_begins_with_the_points_of_the_user(nested_of):
    """They are read once, so the file may change, or vanish, before the last sweep begins."""
    run, sweeps, _ = nested_of()
    recorded = open_run(run).about.first
    assert recorded["enqueued"][0]["views.noise"] == 0.05
    assert all(first == recorded for _, first in sweeps.begun)


def test_the_search_of_a_nested_run_cannot_be_changed(judged):
    with pytest.raises(UserError, match=r"cannot be changed \(--trials\)"):
        resume_run(judged, ResumeRequest(trials=9), None, quiet())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_nested_search_that_is_killed_goes_on_and_everyone_is_held_out_once(tmp_path, monkeypatch):
    cohort = write_small_cohort(tmp_path / "cohort", 24)
    request = SweepRequest(outer=2, trials=1, folds=2, slots=1, changes=SMALL)
    run, console = tmp_path / "run", quiet()

    def killed_in_the_second(search, part, *arguments, real=NestedSearch._run):
        if part.folder == "outer-2":
            raise KeyboardInterrupt
        return real(search, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(NestedSearch, "_run", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_nested(Launch(cohort.address, request, run, None, console))
    first = (run / "outer-1" / "predictions.csv").read_bytes()
    resume_run(run, ResumeRequest(), None, console)
    assert open_run(run).about.finished
    assert (run / "outer-1" / "predictions.csv").read_bytes() == first
    seen = []
    for number in range(2):
        roles = pd.read_csv(run / f"outer-{number + 1}" / "splits.csv", dtype=str)
        held_out = set(roles.loc[roles["role"] == "holdout", "subject"])
        splits = splits_of(request.model_copy(update={"outer_fold": number}), cohort.manifest, "age")
        assert held_out == set(cohort.manifest["subject"].iloc[splits.holdout])
        used = pd.read_csv(run / f"outer-{number + 1}" / "access.csv", dtype={"subject": str})
        assert set(used.loc[used["subject"].isin(held_out), "fold"]) == {-1}
        seen += held_out
        # The only configuration is the published one, and it was refitted once.
        parts = run / f"outer-{number + 1}"
        found = pd.read_csv(parts / "predictions.csv").groupby("method")["predicted"].apply(list)
        assert found[WINNER] == found["published"]
        assert not list((parts / "refits" / "published").glob("model-*"))
    assert sorted(seen) == sorted(cohort.manifest["subject"])
    table = outer_table(read_nested(run))
    assert table[[WINNER, MEDIAN]].notna().all().all()
    assert table["subjects"].sum() == 24


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_nested_search_whose_driver_is_killed_inside_a_sweep_loses_no_epoch(tmp_path):
    """In the second hold-out, while its second trial trains; the first sweep stays as it was."""
    write_small_cohort(tmp_path / "cohort", 24)
    mark = f"nested-{os.getpid()}"
    sweep = start(
        "sweep", "cohort", "--outer", 2, "--trials", 2, "--folds", 2, "--slots", 1, "--out", "run",
        "--set", "training.epochs=20", cwd=tmp_path, mark=mark,
    )  # fmt: skip
    second = tmp_path / "run" / "outer-2"
    trial = second / "trials" / "0001"

    def epochs():
        return len(read_progress(trial)["history"])

    kill_when(lambda: epochs() >= 3, sweep, mark)
    kept, finished = read_progress(trial)["history"], study_of(second).get_trials()[0]
    first = (tmp_path / "run" / "outer-1" / "predictions.csv").read_bytes()
    assert open_run(second).about.looks == ()
    done = run("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "each held out once" in " ".join(done.stdout.split())
    again = study_of(second).get_trials()
    assert (again[0].values, again[0].datetime_complete) == (finished.values, finished.datetime_complete)
    assert read_progress(trial)["history"][: len(kept)] == kept
    assert (tmp_path / "run" / "outer-1" / "predictions.csv").read_bytes() == first
    assert [len(open_run(tmp_path / "run" / f"outer-{number}").about.looks) for number in (1, 2)] == [1, 1]


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_nested_search_that_cannot_fit_is_refused_with_what_the_user_must_give(tmp_path):
    write_small_cohort(tmp_path / "cohort", 24)
    done = run(
        "sweep", "cohort", "--outer", 2, "--trials", 2, "--folds", 2, "--slots", 1, "--out", "run",
        "--set", "training.epochs=20", "--time-budget", 0.02, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    figures = re.search(
        r"needs about (\d+) s in all, .* that each of 2 hold-outs has; give --time-budget (\d+)", done.stderr
    )
    needed, advised = map(int, figures.groups())
    assert abs(advised - 2 * needed) <= 3
    assert not (tmp_path / "run" / "outer-2").exists()
