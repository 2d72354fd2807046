"""Curves of what labels bring: budgets, what a start saves, the page, and a curve whose process is killed."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest
from fake_run import make_run
from process_helpers import kill_when, run, start
from pydantic import ValidationError
from rich.console import Console
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import labelled_order, make_splits
from core.report.answer.saving import needed_labels, savings
from core.report.curve import curve_table, headline, print_curve, read_curve, write_curve
from core.run_names import WINNER
from distributed.run.assignment import read_progress
from distributed.run.folder import create_run
from distributed.sweeps.request import SweepRequest, budget_of
from distributed.training.subjects import check_budget
from search_spaces import published


@pytest.mark.parametrize(("text", "value"), [("all", None), ("16", 16), ("0.5", 0.5)])
def test_a_budget_is_a_count_a_share_or_all(text, value):
    assert budget_of(text) == value


@pytest.mark.parametrize("labelled", [("16",), ("1", "all"), ("1.5", "all"), ("x", "all"), ("16", "16")])
def test_budgets_that_are_none_are_refused(labelled):
    with pytest.raises(ValidationError):
        SweepRequest(labelled=labelled)


def test_every_part_of_a_curve_has_its_budget_and_the_same_hold_out():
    asked = SweepRequest(labelled=("16", "0.5", "all"), changes={"training.epochs": 3})
    budgets = [part.changes["changes"] for part in asked.parts]
    assert budgets == [{"training.epochs": 3, "data.labelled": value} for value in (16, 0.5, None)]
    assert all(asked.model_copy(update=part.changes).holdout == asked.holdout for part in asked.parts)
    assert SweepRequest().parts == ()


def test_a_budget_beyond_the_people_of_a_fold_is_refused_before_anything_starts():
    table = pd.DataFrame(
        {"subject": [f"{row:02d}" for row in range(20)], "site": "", "age": np.linspace(20, 80, 20)}
    )
    splits, ages = make_splits(table, 4, 0.2, 0), table["age"].to_numpy()
    ages = np.where(np.arange(20) == splits.development[0], np.nan, ages)

    def check(budget):
        check_budget(resolve(merge(published("brain_age"), {"data.labelled": budget})), table, ages, splits)

    fewest = min(int(np.isfinite(ages[splits.training(fold)]).sum()) for fold in range(4))
    check(fewest)
    with pytest.raises(UserError, match=f"more than the {fewest} subjects"):
        check(fewest + 1)


def test_every_class_is_among_the_first_who_are_labelled_and_fewer_than_classes_are_refused():
    table = pd.DataFrame({"subject": [f"{row:02d}" for row in range(32)], "site": ""})
    table["kind"] = np.array(["often"] * 26 + ["rare"] * 4 + ["rarer"] * 2, dtype=object)
    whose = table.set_index("subject")["kind"]
    for seed in range(50):
        order = labelled_order(table, np.arange(32), "kind", seed)
        assert set(whose[order[:3]]) == {"often", "rare", "rarer"}
        assert sorted(order) == table["subject"].tolist()
    splits = make_splits(table, 2, 0.2, 0, "kind")
    settings = resolve(merge(published("classification"), {"data.target": "kind", "data.labelled": 2}))
    with pytest.raises(UserError, match="leaves 2 subjects for 3 classes"):
        check_budget(settings, table, table["kind"].to_numpy(), splits)


def slowly(budgets, curve, target):
    """The first place, in steps of a thousandth of a doubling, where the curve is as low as its target."""
    for place in np.arange(math.log2(budgets[0]), math.log2(budgets[-1]) + 1e-9, 1e-3):
        if np.interp(place, np.log2(budgets), curve) <= target:
            return 2**place
    return math.inf


def test_labels_needed_are_the_first_place_where_a_curve_is_as_low():
    draws, budgets = np.random.default_rng(0), [8, 16, 40, 64]
    curves, targets = draws.normal(size=(4, 300)).cumsum(axis=0), draws.normal(size=300)
    found = needed_labels(budgets, curves, targets)
    for place in range(300):
        expected = slowly(budgets, curves[:, place], targets[place])
        if math.isinf(expected):
            assert math.isinf(found[place])
        else:
            assert math.log2(found[place]) == pytest.approx(math.log2(expected), abs=2e-3)
    assert np.isinf(found).any()
    assert (found == 8).any()


def errors_at(labelled, shift=1.0):
    """Errors (L, P) that fall by 2 with every doubling; people differ, in the same way everywhere."""
    people = np.random.default_rng(1).normal(0, 0.2, 40)
    return np.array([[20 - 2 * math.log2(count * shift) + each for each in people] for count in labelled])


def test_a_start_that_is_worth_a_doubling_saves_half():
    labelled = [16, 32, 64, 128]
    found = savings(labelled, errors_at(labelled, 2.0), errors_at(labelled))
    assert [each.needed for each in found[1:]] == pytest.approx([16, 32, 64])
    assert all(each.is_shown for each in found[1:])
    # Fewer than the smallest budget are never claimed.
    assert found[0].needed == 16
    assert "fewer were not tried" in found[0].sentence("the start", "scratch")
    assert not found[0].is_shown
    assert "16 or fewer" in found[1].sentence("the start", "scratch")


def test_equal_methods_and_worse_starts_save_nothing():
    labelled = [16, 32, 64]
    for shift in (1.0, 0.5):
        found = savings(labelled, errors_at(labelled, shift), errors_at(labelled))
        assert not any(each.is_shown for each in found)
        assert all("no saving shown" in each.sentence("the start", "scratch") for each in found[1:])
    assert math.isinf(found[-1].needed)
    assert "nowhere as good" in found[-1].sentence("the start", "scratch")
    # The more starts are compared, the wider is every interval.
    one, three = (
        savings(labelled, errors_at(labelled) + 0.01, errors_at(labelled), starts) for starts in (1, 3)
    )
    assert three[1].low <= one[1].low
    assert three[1].high >= one[1].high
    few = savings(labelled, errors_at(labelled)[:, :5], errors_at(labelled)[:, :5])
    assert "too few" in few[0].sentence("the start", "scratch")


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """The true curves are known: with 32 labels the start is as good as with 64 without it."""
    draws, labelled = np.random.default_rng(2), [16, 32, 64, 128]
    held = 0
    for _ in range(120):
        people = draws.normal(0, 1.5, 60)
        both = [
            np.array(
                [20 - 2 * math.log2(count * shift) + people + draws.normal(0, 1, 60) for count in labelled]
            )
            for shift in (2.0, 1.0)
        ]
        of_64 = savings(labelled, *both, seed=1)[2]
        held += of_64.low <= 32 <= of_64.high
    # Of four budgets each has 98.75 %.
    assert held >= 112


@pytest.fixture
def curve(tmp_path):
    made = create_run(
        tmp_path / "run", "curve", {"labelled": ["16", "all"]}, {"task": "brain_age"},
        write_small_cohort(tmp_path / "cohort", 6),
    )  # fmt: skip
    for seed, name in enumerate(("16", "all")):
        make_run(made.path / f"labelled-{name}", seed=seed)
    return made.path


def test_the_page_has_the_table_the_picture_and_every_sweep(curve):
    page = write_curve(curve).read_text()
    assert page.count("<svg") == 1
    table = pd.read_csv(curve / "curve.csv")
    for name in ("16", "all"):
        assert f"labelled-{name}/report.html" in page
        written = pd.read_csv(curve / f"labelled-{name}" / "predictions.csv")
        of_winner = written[written["method"] == WINNER]
        errors = (of_winner["predicted"] - of_winner["age"]).abs().groupby(of_winner["subject"]).mean()
        row = table[(table["asked"] == name) & (table["method"] == WINNER)]
        assert row["value"].item() == pytest.approx(errors.mean())
        assert row["low"].item() < errors.mean() < row["high"].item()
    read = read_curve(curve)
    assert [budget.asked for budget in read.budgets] == ["16", "all"]
    assert "search winner" in headline(read)
    console = Console(file=io.StringIO(), width=200)
    print_curve(console, curve)
    assert "What labels bring" in console.file.getvalue()


def test_a_budget_without_a_result_is_named(curve):
    predictions = curve / "labelled-16" / "predictions.csv"
    predictions.write_text(predictions.read_text().partition("\n")[0] + "\n")
    (curve / "labelled-16" / "trials.parquet").unlink(missing_ok=True)
    page = write_curve(curve).read_text()
    assert "No point for 16 labelled" in page
    assert "one budget is no curve" in page
    assert len(curve_table(read_curve(curve))["asked"].unique()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_curve_whose_process_is_killed_goes_on_and_compares_starts_at_every_budget(tmp_path):
    write_small_cohort(tmp_path / "cohort", 40)
    write_small_cohort(tmp_path / "other", 16, seed=1, names=[f"other-{number}" for number in range(16)])
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    begun = run("train", "other", "--folds", 2, *changes, "--out", "start", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    asked = (
        "sweep", "cohort", "--space", "label_budget", "--labelled", "6,all", "--start", "none", "--start", "start",
        "--trials", 4, "--folds", 2, "--refit-seeds", 3, "--slots", 1, "--scheduler", "none", "--out", "run", *changes,
    )  # fmt: skip
    sweep, folder = start(*asked, cwd=tmp_path, mark="curve"), tmp_path / "run"
    kill_when(lambda: read_progress(folder / "labelled-6" / "trials" / "0001")["history"], sweep, "curve")
    done = run("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best from scratch" in done.stdout
    table = pd.read_csv(folder / "curve.csv")
    trained = table[table["method"].isin(["best from scratch", "best from start"])]
    assert len(trained) == 4
    assert trained["seeds"].tolist() == [3] * 4
    splits = [pd.read_csv(folder / f"labelled-{name}" / "splits.csv") for name in ("6", "all")]
    assert splits[0].equals(splits[1])
    few = pd.read_csv(folder / "labelled-6" / "best" / "trained_on.csv")
    assert few["subject"].nunique() == 6
    # What has no images, and the classical baseline, know no more labels than the others.
    held_out = pd.read_csv(folder / "labelled-6" / "holdout.csv")
    assert (held_out["n_train"] == 6).all()
    assert held_out.groupby("method")["seed"].nunique().to_dict() == dict.fromkeys(
        held_out["method"].unique(), 3
    )
    trials = pd.read_csv(folder / "labelled-6" / "trials.csv")
    assert trials["begin.weights"].isna().tolist()[:2] == [True, False]
    # Both begin with the published configuration.
    alike = trials.loc[
        :1, ["optimiser.learning_rate", "optimiser.weight_decay", "model.readout", "views.noise"]
    ]
    assert alike.nunique().tolist() == [1] * 4
    again = run("report", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    refused = run("predict", "run", "scan.nii.gz", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is a curve" in refused.stderr
