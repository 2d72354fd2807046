"""Classification against PyTorch's and scikit-learn's own: losses, probes, metrics of a cell, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from process_helpers import run
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from small_cohort import SIDE

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.class_probe import PENALTIES, NeighbourProbe, fit_class_probe, read_probe
from core.evaluation.splits import make_splits
from core.files.tables import write_table
from core.losses.classes import CrossEntropy, Focal
from core.report.answer.classes import auc_interval, pooled_auc
from core.report.answer.record import read_predictions
from core.tasks.classification import Classification
from core.tasks.task import Judging, Observed
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from search_spaces import published

TASK = Classification()
CONTRASTIVE = {"objective.name": "supcon", "views.count": 2}


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("classification"), {"data.target": "kind", **given}))


def scores_of(batch=12, views=2, classes=3):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, views, classes, generator=generator, dtype=torch.float32).requires_grad_()
    return scores, torch.randint(0, classes, (batch,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("counts", [None, [10.0, 3.0, 7.0]])
def test_cross_entropy_is_that_of_pytorch(counts, smoothing):
    scores, classes = scores_of()
    loss = CrossEntropy(class_weights="balanced" if counts else "none", label_smoothing=smoothing).build()
    weights = None
    if counts:
        loss.weigh(torch.tensor(counts))
        labels = np.repeat([0, 1, 2], np.array(counts, dtype=int))
        weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=labels)).float()
    found = loss(scores, classes, 0.0)
    expected = F.cross_entropy(
        scores.flatten(0, 1), classes.repeat_interleave(2), weight=weights, label_smoothing=smoothing
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (found, expected))
    )


def test_the_published_form_is_that_of_soft_targets():
    scores, classes = scores_of()
    loss = CrossEntropy(class_weights="balanced", reference="soft_targets").build()
    loss.weigh(torch.tensor([10.0, 3.0, 7.0]))
    soft = F.one_hot(classes.repeat_interleave(2), 3).float()
    expected = F.cross_entropy(scores.flatten(0, 1), soft, weight=loss.weights)
    torch.testing.assert_close(loss(scores, classes, 0.0), expected)
    other = CrossEntropy(class_weights="balanced").build()
    other.weigh(torch.tensor([10.0, 3.0, 7.0]))
    assert not torch.isclose(other(scores, classes, 0.0), expected)


def test_focal_loss_term_by_term():
    scores, classes = scores_of(5, 2)
    total = 0.0
    for subject in range(5):
        for view in range(2):
            certain = torch.softmax(scores[subject, view], 0)[classes[subject]].item()
            total += -((1 - certain) ** 1.5) * np.log(certain)
    assert Focal(gamma=1.5).build()(scores, classes, 0.0).item() == pytest.approx(total / 10, rel=1e-5)


def test_losses_of_classes_refuse_what_they_cannot_compare():
    scores, classes = scores_of()
    for given in ((scores[:, 0], classes), (scores, None)):
        with pytest.raises(UserError, match="classes"):
            CrossEntropy().build()(*given, 0.0)


def embedded(scans=60, classes=3, seed=0, features=5):
    generator = np.random.default_rng(seed)
    places = np.arange(scans) % classes
    embeddings = generator.normal(size=(scans, features)) * [1, 10, 0.1, 1, 1] + 0.8 * places[:, None]
    return embeddings.astype(np.float32), places, np.array([f"s{index}" for index in range(scans)])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_logistic_probe_is_that_of_scikit_learn(classes):
    embeddings, places, people = embedded(classes=classes)
    probe = fit_class_probe(embeddings, places, people, 3.0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 3, tol=1e-8, max_iter=5000))
    expected = pipeline.fit(embeddings.astype(float), places).predict_proba(embeddings.astype(float))
    np.testing.assert_allclose(probe.probabilities(embeddings), expected, atol=1e-4)
    again = read_probe(probe.to_json())
    np.testing.assert_array_equal(again.probabilities(embeddings), probe.probabilities(embeddings))


def test_the_largest_penalty_leaves_the_shares_of_the_classes():
    embeddings, places, people = embedded(scans=40, classes=2)
    kept = np.r_[:40:2, 1:20:2]
    probe = fit_class_probe(embeddings[kept], places[kept], people[kept], PENALTIES[-1] * 1e3)
    shares = np.bincount(places[kept]) / len(kept)
    np.testing.assert_allclose(probe.probabilities(embeddings), np.tile(shares, (40, 1)), atol=5e-3)


def test_scanning_a_person_twice_moves_no_probe():
    embeddings, places, people = embedded()
    twice = np.r_[np.arange(60), np.repeat(7, 4)]
    one, other = (
        fit_class_probe(embeddings[rows], places[rows], people[rows], 1.0) for rows in (np.arange(60), twice)
    )
    # The features are standardised over scans, so nearly, not exactly.
    np.testing.assert_allclose(one.probabilities(embeddings), other.probabilities(embeddings), atol=0.03)
    unweighted = fit_class_probe(embeddings[twice], places[twice], np.arange(64).astype(str), 1.0)
    moved = [
        np.abs(probe.probabilities(embeddings) - one.probabilities(embeddings)).max()
        for probe in (other, unweighted)
    ]
    assert moved[0] < moved[1]


def test_neighbours_are_the_nearest_by_angle():
    embeddings, places, _ = embedded()
    probe = NeighbourProbe(embeddings, places, 3, 7)
    found = read_probe(probe.to_json()).probabilities(embeddings[:9])
    for row, share in zip(embeddings[:9], found, strict=True):
        lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(row)
        nearest = np.argsort(-(embeddings @ row) / lengths, kind="stable")[:7]
        np.testing.assert_allclose(share, np.bincount(places[nearest], minlength=3) / 7)


def seen(rows, classes=2, names=("case", "control", "other")):
    embeddings, places, people = embedded(scans=80, classes=classes)
    labels = np.array([names[place] for place in places], dtype=object)
    return Observed(labels[rows], np.full(len(rows), "a"), people[rows], embeddings[rows])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("probe", ["logistic", "neighbours"])
def test_a_cell_is_judged_as_scikit_learn_would_fitted_on_its_training_scans(probe, classes):
    settings = settings_of(**CONTRASTIVE, evaluation__probe=probe)
    training, evaluation = seen(np.arange(50), classes), seen(np.arange(50, 80), classes)
    outcome = TASK.judge(settings, training, evaluation, Judging(penalty=2.0))
    if probe == "logistic":
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 2, tol=1e-8, max_iter=5000))
    else:
        model = KNeighborsClassifier(5, metric="cosine")
    model.fit(training.embeddings, training.labels.astype(str))
    expected = model.predict_proba(evaluation.embeddings)
    table = outcome.predictions
    names = sorted(set(training.labels))
    np.testing.assert_allclose(table[[f"p_{name}" for name in names]], expected, atol=1e-3)
    assert table["predicted"].tolist() == [names[place] for place in expected.argmax(axis=1)]
    one_by_one = [
        roc_auc_score(evaluation.labels == name, expected[:, place]) for place, name in enumerate(names)
    ]
    assert outcome.metrics["macro_auc"] == pytest.approx(np.mean(one_by_one), abs=1e-3)
    assert outcome.metrics["floor_macro_auc"] == 0.5
    assert table["error"].mean() == pytest.approx(outcome.metrics["log_loss"])


def manifest_of(kinds):
    return pd.DataFrame(
        {"subject": [f"s{index:02d}" for index in range(len(kinds))], "kind": kinds, "site": "a", "age": 30.0}
    )


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["a"] * 20, "has the class a only: two or more are needed"),
        ([np.nan] * 20, "has no known class"),
        ([f"name {index}" for index in range(120)], "has 120 different values, such as name 0 and name 99"),
    ],
)
def test_columns_that_hold_no_classes(kinds, message):
    with pytest.raises(UserError, match=message):
        TASK.labels(settings_of(), manifest_of(kinds))


def test_a_class_with_fewer_people_than_folds_is_one_line():
    manifest = manifest_of(["M"] * 3 + ["F"] * 33)
    splits = make_splits(manifest, folds=5, holdout=0.2, seed=0, by="kind")
    with pytest.raises(
        UserError, match=r"class M of kind has 3 of 36 people, and .* has none of them"
    ) as caught:
        TASK.check_cohort(settings_of(), manifest, splits)
    assert "\n" not in str(caught.value)


def test_classes_are_called_what_the_table_calls_them():
    labels = TASK.labels(settings_of(), manifest_of([1.0, 0.0, np.nan, 2.5, "n/a", " AD ", "ad"]))
    assert labels.tolist() == ["1", "0", None, "2.5", None, "AD", "ad"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"data__target": ""}, "data.target is not given"),
        ({"evaluation__probe": "neighbours"}, "cannot act with objective.name=cross_entropy"),
        (
            {**CONTRASTIVE, "evaluation__probe": "neighbours", "evaluation__reference": "openbhb"},
            "logistic probe",
        ),
    ],
)
def test_settings_that_cannot_act(chosen, message):
    with pytest.raises(UserError, match=message):
        TASK.check(settings_of(**chosen))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A cohort of 40 people of the classes `case` and `control`, told apart by a bright corner; two are not known."""
    folder = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    writer = CohortWriter(
        folder / "cohort", name="classes", channels=("T1w",), shape=(SIDE,) * 3, spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="test", synthetic=True,
    )  # fmt: skip
    with writer:
        for index in range(42):
            is_case = index % 2 == 0
            volume = 1 + generator.normal(0, 0.2, (SIDE,) * 3)
            volume[: SIDE // 2] += 2 * is_case
            kind = "" if index >= 40 else "case" if is_case else "control"
            writer.add(
                volume[None].astype(np.float32), subject=f"sub-{index:02d}", age=float("nan"), kind=kind
            )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_classes_from_sweep_to_page(workplace):
    done = run(
        "sweep", "cohort", "--task", "classification", "--set", "data.target=kind", "--trials", 2, "--folds", 2,
        "--slots", 1, "--scheduler", "none", "--set", "model.width=0.0625", "--set", "training.epochs=4",
        "--set", "training.batch_size=8", "--out", "run", cwd=workplace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = workplace / "run"
    cells = pd.read_csv(folder / "cells.csv")
    splits = pd.read_csv(folder / "splits.csv").set_index("subject")["role"]
    people = Cohort.open(workplace / "cohort").manifest.set_index("subject")["kind"]
    best = json.loads((folder / "run.json").read_text())["best"]
    for fold in range(2):
        table = pd.read_csv(folder / "trials" / f"{best['number']:04d}" / f"predictions-{fold}-0.csv")
        # Everybody whose class is known, and nobody else.
        assert set(table["subject"]) == {
            name for name, role in splits.items() if role == f"fold {fold}" and people[name]
        }
        again = roc_auc_score(table["subject"].map(people) == "case", table["p_case"])
        recorded = cells.query(f"number == {best['number']} and fold == {fold}")["macro_auc"].item()
        assert recorded == pytest.approx(again)
    assert best["value"] == pytest.approx(cells.query(f"number == {best['number']}")["macro_auc"].mean())
    holdout = pd.read_csv(folder / "holdout.csv")
    assert {"search winner", "published", "voxels", "class shares"} <= set(holdout["method"])
    assert holdout.query("method == 'class shares'")["macro_auc"].item() == 0.5
    # What tells the classes apart is half of the volume: components of voxels must find it.
    assert holdout.query("method == 'voxels'")["macro_auc"].item() == 1
    page = (folder / "report.html").read_text()
    assert "macro AUC" in page
    assert "years" not in page

    refused = run(
        "train",
        "cohort",
        "--task",
        "classification",
        "--set",
        "data.target=kinds",
        "--out",
        "other",
        cwd=workplace,
    )
    assert refused.returncode == 2
    assert "did you mean 'kind'" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "names", [("0", "0.5", "1"), ("TRUE", "FALSE"), ("01", "1"), ("nobody", "none"), ("1e3", "5")]
)
def test_names_of_classes_that_look_like_something_else_stay_names(tmp_path, names):
    """What is written and read again says of every person what it said before."""
    truth = [names[row % len(names)] for row in range(30)]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(names)), 30)
    table = pd.DataFrame({"subject": [f"{row:02d}" for row in range(30)], "site": "a", "truth": truth})
    table["predicted"] = [names[place] for place in probabilities.argmax(1)]
    for place, name in enumerate(names):
        table[f"p_{name}"] = probabilities[:, place]
    write_table(table, tmp_path / "predictions.csv")
    read = read_predictions(tmp_path / "predictions.csv")
    assert read["truth"].tolist() == truth
    assert read["predicted"].tolist() == table["predicted"].tolist()
    classes = np.array([names.index(name) for name in truth])
    scores = probabilities[:, 1] if len(names) == 2 else probabilities
    assert pooled_auc(read) == pytest.approx(
        roc_auc_score(classes, scores, multi_class="ovr", average="macro")
    )


