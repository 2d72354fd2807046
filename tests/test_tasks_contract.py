"""What every task promises to the engine: runs for everything in TASKS, and for the task of a user's file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.task_description import TaskDescription
from core.tasks import TASKS, find_task
from core.tasks.pretraining import PROBES
from core.tasks.task import Beside, Judging, Observed, is_known, truth_of
from distributed.sweeps.request import space_of
from search_spaces import SPACES, published

OWN = f"{Path(__file__).parent / 'own_task.py'}:BrighterSide"
SMALL = {"model.width": 0.0625, "training.epochs": 2, "training.batch_size": 8}
CONTRAST = {"model.width": 0.25, "training.epochs": 2, "training.batch_size": 8, "data.constraint": "guide",
            "features.dimension": 8}  # fmt: skip
GIVEN: dict[str, list[dict[str, object]]] = {
    "brain_age": [SMALL, {**SMALL, "objective.name": "l1", "objective.kernel": None}],
    "classification": [
        {**SMALL, "data.target": "kind"},
        {**SMALL, "data.target": "kind", "objective.name": "supcon", "views.count": 2},
    ],
    "masked_pretraining": [
        {**SMALL, "model.name": "resnet18", **probes}
        for probes in ({}, {PROBES: ["age"]}, {PROBES: ["kind", "age"]})
    ],
    "contrast_pretraining": [
        {**CONTRAST, "evaluation.target": "dseg", "evaluation.classes": ["one=1"]},
        {
            **CONTRAST,
            PROBES: ["age"],
            "objective.joined": "concatenated",
            "objective.patch": 2,
            "features.levels": 5,
        },
        {
            **CONTRAST,
            "model.name": "dynunet",
            "features.levels": 5,
            "evaluation.target": "dseg",
            "evaluation.classes": ["one=1"],
        },
    ],
    "segmentation": [
        {"model.width": 0.0625, "training.epochs": 2, "data.classes": ["one=1"]},
        {
            "model.width": 0.0625,
            "training.epochs": 2,
            "data.classes": ["one=1+2", "two=2"],
            "objective.name": "dice",
        },
    ],
    "symmetry_pretraining": [
        {
            **SMALL,
            "model.name": "resnet18",
            "decoder.kind": "transposed",
            "data.diagnosis": "kind",
            "data.healthy": ["control"],
            **more,
        }
        for more in (
            {},
            {PROBES: ["age"], "objective.masked.name": "masked", "objective.contrast.name": None},
        )
    ],
    "tissue_age": [{}, {"regressor.name": "gradient_boosting"}],
    OWN: [{"training.epochs": 2}],
}
"""The settings of every task here, in every way in which it can be trained."""
ALL = [
    pytest.param(name, index, id=f"{name.rpartition(':')[2]}-{index}")
    for name, ways in GIVEN.items()
    for index in range(len(ways))
]
NETWORKS = [each for each in ALL if each.values[0] != "tissue_age"]
"""Those that train one."""
SIDE, SCANS = 8, 40


def made(name, index):
    """(task, settings, manifest, volumes (N, 1, X, Y, Z)); the truth about the last four scans is unknown."""
    task, chosen = find_task(name), GIVEN[name][index]
    if name in TASKS:
        base = published(space_of(name))
        if chosen.get("objective.name") == "l1":
            base, chosen = {**base, "objective": {"name": "l1"}}, SMALL
        settings = resolve(merge(base, chosen))
    else:
        settings = resolve({"task": name} | {"training": {"epochs": 2}})
    generator = np.random.default_rng(0)
    manifest = pd.DataFrame(
        {
            "subject": [f"sub-{row:02d}" for row in range(SCANS)],
            "site": [("a", "b")[row % 2] for row in range(SCANS)],
            "age": generator.uniform(20, 80, SCANS),
            "kind": pd.array([("case", "control", "other")[row % 3] for row in range(SCANS)], dtype=object),
            "side": (np.arange(SCANS) // 2 % 2).astype(float),
        }
    )
    manifest.loc[SCANS - 4 :, ["age", "side"]] = np.nan
    manifest.loc[SCANS - 4 :, "kind"] = ""
    for column, mean in (("csf_ml", 250), ("gm_ml", 650), ("wm_ml", 550)):
        manifest[column] = mean + generator.normal(0, 40, SCANS)
    manifest["map_dseg_checksum"] = ["x"] * (SCANS - 4) + [""] * 4
    manifest["map_guide_checksum"] = "x"
    volumes = torch.from_numpy(generator.normal(size=(SCANS, 1, SIDE, SIDE, SIDE)).astype(np.float32))
    return task, settings, manifest, volumes


def truth_at(rows, task, settings, manifest):
    more = task.more_labels(settings, manifest)
    return truth_of(manifest, task.labels(settings, manifest), rows, more)


def is_without_truth(name, index):
    """Whether this is a pre-training of which nothing is read."""
    given = GIVEN[name][index]
    return name.endswith("_pretraining") and PROBES not in given and "evaluation.target" not in given


def reads_maps(name, index):
    """Whether a pre-training is judged by a map, and by nothing else."""
    given = GIVEN[name][index]
    return "evaluation.target" in given and PROBES not in given


def maps_of(task, settings, volumes):
    """The maps that the task needs: where a volume is bright."""
    return {each: (volumes[:, 0] > 0.5).short() for each in task.maps_to_judge(settings)}


def seen_of(task, settings, model, volumes):
    beside = Beside(
        maps_of(task, settings, volumes), (8.0, 8.0, 8.0), torch.full((len(volumes),), 0.512), final=True
    )
    return task.observe_with_maps(settings, model, volumes, beside)


def judged(name, index, labels_of_evaluation=None, order=None):
    """(task, settings, facts, outputs of the evaluation scans, outcome), of a model that was never trained."""
    task, settings, manifest, volumes = made(name, index)
    training, evaluation = np.arange(24), np.arange(24, 36)
    if order is not None:
        evaluation = evaluation[order]
    facts = task.learn(settings, truth_at(training, task, settings, manifest))
    torch.manual_seed(0)
    features = task.features(settings, manifest)
    model = None if features is not None else task.build(settings, 1, facts).eval()
    seen = []
    for rows in (training, evaluation):
        with torch.no_grad():
            outputs = (
                {"embedding": features[rows]}
                if features is not None
                else {
                    key: value.numpy() for key, value in seen_of(task, settings, model, volumes[rows]).items()
                }
            )
        truth = truth_at(rows, task, settings, manifest)
        seen.append(
            Observed(
                truth.labels, truth.sites, truth.subjects, outputs["embedding"], outputs, more=truth.more
            )
        )
    if labels_of_evaluation is not None:
        seen[1] = replace(seen[1], labels=labels_of_evaluation(seen[1].labels))
    return task, settings, facts, seen, task.judge(settings, *seen, Judging())


def test_every_task_is_here_and_has_a_space():
    assert set(TASKS) == set(GIVEN) - {OWN}
    assert {space_of(name) for name in TASKS} <= set(SPACES)


@pytest.mark.parametrize("name", GIVEN)
def test_the_description_is_whole_and_survives_run_json(name):
    check_description(find_task(name).about)


@pytest.mark.parametrize(("name", "index"), ALL)
def test_what_settings_make_of_the_description_is_whole_too(name, index):
    task, settings, _, _ = made(name, index)
    check_description(task.describe(settings))


def check_description(about):
    assert TaskDescription.model_validate(json.loads(about.model_dump_json())) == about
    assert set(about.shown) <= set(about.metrics)
    assert about.objectives
    for objective in about.objectives:
        assert about.objective(objective).better in ("low", "high")


@pytest.mark.parametrize(("name", "index"), ALL)
def test_labels_say_what_is_unknown_and_folds_are_alike_in_a_column(name, index):
    task, settings, manifest, _ = made(name, index)
    task.check(settings)
    labels = task.labels(settings, manifest)
    unknown = is_without_truth(name, index)
    assert is_known(labels).tolist() == [True] * (SCANS - 4) + [unknown] * 4
    splits = make_splits(manifest, 3, 0.2, 0, task.balanced_by(settings))
    task.check_cohort(settings, manifest, splits)
    facts = task.learn(settings, truth_at(np.arange(24), task, settings, manifest))
    assert json.loads(json.dumps(facts)) == facts
    everyone = truth_at(np.arange(SCANS), task, settings, manifest)
    assert np.isfinite(task.targets(everyone, facts)[: SCANS - 4].astype(float)).all()


@pytest.mark.parametrize(("name", "index"), NETWORKS)
def test_a_step_moves_the_model_and_the_seed_alone_makes_it(name, index):
    task, settings, manifest, volumes = made(name, index)
    everyone = truth_at(np.arange(SCANS), task, settings, manifest)
    facts = task.learn(settings, truth_at(np.arange(24), task, settings, manifest))
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model, rows = task.build(settings, 1, facts), np.arange(8)
        maps = maps_of(task, settings, volumes[rows])
        views = task.views_with_maps(settings, volumes[rows], maps, rows, 1, 0)
        for seen in [views] if isinstance(views, torch.Tensor) else views.values():
            assert seen.shape[0] == 8
        targets = torch.as_tensor(task.targets(everyone, facts)[rows])
        step = task.step(model, task.objective(settings, facts), views, targets, 0.5)
        step.loss.backward()
        assert step.loss.ndim == 0
        losses.append(step.loss.item())
    assert np.isfinite(losses[0])
    assert losses[0] == losses[1]
    assert any(
        parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters()
    )


@pytest.mark.parametrize(("name", "index"), NETWORKS)
def test_a_scan_is_seen_alike_in_any_company(name, index):
    task, settings, manifest, volumes = made(name, index)
    facts = task.learn(settings, truth_at(np.arange(24), task, settings, manifest))
    torch.manual_seed(0)
    model = task.build(settings, 1, facts).eval()
    with torch.no_grad():
        together = seen_of(task, settings, model, volumes[:6])
        alone = [seen_of(task, settings, model, volumes[row : row + 1]) for row in range(6)]
    assert together["embedding"].shape[0] == 6
    assert together["embedding"].ndim == 2
    for key, values in together.items():
        torch.testing.assert_close(values, torch.cat([one[key] for one in alone]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "index"), ALL)
def test_what_is_judged_is_what_is_predicted(name, index):
    task, settings, facts, (_, evaluation), outcome = judged(name, index)
    assert {"predicted", "error"} <= set(outcome.predictions)
    assert len(outcome.predictions) == len(evaluation.labels)
    assert (outcome.predictions["error"] >= 0).all()
    about = task.describe(settings)
    for objective in about.objectives:
        if not about.metrics[objective].needs_sites:
            # A class in one map only is infinitely far.
            assert not np.isnan(outcome.metrics[objective]), objective
    if name == "symmetry_pretraining" and is_without_truth(name, index):
        assert task.predictions(settings, evaluation.outputs, None, facts).columns.tolist() == ["asymmetry"]
        return
    if is_without_truth(name, index) or name == "tissue_age" or reads_maps(name, index):
        with pytest.raises(UserError, match="predicts nothing"):
            task.predictions(settings, evaluation.outputs, outcome.fitted, facts)
        return
    again = task.predictions(settings, evaluation.outputs, outcome.fitted, facts)
    task.check_fitted(outcome.fitted)
    if not pd.api.types.is_numeric_dtype(again["predicted"]):
        assert again["predicted"].tolist() == outcome.predictions["predicted"].tolist()
    else:
        np.testing.assert_allclose(again["predicted"], outcome.predictions["predicted"], rtol=1e-6)
    for damaged in ("{}", "[1", '"text"'):
        if outcome.fitted is not None:
            with pytest.raises((ValueError, LookupError, TypeError)):
                task.check_fitted(damaged)


@pytest.mark.parametrize(("name", "index"), ALL)
def test_the_truth_about_the_evaluation_moves_no_prediction(name, index):
    outcome = judged(name, index)[-1]
    other = judged(name, index, labels_of_evaluation=lambda labels: labels[::-1])[-1]
    assert outcome.fitted == other.fitted
    assert outcome.predictions["predicted"].tolist() == other.predictions["predicted"].tolist()
    is_alike = outcome.predictions["error"].tolist() == other.predictions["error"].tolist()
    # The truth of a segmentation is in its maps.
    assert is_alike == (is_without_truth(name, index) or reads_maps(name, index) or name == "segmentation")


@pytest.mark.parametrize(("name", "index"), ALL)
def test_the_order_of_scans_moves_nothing(name, index):
    order = np.random.default_rng(1).permutation(12)
    outcome, other = judged(name, index)[-1], judged(name, index, order=order)[-1]
    expected = outcome.predictions.iloc[order].reset_index(drop=True)
    for column in expected:
        if not pd.api.types.is_numeric_dtype(expected[column]):
            assert other.predictions[column].tolist() == expected[column].tolist()
        else:
            np.testing.assert_allclose(other.predictions[column], expected[column], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "index"), ALL)
def test_the_floor_uses_the_truth_of_the_training_alone(name, index):
    task, settings, _, (training, evaluation), _ = judged(name, index)
    floor = task.floor(settings, training, evaluation)
    about = task.describe(settings)
    assert (floor is None) == (about.floor is None)
    if floor is not None:
        assert floor.predictions["predicted"].nunique() == 1
        flipped = task.floor(settings, training, replace(evaluation, labels=evaluation.labels[::-1]))
        assert flipped.predictions["predicted"].tolist() == floor.predictions["predicted"].tolist()
        assert np.isfinite(floor.metrics[about.floor.of])
