"""What a report says of several objectives, of the winner's luck, of who was read, and of a changed search."""

import json

import numpy as np
import pandas as pd
import pytest
from fake_run import make_run

from core.objectives import COST
from core.report.answer.findings import caveats, verdict_lines
from core.report.answer.front import front_table, pareto_front
from core.report.answer.honesty import access_line, change_lines, measured_again, optimism
from core.report.answer.record import RunRecord, read_run
from core.report.page import render
from core.run_description import RunDescription
from core.run_names import PUBLISHED, WINNER

OBJECTIVES = ["mae", "site_balanced_accuracy", COST]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "finished")


def several(values, **columns):
    table = pd.DataFrame(values, columns=["value", *OBJECTIVES[1:]]).assign(
        number=range(len(values)), label=None, state="COMPLETE", sd=0.1, n=3, epochs=6, reason=None, **columns
    )
    table["mae"] = table["value"]
    return RunRecord(folder=None, about=RunDescription(sweep={"objectives": OBJECTIVES}), trials=table)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nobody_beats(seed):
    values = np.random.default_rng(seed).integers(0, 6, (40, 3)).astype(float)  # integers: with ties
    record = several(values)
    unbeaten = {
        index
        for index, mine in enumerate(values)
        if not any(all(other <= mine) and any(other < mine) for other in values)
    }
    assert set(pareto_front(record)["number"]) == unbeaten
    assert record.best in unbeaten  # the winner is on the front


def test_the_front_leaves_out_what_is_pruned_undefined_or_outside():
    record = several(
        [(5.0, 0.5, 10.0), (1.0, 0.1, 1.0), (2.0, np.nan, 1.0), (6.0, 0.4, 20.0), (0.5, 0.1, 0.1)]
    )
    trials = record.trials.assign(outside=[False, False, False, False, True])
    trials.loc[1, "state"] = "PRUNED"
    record = RunRecord(folder=None, about=record.about, trials=trials)
    assert front_table(record)["trial"].tolist() == [0, 3]
    assert record.best == 2  # the best in the first objective that the space still holds


def test_one_objective_has_no_front(finished):
    record = read_run(finished)
    assert pareto_front(record).empty
    assert "figure-front" not in render(record)


def with_repeats(run, tmp_path, **about):
    content = RunDescription.model_validate(json.loads((run / "run.json").read_text()) | about)
    record = read_run(run)
    cells = [(WINNER, fold, 9, 7.0 + fold) for fold in range(3)] + [
        (PUBLISHED, fold, 9, 9.0) for fold in range(3)
    ]
    confirmed = pd.DataFrame(cells, columns=["method", "fold", "seed", "mae"])
    return RunRecord(**(vars(record) | {"about": content, "confirmed": confirmed}))


def test_the_winner_measured_again_stands_beside_its_search_value(finished, tmp_path):
    record = with_repeats(finished, tmp_path)
    table = measured_again(record).set_index("measured")
    best = record.trial(record.best)
    assert table[WINNER].iloc[0].startswith(f"{best['value']:.2f} ± {best['sd']:.2f} (n = {int(best['n'])})")
    assert table.iloc[1].tolist() == ["8.00 ± 1.00 (n = 3)", "9.00 ± 0.00 (n = 3)"]
    refits = record.holdout[record.holdout["method"] == WINNER]["mae"]
    assert table[WINNER].iloc[2] == f"{refits.mean():.2f} ± {refits.std():.2f} (n = {len(refits)})"
    worse = 8.0 - best["value"]
    assert f"{abs(worse):.2f} {'worse' if worse > 0 else 'better'} than in the search" in optimism(record)
    page = render(record)
    assert "Was the winner lucky?" in page
    assert "8.00 ± 1.00 (n = 3)" in page


def test_without_repeats_the_search_value_stands_beside_the_refits(finished):
    record = read_run(finished)
    assert optimism(record) == ""
    assert [row.split(",")[0] for row in measured_again(record)["measured"]] == [
        "in the search",
        "refitted with fresh seeds",
    ]


