"""A nested search: everyone is held out once, the hold-outs are judged together, and any moment may be the last."""

import io
import json
import shutil

import pandas as pd
import pytest
from fake_run import make_run
from rich.console import Console
from small_cohort import SMALL, write_small_cohort

from core.errors import UserError
from core.evaluation.bootstrap import studentised_interval
from core.report.nested import is_nested, lines, outer_table, print_nested, read_nested, write_nested
from core.run_names import MEDIAN, WINNER
from distributed.run.folder import create_run, open_run
from distributed.sweeps.nested import NestedSearch, resume_run, run_nested
from distributed.sweeps.request import ResumeRequest, SweepRequest
from distributed.sweeps.resolve import splits_of


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
    errors, means = [], []
    for number in range(1, 4):
        table = pd.read_csv(judged / f"outer-{number}" / "predictions.csv", dtype={"subject": str})
        winner = table[table["method"] == WINNER]
        errors += list((winner["predicted"] - winner["age"]).abs().groupby(winner["subject"]).mean())
        holdout = pd.read_csv(judged / f"outer-{number}" / "holdout.csv")
        means.append(holdout.loc[holdout["method"] == WINNER, "mae"].mean())
    low, high = studentised_interval(pd.Series(errors).to_numpy(), 0.95)
    page = (judged / "report.html").read_text()
    mean = pd.Series(means)
    assert f"{mean.mean():.2f} ± {mean.std():.2f} years over 3 hold-outs" in page
    assert f"{low:.2f} to {high:.2f}" in page
    assert f"({len(errors)} subjects, each held out once" in page
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
    assert not is_nested(half / "outer-1")
    with pytest.raises(UserError, match="is no nested search"):
        read_nested(half / "outer-1")


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    with pytest.raises(UserError, match=r"--holdout 0\.3 cannot act"):
        run_nested(cohort.address, SweepRequest(outer=3, holdout=0.3), tmp_path / "run", None, quiet())
    with pytest.raises(UserError, match="needs at least 7"):
        run_nested(cohort.address, SweepRequest(outer=7, changes=SMALL), tmp_path / "run", None, quiet())
    assert not (tmp_path / "run").exists()


def test_the_search_of_a_nested_run_cannot_be_changed(judged):
    with pytest.raises(UserError, match=r"cannot be changed \(--trials\)"):
        resume_run(judged, ResumeRequest(trials=9), None, quiet())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_nested_search_that_is_killed_goes_on_and_everyone_is_held_out_once(tmp_path, monkeypatch):
    cohort = write_small_cohort(tmp_path / "cohort", 24)
    request = SweepRequest(outer=2, trials=1, folds=2, slots=1, changes=SMALL)
    run, console = tmp_path / "run", quiet()

    def killed_in_the_second(search, number, *arguments, real=NestedSearch._run):
        if number == 1:
            raise KeyboardInterrupt
        return real(search, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(NestedSearch, "_run", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_nested(cohort.address, request, run, None, console)
    first = (run / "outer-1" / "predictions.csv").read_bytes()
    resume_run(run, ResumeRequest(), None, console)
    assert open_run(run).about.finished
    assert (run / "outer-1" / "predictions.csv").read_bytes() == first
    seen = []
    for number in range(2):
        roles = pd.read_csv(run / f"outer-{number + 1}" / "splits.csv", dtype=str)
        held_out = set(roles.loc[roles["role"] == "holdout", "subject"])
        splits = splits_of(request.model_copy(update={"outer_fold": number}), cohort.manifest)
        assert held_out == set(cohort.manifest["subject"].iloc[splits.holdout])
        used = pd.read_csv(run / f"outer-{number + 1}" / "access.csv", dtype={"subject": str})
        assert set(used.loc[used["subject"].isin(held_out), "fold"]) == {-1}
        seen += held_out
    assert sorted(seen) == sorted(cohort.manifest["subject"])
    table = outer_table(read_nested(run))
    assert table[[WINNER, MEDIAN]].notna().all().all()
    assert table["subjects"].sum() == 24
