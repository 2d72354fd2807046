"""The report: its tables against hand calculation, its verdicts on built cases, its page as HTML."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_run import make_run
from rich.console import Console
from scipy import stats

from core.errors import UserError
from core.evaluation.bootstrap import studentised_interval
from core.report import page as page_module
from core.report.answer.describe import describe
from core.report.answer.findings import caveats, headline, importance_note, verdict_lines
from core.report.answer.importance import importances_of, unassessed_settings
from core.report.answer.record import NothingToShow, RunRecord, read_run
from core.report.answer.tables import (
    holdout_table,
    leaderboard,
    print_leaderboard,
    winner_beside_published,
)
from core.report.answer.verdict import (
    beating_the_floor,
    compare,
    comparisons,
    error_interval,
    errors_of,
    verdict,
)
from core.report.figures import (
    schedule as schedule_figure,
)
from core.report.figures import (
    search as figures,
)
from core.report.figures import (
    subjects as subject_figures,
)
from core.report.page import FIGURES, write_report
from core.run_names import MEDIAN, PUBLISHED, WINNER

SECTIONS = (
    "answer",
    "leaderboard",
    "optimisation",
    "folds",
    "predictions",
    "schedules",
    "failed",
    "data",
    "limits",
    "reproduce",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to take parts away from."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- tables


def _trials(*rows: tuple) -> pd.DataFrame:
    columns = [
        "number",
        "label",
        "state",
        "value",
        "sd",
        "n",
        "epochs",
        "seconds",
        "reason",
        "objective.name",
    ]
    return pd.DataFrame([(*row, "supcon") for row in rows], columns=columns)


def test_leaderboard_ranks_completed_trials_only_and_always_shows_the_published_one() -> None:
    trials = _trials(
        (0, "published", "COMPLETE", 9.0, 1.0, 6, 60, 1.0, None),
        (1, None, "COMPLETE", 6.125, 0.804, 6, 60, 1.0, None),
        (2, None, "PRUNED", 5.0, None, 1, 4, 1.0, None),  # lower, but of fewer cells
        (3, None, "FAIL", None, None, None, 2, 1.0, "loss became NaN"),
        (4, None, "COMPLETE", 7.0, 0.5, 6, 60, 1.0, None),
    )
    table = leaderboard(trials, top=2)
    assert table["trial"].tolist() == [1, 4, 0]
    assert table["rank"].tolist() == ["1", "2", "3"]
    assert table["value"].tolist() == ["6.12 ± 0.80", "7.00 ± 0.50", "9.00 ± 1.00"]
    assert table["n"].tolist() == ["6", "6", "6"]
    assert table["what"].tolist() == ["supcon", "supcon", "published: supcon"]
    everything = leaderboard(trials, top=10)
    assert everything["trial"].tolist() == [1, 4, 0, 2]
    assert everything.iloc[-1].tolist() == ["–", 2, "supcon", "5.00", "1", "PRUNED, epoch 4"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, "it is the winner, because nothing was compared with it."),
        ("FAIL", "it is the winner, because nothing was compared with it."),
        ("PRUNED", "it is the winner. 1 other trial stopped early"),
        ("COMPLETE", "The search found nothing better than the published configuration"),
    ],
)
def test_a_published_winner_is_called_alone_only_if_nothing_was_compared_with_it(run, other, said) -> None:
    rows = [(0, "published", "COMPLETE", 6.0, 1.0, 6, 60, 1.0, None)]
    if other is not None:
        rows.append((1, None, other, 8.0, 1.0, 1, 10, 1.0, None))
    record = dataclasses.replace(read_run(run), trials=_trials(*rows))
    assert any(said in line for line in verdict_lines(record))


def test_the_winner_is_the_best_completed_trial_inside_the_space() -> None:
    trials = _trials(
        (0, "published", "COMPLETE", 9.0, 1.0, 6, 60, 1.0, None),
        (1, None, "PRUNED", 5.0, None, 1, 4, 1.0, "asha after epoch 4"),
        (2, None, "FAIL", 4.0, None, 1, 12, 1.0, "loss became nan"),
        (3, None, "RUNNING", 3.0, None, 1, 12, 1.0, None),
        (4, None, "COMPLETE", 6.0, 1.0, 6, 60, 1.0, None),
        (5, None, "COMPLETE", 7.0, 1.0, 6, 60, 1.0, None),
    )
    record = RunRecord(Path("run"), trials=trials.assign(outside=[False] * 4 + [True, False]))
    assert record.best == 5
    assert RunRecord(Path("run"), trials=trials).best == 4
    assert RunRecord(Path("run"), trials=trials[1:4]).best is None


def test_leaderboard_of_equal_values_keeps_the_order_of_the_trials() -> None:
    trials = _trials(*((number, None, "COMPLETE", 6.0, 1.0, 6, 60, 1.0, None) for number in (3, 1, 2)))
    assert leaderboard(trials)["trial"].tolist() == [1, 2, 3]


def test_holdout_table_is_the_mean_and_sample_sd_over_seeds() -> None:
    scores = [(WINNER, 0, 5.0), (WINNER, 1, 5.6), (WINNER, 2, 5.9), (MEDIAN, 0, 18.2)]
    holdout = pd.DataFrame(
        [(method, seed, mae, 0.5, 0.4, 77, 19) for method, seed, mae in reversed(scores)],
        columns=["method", "seed", "mae", "r2", "site_balanced_accuracy", "n_train", "n_holdout"],
    )
    predictions = _predictions({WINNER: [[4.0, 5.0, 6.0, 5.0, 4.0, 6.0]]})
    table = holdout_table(holdout, predictions)
    # mean 16.5 / 3 = 5.5; deviations -0.5, 0.1, 0.4; SD sqrt(0.42 / 2) = 0.458
    low, high = studentised_interval(np.array([4.0, 5.0, 6.0, 5.0, 4.0, 6.0]))
    interval = f"{low:.2f} to {high:.2f}"
    assert table.iloc[0].tolist() == [
        WINNER, "5.50 ± 0.46", interval, "0.50 ± 0.00", "0.40 ± 0.00", "3", "19",
    ]  # fmt: skip
    assert table.iloc[1].tolist() == [MEDIAN, "18.20", "–", "0.50", "0.40", "1", "19"]


def test_a_configuration_in_words_joins_schedules_and_leaves_out_what_cannot_act() -> None:
    settings = {
        "optimiser.learning_rate": 0.000123,
        "objective.neighbours.start": 1.0,
        "objective.neighbours.end": 0.4375,
        "objective.neighbours.shape": "staircase",
        "objective.neighbours.step": 5.0,
        "objective.temperature": 0.0812,
        "objective.bin_width": np.nan,
        "objective.width": 3.0,
        "objective.kernel": "cauchy",
        "objective.name": "exponential",
        "views.noise": 0.0,
        "views.crop": None,
        "model.head.dimension": 128.0,
    }
    words = "exponential, cauchy, width 3 y, τ 0.081, neighbours 100→44 % staircase step 5, lr 1.2e-4"
    assert describe(settings) == f"{words}, head dimension 128"
    assert describe(settings, most=2) == "exponential, cauchy, …"
    counts = {"objective.neighbours.start": 32, "objective.neighbours.end": 14}
    assert describe(counts) == "neighbours 32→14"
    scheduled = {"objective.temperature.shape": "linear", "objective.temperature.start": 0.5}
    assert describe(scheduled | {"objective.temperature.end": 0.05}) == "τ 0.5→0.05 linear"


def test_tables_of_a_run_agree_with_its_study(finished: Path) -> None:
    record = read_run(finished)
    assert record.missing == ()
    assert record.study is not None
    assert record.best == record.study.best_trial.number
    assert record.published == 0
    beside = winner_beside_published(record).set_index("setting")
    assert beside.loc["objective.temperature", "published"] == "0.1"
    assert beside.loc["objective.name", "winner"] == record.study.best_params["objective.name"]


# --- verdict


def _predictions(errors: dict[str, list[list[float]]]) -> pd.DataFrame:
    """errors: method -> one list per refit seed, of signed errors per subject."""
    rows = [
        {
            "method": method,
            "seed": seed,
            "subject": f"s{index}",
            "truth": 50.0,
            "predicted": 50.0 + error,
            "error": abs(error),
        }
        for method, seeds in errors.items()
        for seed, values in enumerate(seeds)
        for index, error in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(site="")


def test_a_clear_gain_beats_and_the_gain_is_the_paired_mean() -> None:
    winner = [[1.0, -1.0, 2.0, -2.0, 1.0, 1.0], [3.0, 1.0, -2.0, 2.0, 1.0, -1.0]]
    predictions = _predictions({WINNER: winner, MEDIAN: [[-8.0, 9.0, 7.0, -10.0, 8.0, 6.0]]})
    found = compare(predictions, WINNER, MEDIAN)
    assert found is not None
    # winner per subject, seeds averaged: 2, 1, 2, 2, 1, 1; gains 6, 8, 5, 8, 7, 5; mean 39 / 6
    assert found.gain == pytest.approx(6.5)
    assert (found.low, found.high) == studentised_interval(np.array([6.0, 8, 5, 8, 7, 5]))
    assert 0 < found.low < 6.5 < found.high
    assert found.outcome == "better"
    assert "beats predicting the training median by 6.50 years" in found.sentence()
    assert beating_the_floor(predictions) == [WINNER]


def test_the_interval_of_one_comparison_is_the_studentised_one_of_its_gains() -> None:
    gains = np.random.default_rng(4).normal(1, 3, 25)
    found = compare(_predictions({WINNER: [[10.0] * 25], PUBLISHED: [list(10 + gains)]}), WINNER, PUBLISHED)
    assert found is not None
    # Of 25 normal values nearly Student's.
    expected = stats.t.interval(0.95, 24, gains.mean(), stats.sem(gains))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.12)
    # Subjects stand in the order of their names.
    ordered = gains[sorted(range(25), key=lambda index: f"s{index}")]
    assert (found.low, found.high) == pytest.approx(studentised_interval(ordered, 0.95), rel=1e-9)


def test_comparisons_that_are_made_together_have_wider_intervals() -> None:
    draws = np.random.default_rng(2)
    predictions = _predictions(
        {method: [list(5 + draws.normal(size=12))] for method in (WINNER, PUBLISHED, "L1 baseline", MEDIAN)}
    )
    together = comparisons(predictions)
    assert [each.family for each in together] == [3, 3, 3]
    errors = errors_of(predictions)
    for each in together:
        gains = (errors[each.other] - errors[WINNER]).to_numpy()
        assert (each.low, each.high) == studentised_interval(gains, 1 - 0.05 / 3)
        alone = compare(predictions, WINNER, each.other)
        assert alone is not None
        assert each.low < alone.low < alone.high < each.high
        assert "for 3 comparisons together" in each.sentence()
        assert "together" not in alone.sentence()
    two = comparisons(predictions[predictions["method"] != MEDIAN])
    assert [each.family for each in two] == [2, 2]


def test_the_error_itself_has_an_interval() -> None:
    errors = [1.0, 2.0, 9.0, 4.0, 3.0, 5.0, 2.0]
    predictions = _predictions({WINNER: [errors, errors], MEDIAN: [[20.0] * 7]})
    assert error_interval(predictions, WINNER) == studentised_interval(np.array(errors), 0.95)
    assert error_interval(predictions, MEDIAN) == (20.0, 20.0)
    assert all(np.isnan(error_interval(predictions, PUBLISHED)))


def test_an_interval_around_zero_cannot_be_told_apart() -> None:
    predictions = _predictions({WINNER: [[5.0] * 8], MEDIAN: [[1.0, 9.5] * 4]})
    found = compare(predictions, WINNER, MEDIAN)
    assert found is not None
    assert found.low < 0 < found.high
    assert found.outcome == "cannot be told apart"
    assert "cannot be told apart from predicting the training median" in verdict(predictions)
    assert "No method here is shown to beat predicting the training median" in verdict(predictions)


def test_a_clear_loss_is_called_worse() -> None:
    predictions = _predictions({WINNER: [[9.0, 8.0, 9.0, 8.0, 9.0, 8.5]], PUBLISHED: [[1.0] * 6]})
    found = compare(predictions, WINNER, PUBLISHED)
    assert found is not None
    assert found.outcome == "worse"
    assert found.gain == pytest.approx(-(51.5 / 6 - 1))
    assert verdict(predictions) == "The search winner is worse than the published configuration."


def test_the_same_model_is_identical_and_five_subjects_are_too_few() -> None:
    same = _predictions({WINNER: [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], PUBLISHED: [[-1, -2, -3, -4, -5, -6]]})
    assert verdict(same) == "The search winner predicts exactly like the published configuration."
    few = _predictions({WINNER: [[1.0] * 5], MEDIAN: [[20.0, 21.0, 22.0, 23.0, 24.0]]})
    assert "5 held-out subjects are too few" in verdict(few)
    assert beating_the_floor(few) is None
    single = compare(few[few["subject"] == "s0"], WINNER, MEDIAN)
    assert single is not None
    assert "1 held-out subject cannot tell" in single.sentence()


def test_a_winner_that_cannot_be_told_from_the_median_is_shown_beside_a_method_that_can() -> None:
    predictions = _predictions({WINNER: [[1.0, 30.0] * 4], PUBLISHED: [[14.0] * 8], MEDIAN: [[16.0] * 8]})
    told = "cannot be told apart from the published configuration or predicting the training median."
    beating = "What does beat predicting the training median: the published configuration."
    assert verdict(predictions) == f"The search winner {told} {beating}"


def test_only_subjects_that_both_methods_predicted_are_compared() -> None:
    predictions = _predictions({WINNER: [[1.0] * 9], MEDIAN: [[2.0] * 7]})
    found = compare(predictions, WINNER, MEDIAN)
    assert found is not None
    assert found.n == 7
    assert found.gain == pytest.approx(1.0)
    assert compare(predictions, WINNER, PUBLISHED) is None


def test_the_median_is_predicted_from_the_training_subjects_where_the_sweep_did_not(run: Path) -> None:
    written = pd.read_csv(run / "predictions.csv")
    written[written["method"] != MEDIAN].to_csv(run / "predictions.csv", index=False)
    found = read_run(run).predictions
    columns = ["subject", "truth", "predicted"]
    of_median = written[written["method"] == MEDIAN].rename(columns={"age": "truth"})
    expected = of_median[columns].reset_index(drop=True)
    made = found.loc[found["method"] == MEDIAN, columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(made, expected)


# --- page


class _Page(HTMLParser):
    """Element ids, links, text, and whether tags are closed in order."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
            if tag == "svg" and name == "aria-label":
                self.labels.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def _report(run: Path) -> _Page:
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(run.glob("report*")) == [path]
    return _Page(path.read_text(encoding="utf-8"))