def test_people_without_a_class_are_divided_by_themselves_however_that_is_written():
    table = pd.DataFrame({"subject": [f"{row:02d}" for row in range(40)], "site": ""})
    table["kind"] = ["A" if row % 2 else "B" for row in range(30)] + [""] * 10
    of_empty = make_splits(table, 5, seed=3, by="kind")
    of_none = make_splits(table.assign(kind=table["kind"].replace("", None)), 5, seed=3, by="kind")
    np.testing.assert_array_equal(of_empty.holdout, of_none.holdout)
    for one, other in zip(of_empty.folds, of_none.folds, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="the kind of no scan is known"):
        make_splits(table.assign(kind=" "), 5, by="kind")


def test_the_area_of_several_refits_is_their_mean_and_its_interval_draws_people():
    """The number of the table, mean over seeds, and its interval belong together; against scikit-learn."""
    draws, people = np.random.default_rng(2), 40
    truth = np.array(["a", "b"])[np.arange(people) % 2]
    signal = (truth == "a") * 0.6 + draws.normal(0, 1, people)
    tables = []
    for seed in range(3):
        score = 1 / (1 + np.exp(-signal - draws.normal(0, 1, people)))
        of_seed = {"subject": [f"{row:02d}" for row in range(people)], "truth": truth, "seed": seed}
        tables.append(pd.DataFrame({**of_seed, "p_a": score, "p_b": 1 - score, "predicted": "b"}))
    table = pd.concat(tables, ignore_index=True)
    areas = [roc_auc_score(each["truth"] == "a", each["p_a"]) for each in tables]
    assert pooled_auc(table) == pytest.approx(np.mean(areas))
    ensemble = pooled_auc(table.drop(columns="seed"))
    assert ensemble > np.mean(areas) + 0.02
    low, high = auc_interval(table, 0.95)
    assert low < np.mean(areas) < high
    drawn = []
    for _ in range(600):
        chosen = np.concatenate([draws.choice(np.flatnonzero(truth == name), 20) for name in ("a", "b")])
        drawn.append(
            np.mean([roc_auc_score(truth[chosen] == "a", each["p_a"].to_numpy()[chosen]) for each in tables])
        )
    assert high - low == pytest.approx(np.subtract(*np.quantile(drawn, [0.975, 0.025])), rel=0.2)
    # Seeds are no further people.
    further = table.assign(subject=table["subject"] + table["seed"].astype(str)).drop(columns="seed")
    assert np.subtract(*auc_interval(further, 0.95)) > 0.8 * (low - high)


