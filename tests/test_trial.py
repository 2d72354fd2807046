"""A trial on its cells: order, resumption, divergence, what is read and what is left behind."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from of_age import assign
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.evaluation.probes import ALPHAS, fit_age_probe
from core.evaluation.splits import make_splits
from core.inference import load_predictor
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, Cell
from distributed.training.loop import CellTraining
from distributed.training.optimiser import learning_rate
from distributed.training.subjects import Place, Subjects
from distributed.training.trial import Runner
from search_spaces import published

CELLS = [{"fold": 0, "seed": 0}, {"fold": 1, "seed": 0}]


class Recorded:
    """Volumes that remember which rows were read."""

    def __init__(self, volumes):
        self.volumes, self.rows = volumes, set()

    def read(self, rows, out=None, boxes=None):
        self.rows |= set(np.asarray(rows).tolist())
        return self.volumes.read(rows, out, boxes)

    def moments(self, rows):
        self.rows |= set(np.asarray(rows).tolist())
        return self.volumes.moments(rows)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


@pytest.fixture
def subjects(cohort):
    splits = make_splits(cohort.manifest, folds=3)
    return Subjects(Recorded(InMemory.of(cohort)), cohort.manifest, splits, ("stiffness",))


def settings(**changes):
    return resolve(merge(published("brain_age"), SMALL | changes)).model_dump(mode="json")


def run_all(runner, assignment):
    answers = [runner(assignment)]
    while not answers[-1]["done"]:
        answers.append(runner(assignment))
    return answers


def without_times(history):
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "spent_seconds", "first_step_at")}
        for row in history
    ]


def test_a_trial_visits_its_cells_in_order_and_its_value_is_their_mean(subjects, tmp_path):
    answers = run_all(Runner(subjects), assign(tmp_path / "0000", settings(), CELLS))
    assert [(answer["fold"], answer["epoch"]) for answer in answers] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [answer["epochs"] for answer in answers] == [1, 2, 3, 4]
    cells = json.loads((tmp_path / "0000" / "progress.json").read_text())["cells"]
    errors = [cell["mae"] for cell in cells]
    assert answers[0]["value"] == answers[0]["mae"]  # epochs of the first cell
    assert answers[2]["value"] == answers[1]["value"]  # then whole cells, here the first one
    assert answers[3]["value"] == pytest.approx(np.mean(errors))
    assert answers[3]["sd"] == pytest.approx(np.std(errors, ddof=1))
    assert answers[3]["n"] == 2


def test_other_folds_choose_the_penalty_of_a_cell_and_a_refit_takes_the_best_of_all(cohort, tmp_path):
    """From the predictions on disk and from probes fitted anew; the encoders are trained a second time."""
    splits = make_splits(cohort.manifest, folds=3)
    subjects = Subjects(Recorded(InMemory.of(cohort)), cohort.manifest, splits, ("stiffness",))
    cells = [{"fold": fold, "seed": 0} for fold in range(3)]
    answers = run_all(Runner(subjects), assign(tmp_path / "0000", settings(), cells))
    rows = json.loads((tmp_path / "0000" / "progress.json").read_text())["cells"]

    def curve(fold, without):
        """The error of every penalty in the cell of `fold`, whose probe does not know the fold `without`."""
        known, unseen, of_known = embedded[fold]
        kept = ~np.isin(of_known, splits.folds[without]) if without != fold else np.full(len(of_known), True)
        errors = []
        for alpha in ALPHAS:
            probe = fit_age_probe(known.embeddings[kept], known.labels[kept], penalty=alpha)
            errors.append(np.abs(probe.predict(unseen.embeddings) - unseen.labels).mean())
        return np.array(errors)

    embedded = []
    for cell in cells:
        training = CellTraining(resolve(settings()), subjects, Cell(**cell), Place())
        for _ in range(2):
            training.run_epoch()
        known, unseen = training._observe(training.training_rows), training._observe(training.evaluation_rows)
        embedded.append((known, unseen, training.training_rows))
    for fold in range(3):
        chosen = int(np.argmin(np.mean([curve(other, fold) for other in {0, 1, 2} - {fold}], axis=0)))
        error = curve(fold, fold)[chosen]
        assert (rows[fold]["penalty"], rows[fold]["mae"]) == (ALPHAS[chosen], pytest.approx(error, rel=1e-5))
        table = pd.read_csv(tmp_path / "0000" / f"predictions-{fold}-0.csv")
        assert np.abs(table["predicted"] - table["truth"]).mean() == pytest.approx(error, rel=1e-5)
    # The values as they were after each cell: the first cell chose alone, the second one changed it.
    assert [len(values) for values in answers[-1]["after_cells"]] == [1, 2, 3]
    assert answers[-1]["after_cells"][0] == [answers[1]["value"]]
    assert np.mean(answers[-1]["after_cells"][1]) == pytest.approx(answers[3]["value"])
    assert answers[-1]["after_cells"][2] == [row["mae"] for row in rows]
    of_all = np.mean([curve(fold, fold) for fold in range(3)], axis=0)
    assert answers[-1]["penalty"] == ALPHAS[int(np.argmin(of_all))]
    refit = assign(
        tmp_path / "winner",
        settings(),
        [{"fold": HOLDOUT, "seed": 0}],
        keep_model=True,
        penalty=answers[-1]["penalty"],
    )
    run_all(Runner(subjects), refit)
    kept = json.loads((tmp_path / "winner" / "model-0" / "probe.json").read_text())
    assert kept["alpha"] == answers[-1]["penalty"]


def test_the_hold_out_is_not_read_by_a_trial_and_is_read_by_a_refit(subjects, tmp_path):
    run_all(Runner(subjects), assign(tmp_path / "0000", settings(), CELLS))
    held_out = set(subjects.splits.holdout.tolist())
    assert not subjects.volumes.rows & held_out
    assert subjects.volumes.rows == set(subjects.splits.development.tolist())
    run_all(Runner(subjects), assign(tmp_path / "winner", settings(), [{"fold": HOLDOUT, "seed": 0}]))
    assert held_out <= subjects.volumes.rows


def test_a_refit_looks_at_the_hold_out_at_its_end_only(subjects, tmp_path):
    answers = run_all(
        Runner(subjects), assign(tmp_path / "winner", settings(), [{"fold": HOLDOUT, "seed": 0}])
    )
    assert [math.isnan(answer["mae"]) for answer in answers] == [True, False]
    assert "prunable_epochs" not in answers[-1]  # what a scheduler would look at
    table = pd.read_csv(tmp_path / "winner" / "predictions-0.csv")
    assert np.abs(table["predicted"] - table["truth"]).mean() == pytest.approx(answers[-1]["mae"])


@pytest.mark.parametrize("objective", ["exponential", "supcon", "l1"])
@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_a_trial_continued_in_a_new_process_ends_with_the_same_numbers(
    subjects, tmp_path, objective, interrupted_after
):
    chosen = settings(**{"objective.name": objective, "views.crop": 0.8, "views.noise": 0.1})
    whole = run_all(Runner(subjects), assign(tmp_path / "whole", chosen, CELLS))
    runner = Runner(subjects)
    for _ in range(interrupted_after):
        runner(assign(tmp_path / "parts", chosen, CELLS))
    torch.rand(7)  # whatever happened in between
    parts = run_all(Runner(subjects), assign(tmp_path / "parts", chosen, CELLS))
    assert len(parts) == len(whole) - interrupted_after
    histories = [json.loads((tmp_path / name / "progress.json").read_text()) for name in ("whole", "parts")]
    assert str(without_times(histories[0]["history"])) == str(without_times(histories[1]["history"]))
    assert histories[0]["cells"] == histories[1]["cells"]


def test_a_finished_trial_answers_again_without_training(subjects, tmp_path):
    assignment = assign(tmp_path / "0000", settings(), CELLS)
    last = run_all(Runner(subjects), assignment)[-1]
    again = Runner(subjects)(assignment)
    assert {key: str(value) for key, value in again.items()} == {
        key: str(value) for key, value in last.items()
    }
    assert not (tmp_path / "0000" / "checkpoint.pt").exists()


def test_trials_do_not_influence_each_other(subjects, tmp_path):
    first = assign(tmp_path / "0000", settings(), CELLS)
    second = assign(tmp_path / "0001", settings(**{"optimiser.learning_rate": 1e-2}), CELLS)
    alone = run_all(Runner(subjects), second)[-1]["value"]
    runner = Runner(subjects)
    run_all(runner, first)
    assert run_all(runner, assign(tmp_path / "0002", second["settings"], CELLS))[-1]["value"] == alone


def test_a_diverging_trial_says_where(subjects, tmp_path):
    wild = settings(**{"optimiser.name": "sgd", "optimiser.learning_rate": 1e30})
    answers = run_all(Runner(subjects), assign(tmp_path / "0000", wild, CELLS))
    assert "fold 0" in answers[-1]["failed"]
    assert math.isnan(answers[-1]["value"])
    assert not answers[-1]["finished"]


def test_a_channel_the_cohort_lacks(subjects, tmp_path):
    answer = Runner(subjects)(assign(tmp_path / "0000", settings(**{"data.channels": ["t1w"]}), CELLS))
    assert "'t1w', but the cohort has stiffness" in answer["failed"]


def test_more_workers_than_subjects_in_a_batch(subjects, tmp_path):
    answer = Runner(subjects, Place(workers=9))(assign(tmp_path / "0000", settings(), CELLS))
    assert "9 workers cannot share a batch of 8 subjects" in answer["failed"]


def test_bfloat16_on_a_cpu_is_refused(subjects, tmp_path):
    chosen = settings(**{"training.precision": "bfloat16"})
    assert "wrong gradients" in Runner(subjects)(assign(tmp_path / "0000", chosen, CELLS))["failed"]


def test_a_folder_that_cannot_be_written_is_named(subjects, tmp_path):
    (tmp_path / "file").write_text("")
    answer = Runner(subjects)(assign(tmp_path / "file" / "0000", settings(), CELLS))
    assert str(tmp_path / "file") in answer["failed"]
    assert answer["done"]


def test_the_kept_model_predicts_what_the_refit_predicted(subjects, cohort, tmp_path):
    for objective in ("exponential", "l1"):
        chosen = settings(**{"objective.name": objective})
        folder = tmp_path / objective
        run_all(Runner(subjects), assign(folder, chosen, [{"fold": HOLDOUT, "seed": 3}], keep_model=True))
        table = pd.read_csv(folder / "predictions-3.csv")
        predicted = load_predictor(folder / "model-3").predict(cohort.read(subjects.splits.holdout))[
            "predicted"
        ]
        np.testing.assert_allclose(predicted, table["predicted"], rtol=1e-4)


def test_published_learning_rate_drops_at_epochs_11_and_21():
    chosen = resolve(published("brain_age"))
    rates = [learning_rate(chosen, epoch) for epoch in range(1, 51)]
    expected = [
        1e-4 * 0.9 ** sum(milestone < epoch for milestone in range(10, 50, 10)) for epoch in range(1, 51)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_warm_up_rises_in_a_line_from_one_percent():
    chosen = resolve(merge(published("brain_age"), {"optimiser.warmup": 0.1, "optimiser.decay": 1.0}))
    rates = [learning_rate(chosen, epoch) / 1e-4 for epoch in range(1, 8)]
    np.testing.assert_allclose(rates, [0.01, 0.208, 0.406, 0.604, 0.802, 1, 1])


def test_progress_files_hold_no_machine_specific_types(subjects, tmp_path):
    run_all(Runner(subjects), assign(tmp_path / "0000", settings(), CELLS))
    progress = json.loads(Path(tmp_path / "0000" / "progress.json").read_text())
    assert set(progress) == {"of", "history", "cells", "answer"}
    assert {type(value) for cell in progress["cells"] for value in cell.values()} <= {int, float}