def test_page_of_a_finished_run_has_every_section_and_figure_and_needs_no_network(run: Path) -> None:
    page = _report(run)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert page.tags.count("svg") == len(FIGURES) + 2 == len(page.labels)
    assert all(len(label) > 40 for label in page.labels)
    assert len(set(page.ids)) == len(page.ids)  # figures do not share clip paths
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object"})
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert len(html) < 3_000_000

    _tells_the_numbers_of_the_tables(page, run)


def _tells_the_numbers_of_the_tables(page: _Page, run: Path) -> None:
    scores = pd.read_csv(run / "holdout.csv").groupby("method")["mae"]
    mean, sd, median = scores.mean()[WINNER], scores.std()[WINNER], scores.mean()[MEDIAN]
    answer = f"Held-out MAE of the search winner: {mean:.2f} ± {sd:.2f} years (n = 20 subjects, 2 seeds)"
    assert f"{answer}; predicting the training median: {median:.2f}." in page.text
    assert "These brains are synthetic" in page.text
    assert "loss became NaN in epoch 6 of fold 0, seed 0" in page.text
    assert "brainsweep sweep cohort" in page.text
    assert json.loads((run / "run.json").read_text())["cohort"]["hash"] in page.text
    assert "incomplete" not in page.text


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, but not turned into SVG, which takes most of a report's time."""
    monkeypatch.setattr(page_module, "as_svg", lambda figure, name, words: f'<svg aria-label="{name}"></svg>')