def access(*rows):
    return pd.DataFrame(rows, columns=["subject", "first_read", "fold"])


def test_access_records_say_who_read_the_hold_out(finished):
    record = read_run(finished)
    held = record.splits.loc[record.splits["role"] == "holdout", "subject"].iloc[0]
    used = record.splits.loc[record.splits["role"] != "holdout", "subject"].iloc[0]

    def line(*rows):
        return access_line(RunRecord(**(vars(record) | {"access": access(*rows)})))

    early, late = "2026-11-20 09:14:05+00:00", "2026-11-20 09:17:00+00:00"
    read = "Access records of the workers: "
    assert access_line(record) == ""
    assert line((used, early, 0)) == f"{read}1 subject read, none of them held out."
    assert line((used, early, 0), (held, late, -1)) == (
        f"{read}2 subjects read; the first held-out one at 2026-11-20 09:17:00 UTC, by a refit."
    )
    evaluated = RunRecord(
        **(
            vars(record)
            | {
                "access": access((held, late, -1)).assign(last_read=late),
                "evaluations": (pd.Timestamp("2026-11-25 10:00:00", tz="UTC").timestamp(),),
            }
        )
    )
    assert access_line(evaluated).endswith(
        ", the last at 2026-11-25 10:00:00 UTC, by refits and `brainsweep evaluate`."
    )
    for fold in range(3):
        assert line((used, early, 0), (held, late, fold)) == (
            f"{read}2 subjects read. 1 held-out subject WERE READ BY THE SEARCH: its result is void."
        )


def test_a_changed_search_is_told_and_so_is_a_second_look(finished, tmp_path):
    change = {
        "when": "2026-11-20T10:00:00+00:00", "what": ["24 trials become 40"], "after_trials": 24,
        "holdout_seen": True, "outside": [1, 2],
    }  # fmt: skip
    record = with_repeats(finished, tmp_path, changes=[change])
    (line,) = change_lines(record)
    assert "after 24 trials: 24 trials become 40. 2 trials lay outside" in line
    assert any("were looked at 2 times" in each for each in caveats(record))
    assert change_lines(read_run(finished)) == []


def test_every_look_is_told_and_marks_the_verdict(finished, tmp_path):
    first = {"when": "2026-11-20T10:00:00+00:00", "trials": 6, "winner": 2}
    once = with_repeats(finished, tmp_path / "once", looks=[first])
    assert any(
        "looked at once, after the search (2026-11-20 10:00 UTC, after 6 trials)" in each
        for each in caveats(once)
    )
    assert not any("went on" in each for each in verdict_lines(once))
    looks = [first, {"when": "2026-11-21T10:00:00+00:00", "trials": 24, "winner": 4}]
    twice = with_repeats(finished, tmp_path / "twice", looks=looks)
    assert any(
        "looked at 2 times (2026-11-20 10:00 UTC, after 6 trials; 2026-11-21 10:00 UTC, after 24 trials)"
        in each
        for each in caveats(twice)
    )
    assert "went on after the held-out subjects had been looked at" in verdict_lines(twice)[1]
    page = render(twice)
    assert "went on after the held-out subjects" in page


def test_a_page_of_several_objectives_has_the_front_and_names_the_first(finished, tmp_path):
    record = read_run(finished)
    trials = record.trials.assign(
        openbhb_score=record.trials["value"], **{COST: 100 - record.trials["number"]}
    )
    sweep = record.about.sweep | {"objectives": ["openbhb_score", COST]}
    about = record.about.model_copy(update={"sweep": sweep})
    page = render(RunRecord(**(vars(record) | {"about": about, "trials": trials})))
    assert 'id="figure-front"' in page
    assert "The Pareto front" in page
    assert "cost (accelerator-seconds)" in page
    assert "Site balanced accuracy ** 0.3 · validation MAE (years), mean ± SD" in page
