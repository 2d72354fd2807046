"""`compare`: runs on the same held-out people, side by side and in pairs; others are refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from fake_run import make_run
from process_helpers import run as command

from core.errors import UserError
from core.evaluation.bootstrap import studentised_interval
from core.report.compare import compared_table, pairs, read_compared, write_compared
from core.run_names import MEDIAN, WINNER


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one cohort; the errors of the second one are twice as large."""
    folder = tmp_path_factory.mktemp("runs")
    one = make_run(folder / "one", seed=0)
    other = folder / "other"
    shutil.copytree(one, other)
    table = pd.read_csv(other / "predictions.csv", dtype={"subject": str})
    is_winner = table["method"] == WINNER
    table.loc[is_winner, "predicted"] = (2 * table["predicted"] - table["age"])[is_winner]
    table.to_csv(other / "predictions.csv", index=False)
    return one, other


def errors_of(run):
    table = pd.read_csv(run / "predictions.csv", dtype={"subject": str})
    of_winner = table[table["method"] == WINNER]
    return (of_winner["predicted"] - of_winner["age"]).abs().groupby(of_winner["subject"]).mean()


def test_values_and_differences_are_those_of_the_predictions(runs):
    compared = read_compared(runs)
    table = compared_table(compared).set_index("method")
    for name, path in zip(("one", "other"), runs, strict=True):
        assert table.loc[name, "value"] == pytest.approx(errors_of(path).mean())
    assert MEDIAN in table.index
    made = {(each.method, each.other): each for each in pairs(compared)}
    count = len(table) * (len(table) - 1) // 2
    assert len(made) == count
    gains = (errors_of(runs[1]) - errors_of(runs[0])).to_numpy()
    low, high = studentised_interval(gains, 1 - 0.05 / count)
    assert made["one", "other"].gain == pytest.approx(np.mean(gains))
    assert (made["one", "other"].low, made["one", "other"].high) == pytest.approx((low, high))
    assert made["one", "other"].outcome == "better"
    assert made["one", "other"].sentence().startswith("one beats other by")


def test_the_page_has_everything(runs, tmp_path):
    page = write_compared(runs, tmp_path / "out").read_text()
    assert page.count("<svg") == 1
    assert "one beats other" in page
    assert len(pd.read_csv(tmp_path / "out" / "compare.csv")) == len(compared_table(read_compared(runs)))
    assert set(pd.read_csv(tmp_path / "out" / "pairs.csv")["outcome"]) & {"better"}


def changed(runs, tmp_path, change):
    other = tmp_path / "changed"
    shutil.copytree(runs[1], other)
    change(other)
    return [runs[0], other]


def test_runs_on_other_people_are_refused_with_the_way_to_make_them(runs, tmp_path):
    def leave_one_out(run):
        table = pd.read_csv(run / "predictions.csv", dtype={"subject": str})
        table[table["subject"] != table["subject"].iloc[0]].to_csv(run / "predictions.csv", index=False)

    with pytest.raises(UserError, match=r"--splits-from .*one"):
        read_compared(changed(runs, tmp_path, leave_one_out))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about: about["cohort"].update(source="elsewhere"), "different people"),
        (lambda about: about.update(task={**CLASSES}), "the error of a person is"),
    ],
)
def test_runs_of_other_people_or_errors_are_refused(runs, tmp_path, change, says):
    def rewrite(run):
        about = json.loads((run / "run.json").read_text())
        change(about)
        (run / "run.json").write_text(json.dumps(about))

    with pytest.raises(UserError, match=says):
        read_compared(changed(runs, tmp_path, rewrite))


CLASSES = {
    "name": "classes", "metrics": {"mae": {"title": "MAE"}}, "objectives": ["mae"], "shown": ["mae"],
    "error": {"title": "log losses"}, "truth": "class", "column": "age",
}  # fmt: skip


def test_one_run_is_no_comparison(runs):
    with pytest.raises(UserError, match="two runs or more"):
        read_compared(runs[:1])
    with pytest.raises(UserError, match="given twice"):
        read_compared([runs[0], runs[0], runs[0]])


def test_the_command_prints_the_table_and_refuses_in_one_line(runs, tmp_path):
    done = command("compare", *runs, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one beats other" in " ".join(done.stdout.split())
    assert (tmp_path / "here" / "compare.html").exists()
    refused = command("compare", runs[0], "nowhere", cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