def test_page_is_the_same_when_written_twice(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_names_from_the_data_cannot_become_markup(run: Path) -> None:
    about = json.loads((run / "run.json").read_text())
    about["cohort"]["name"] = "<script>alert(1)</script>"
    (run / "run.json").write_text(json.dumps(about))
    predictions = pd.read_csv(run / "predictions.csv")
    predictions.assign(site='A"<b>&$_{').to_csv(run / "predictions.csv", index=False)
    page = _report(run)
    assert "script" not in page.tags
    assert any('A"<b>&$_{' in label for label in page.labels)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("holdout.csv", "No held-out result yet. Best validation MAE so far"),
        ("predictions.csv", "the winner has not been tried on the held-out subjects"),
        ("cells.csv", "no (fold, seed) cell was recorded"),
        ("history.csv", "no epoch of the winner was recorded"),
        ("study.journal", "the Optuna study is absent"),
        ("splits.csv", "The splits were not recorded"),
        ("run.json", "The command was not recorded"),
        ("best/settings.json", "best/settings.json is absent"),
        ("cohort/manifest.parquet", "its people are unknown"),
    ],
)
def test_page_without_one_of_the_files_says_what_is_missing(
    run: Path, name: str, told: str, unsaved: None
) -> None:
    (run / name).unlink()
    page = _report(run)
    assert [section for section in page.ids if section in SECTIONS] == list(SECTIONS)
    assert "This run is incomplete." in page.text
    assert told in page.text