def test_people_of_several_models_are_ranked_within_their_model():
    """Against a loop over all pairs; and guessing is worth 0.5, whatever the models guess."""
    draws = np.random.default_rng(1)
    table = pd.DataFrame({"subject": [f"{row:02d}" for row in range(60)], "outer": np.repeat([1, 2, 3], 20)})
    table["truth"] = draws.choice(["a", "b"], 60, p=[0.3, 0.7])
    score = draws.random(60) * 0.5 + (table["truth"] == "a") * 0.1 + table["outer"] * 0.1
    table["p_a"], table["p_b"], table["predicted"] = score, 1 - score, "b"
    right = total = 0.0
    for _, one in table[table["truth"] == "a"].iterrows():
        for _, other in table[(table["truth"] == "b") & (table["outer"] == one["outer"])].iterrows():
            right += (one["p_a"] > other["p_a"]) + 0.5 * (one["p_a"] == other["p_a"])
            total += 1
    assert pooled_auc(table) == pytest.approx(right / total)
    low, high = auc_interval(table, 0.95)
    assert low < right / total < high
    # A slow bootstrap within classes, each resample by scikit-learn and by pairs.
    drawn = []
    for _ in range(400):
        chosen = table.groupby("truth", group_keys=False).sample(
            frac=1, replace=True, random_state=draws.integers(2**31)
        )
        pairs = [
            (
                roc_auc_score(part["truth"] == "a", part["p_a"]),
                (part["truth"] == "a").sum() * (part["truth"] == "b").sum(),
            )
            for _, part in chosen.groupby("outer")
            if part["truth"].nunique() == 2
        ]
        drawn.append(sum(area * count for area, count in pairs) / sum(count for _, count in pairs))
    assert high - low == pytest.approx(np.subtract(*np.quantile(drawn, [0.975, 0.025])), rel=0.25)
    # Every model guesses the share of a class among the people that it was trained on: all but its own.
    table.loc[:2, "truth"] = "a"
    own = (table["truth"] == "a").groupby(table["outer"]).transform("sum")
    share = ((table["truth"] == "a").sum() - own) / 40
    guessed = table.assign(p_a=share, p_b=1 - share)
    assert pooled_auc(guessed) == 0.5
    assert all(np.isnan(auc_interval(guessed, 0.95)))
    assert pooled_auc(guessed.drop(columns="outer")) < 0.49