def test_a_killed_sweep_that_left_only_its_study_has_a_leaderboard(run: Path, unsaved: None) -> None:
    table = leaderboard(read_run(run).trials)
    for path in [path for path in run.iterdir() if path.name != "study.journal"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = _report(run)
    # the study knows trials, values and reasons, but not the number of epochs of a table
    assert leaderboard(read_run(run).trials)["trial"].tolist() == table["trial"].tolist()
    assert table["value"][0] in page.text
    assert "loss became NaN" in page.text


def test_page_of_a_run_in_which_every_trial_failed(tmp_path: Path, unsaved: None) -> None:
    run = make_run(tmp_path / "run", trials=3, all_failed=True)
    page = _report(run)
    assert "No trial was completed, so nothing can be said about accuracy (3 failed)." in page.text
    assert page.text.count("loss became NaN") == 3
    assert "importance needs at least 2 completed trials; this run has 0" in page.text
    console = Console(width=100, file=io.StringIO())
    print_leaderboard(console, read_run(run))
    shown = console.file.getvalue()
    assert "No trial was completed" in shown
    assert "Trial 2 failed: loss became NaN" in shown


def test_page_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "brainsweep sweep here"}')
    page = _report(tmp_path)
    assert "No trial was completed, so nothing can be said about accuracy (no trials)." in page.text


def test_page_with_two_trials_still_draws_what_it_can(tmp_path: Path, unsaved: None) -> None:
    page = _report(make_run(tmp_path / "run", trials=2))
    assert page.tags.count("svg") >= 8


def test_torn_files_are_named_and_the_rest_is_shown(run: Path, unsaved: None) -> None:
    (run / "cells.csv").write_text('number,fold\n1,2\n"torn')
    (run / "run.json").write_text("{")
    with (run / "study.journal").open("a") as journal:
        journal.write('{"op_code"')
    page = _report(run)
    assert "cells cannot be read" in page.text
    assert "run.json cannot be read" in page.text
    assert "Held-out MAE of the search winner" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "train"}')
    with pytest.raises(UserError, match="is a 'train' run; a report is made of sweeps"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written_says_where(run: Path, unsaved: None) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write the report to '.*report\.html'"):
        write_report(run)


def test_subject_names_that_look_like_numbers_or_nothing_stay_names(run: Path) -> None:
    predictions = pd.read_csv(run / "predictions.csv")
    predictions["subject"] = predictions["subject"].str.replace("sub-", "")
    predictions.assign(site="NA").to_csv(run / "predictions.csv", index=False)
    found = read_run(run).predictions
    assert found["subject"].iloc[0] == "000"
    assert set(found["site"]) == {"NA"}


# --- caveats and terminal


def test_caveats_follow_the_run(run: Path) -> None:
    record = read_run(run)
    told = " ".join(caveats(record))
    assert "Ages run from 18 to 76 years" in told
    assert "the same 3 sites" in told
    assert "2 refits with other seeds" in told
    about = json.loads((run / "run.json").read_text())
    about["cohort"]["synthetic"] = False
    (run / "run.json").write_text(json.dumps(about))
    for name in ("holdout.csv", "predictions.csv"):
        table = pd.read_csv(run / name)
        table[table["seed"] == 0].to_csv(run / name, index=False)
    told = " ".join(caveats(read_run(run)))
    assert "synthetic" not in told
    assert "refitted with a single seed" in told
    assert "±" not in headline(read_run(run))


def test_terminal_shows_leaderboard_holdout_and_verdict_in_100_columns(finished: Path) -> None:
    console = Console(width=100, file=io.StringIO())
    print_leaderboard(console, read_run(finished))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for words in ("Leaderboard", "published: exponential", "training median", "The search winner"):
        assert words in text


# --- figures


def test_history_shows_every_state_with_its_own_mark_and_the_running_minimum(finished: Path) -> None:
    record = read_run(finished)
    lines = {line.get_label(): line for line in figures.optimisation_history(record).axes[0].lines}
    marks = [lines[name].get_marker() for name in ("completed", "pruned", "failed")]
    assert len(set(marks)) == 3  # told apart without colour
    completed = record.trials[record.trials["state"] == "COMPLETE"]["value"].tolist()
    best = [min(completed[: index + 1]) for index in range(len(completed))]
    assert list(lines["best so far"].get_ydata())[:-1] == pytest.approx(best)
    assert len(lines["failed"].get_xdata()) == (record.trials["state"] == "FAIL").sum()


def test_learning_curves_mark_every_pruned_trial_where_it_stopped(finished: Path) -> None:
    record = read_run(finished)
    axes = figures.learning_curves(record).axes[0]
    ends = sorted(
        line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())
    )
    assert ends == sorted(record.trials.loc[record.trials["state"] == "PRUNED", "epochs"])


def test_an_extreme_first_value_does_not_stretch_the_learning_curves_to_either_side(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_run(finished)
    assert record.study is not None
    trials = [trial for trial in record.study.get_trials() if trial.intermediate_values]
    ordinary = [value for trial in trials for value in trial.intermediate_values.values()]
    trials[0].intermediate_values[min(trials[0].intermediate_values)] = 1e4
    monkeypatch.setattr(record.study, "get_trials", lambda **_: trials)
    bottom, top = figures.learning_curves(record).axes[0].get_ylim()
    assert top < 1000
    assert min(ordinary) - 0.1 * (top - bottom) < bottom <= min(ordinary)


def test_fold_spread_has_a_dot_for_every_cell_of_the_trials_shown(finished: Path) -> None:
    record = read_run(finished)
    axes = figures.fold_spread(record, top=2).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    numbers = [int(re.findall(r"\d+", label)[0]) for label in shown]
    dots = [value for line in axes.lines if line.get_marker() in "os^" for value in line.get_xdata()]
    assert sorted(dots) == pytest.approx(sorted(record.cells[record.cells["number"].isin(numbers)]["mae"]))
    assert any("published" in label for label in shown)


def test_importances_are_shares_and_conditional_settings_are_named(finished: Path) -> None:
    record = read_run(finished)
    assert sum(importances_of(record).values()) == pytest.approx(1)
    assert "too few trials for 15 settings" in importance_note(record)
    assert "objective.bin_width" in unassessed_settings(record)


def test_gaps_are_predicted_minus_true_age(finished: Path) -> None:
    record = read_run(finished)
    table = pd.read_csv(finished / "predictions.csv")
    winner = table[table["method"] == WINNER].groupby("subject")
    expected = winner["predicted"].mean() - winner["age"].first()
    found = subject_figures.held_out(record).set_index("subject")["gap"]
    pd.testing.assert_series_equal(found, expected, check_names=False)


def test_schedules_are_drawn_as_set() -> None:
    settings = {
        "views": {"count": 2},
        "objective": {
            "temperature": {"shape": "linear", "start": 0.2, "end": 0.1},
            "width": None,
            "neighbours": {"shape": "staircase", "start": 1.0, "end": 14, "step": 10, "metric": "manhattan"},
        },
        "optimiser": {
            "learning_rate": 1e-3,
            "decay": {"shape": "cosine", "start": 1.0, "end": 0.0},
            "warmup": 0.1,
        },
        "training": {"epochs": 50, "batch_size": 32},
    }
    assert schedule_figure.temperature(settings, 0.5) == pytest.approx(0.15)
    assert schedule_figure.kernel_width(settings, 0.5) is None
    # the published staircase (32 in epochs 1 to 9, 27 in 10, 14 at the end), two views, own row not counted
    assert schedule_figure.other_rows_repelled(settings, 9 / 50) == 63
    assert schedule_figure.other_rows_repelled(settings, 10 / 50) == 53
    assert schedule_figure.other_rows_repelled(settings, 1.0) == 27
    # epoch 1 of 5 of the warm-up: 1 % of the decayed rate; the last epoch of a full cosine: 0
    assert schedule_figure.learning_rate(settings, 1 / 50) == pytest.approx(1e-5, rel=1e-2)
    assert schedule_figure.learning_rate(settings, 0.5) == pytest.approx(5e-4)
    assert schedule_figure.learning_rate(settings, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_every_axis_is_named_and_ages_and_errors_have_their_unit(finished: Path) -> None:
    record = read_run(finished)
    for name, (_, draw) in FIGURES.items():
        figure = draw(record)
        along = [axes.get_xlabel() for axes in figure.axes] + [figure.get_supxlabel()]
        upward = [axes.get_ylabel() or axes.get_title(loc="left") for axes in figure.axes]
        has_groups = name in ("gains", "importance", "folds", "gap")  # named by their ticks
        assert (any(along) and all(upward)) or (has_groups and (any(along) or any(upward))), name
        if name not in ("importance", "loss", "schedules"):
            assert "years" in " ".join([*along, *upward]), name


def test_a_figure_without_its_data_gives_a_reason(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    record = read_run(tmp_path)
    for _, draw in FIGURES.values():
        with pytest.raises(NothingToShow, match=r"^[a-z].{20,}"):
            draw(record)
