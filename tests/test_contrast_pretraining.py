"""Contrast-guided pre-training: phases, patches, the probe of voxels, and a segmentation that begins with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from core.config import check_settings, merge, needed_maps, resolve
from core.errors import UserError
from core.evaluation.dense_probe import fit_dense_probe, sample_voxels
from core.evaluation.label_sets import LabelSets
from core.evaluation.splits import make_splits
from core.losses.dense import ConstrainedContrast, concatenate_patches, majority_vote
from core.models.segmenter import build_segmenter
from core.models.settings import DynUNetSettings, GroupNormUNetSettings, SwinUNETRSettings
from core.models.weights import load_part, weights_of
from core.tasks import find_task
from core.tasks.contrast_pretraining import TwoPhases
from core.volumes.derive.constraint import ConstraintSettings
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.commands.constraining import derive_constraint
from distributed.run.assignment import Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import published

TASK = find_task("contrast_pretraining")
SMALL = {
    "model.width": 0.25, "training.epochs": 4, "training.batch_size": 4, "features.dimension": 8,
    "data.constraint": "guide", "slices.count": 2,
    # Too few people for an inner split.
    "optimiser.plateau.watches": "training",
}  # fmt: skip


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("contrast_pretraining"), SMALL | given))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    place = tmp_path_factory.mktemp("contrasts") / "cohort"
    write_phantom_cohort(place, PhantomSettings(kind="contrasts", subjects=16, spacing=8.0))
    derive_constraint(place, "guide", ConstraintSettings(clusters=6))
    from core.volumes.cohort.reader import Cohort

    return Cohort.open(place)


def test_concatenated_patches_hold_every_voxel_once():
    for shape in ((2, 3, 6, 5), (1, 2, 4, 6, 5)):
        features = torch.rand(shape)
        joined = concatenate_patches(features, 2)
        sides = [side // 2 for side in shape[2:]]
        assert joined.shape == (shape[0], shape[1] * 2 ** len(sides), *sides)
        for place in np.ndindex(*sides):
            block = features[(slice(None), slice(None), *(slice(2 * at, 2 * at + 2) for at in place))]
            found = joined[(slice(None), slice(None), *place)]
            assert torch.equal(found.sort(dim=1).values, block.flatten(1).sort(dim=1).values)


def test_the_global_contrast_comes_first_for_its_share_of_the_training():
    settings = settings_of(warm_start__share=0.25)
    phases = TwoPhases(settings)
    assert phases.at(0.25)[0] == "simclr"
    assert phases.at(0.25)[2] == 1.0
    assert phases.at(0.5)[0] == "constrained_contrast"
    assert phases.at(0.5)[2] == pytest.approx(1 / 3)
    assert phases.at(1.0)[2] == 1.0
    assert TwoPhases(settings_of()).at(0.1)[0] == "constrained_contrast"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"data.constraint": ""}, "data.constraint is not given"),
        ({"objective.name": "simclr", "warm_start.share": 0.2}, "contrasts whole images itself"),
        ({"objective.name": "simclr", "slice_views.count": 1}, "slice_views.count=1"),
        ({"objective.name": "anatomical", "slices.count": 1}, "2 or more partitions"),
        ({"objective.name": "anatomical", "model.name": "dynunet", "features.levels": 5}, "is of slices"),
        ({"model.name": "dynunet"}, "features.levels acts with"),
        ({"warm_start.share": 0.2}, "is less than one"),
        ({"evaluation.target": "dseg", "evaluation.classes": ["a=1", "b=1"]}, "numbers of its own"),
    ],
)
def test_what_cannot_act_is_refused(chosen, words):
    with pytest.raises(UserError, match=words):
        check_settings(resolve(merge(published("contrast_pretraining"), SMALL | chosen)))


def test_a_sample_of_voxels_stands_for_all_of_them():
    draws = np.random.default_rng(0)
    volume = torch.from_numpy((draws.random((1, 2, 8, 6, 5)) > 0.3).astype(np.float32)) + 0.0
    inside = (volume[0] != 0).any(0)
    places = torch.from_numpy(draws.integers(-1, 3, (1, 8, 6, 5)))
    features = torch.arange(8 * 6 * 5.0).reshape(1, 1, 8, 6, 5)
    found = sample_voxels(features, volume, places, 60)
    classes, weights, voxels = found["classes"][0], found["weights"][0], found["voxels"][0, :, 0].long()
    for place in (0, 1, 2):
        whole = int(((places[0] == place) & inside).sum())
        assert weights[classes == place].sum().item() == pytest.approx(whole, rel=1e-5)
    taken = classes >= 0
    assert torch.equal(places[0].flatten()[voxels[taken]].float(), classes[taken])
    assert inside.flatten()[voxels[taken]].all()
    assert len(set(voxels[taken].tolist())) == int(taken.sum())
    many = sample_voxels(features, volume, places, 2000)
    assert (many["weights"][0][many["classes"][0] >= 0] == 1).all()


def test_counts_of_the_probe_are_weighted_and_its_model_is_logistic_regression():
    draws = np.random.default_rng(0)
    classes = draws.integers(0, 3, (4, 50)).astype(float)
    voxels = draws.normal(size=(4, 50, 3)) + 2 * classes[..., None] * np.array([1, 0, -1])
    classes[0, :5] = -1
    probe = fit_dense_probe(voxels[:3], classes[:3])
    known = classes[:3] >= 0
    mean, sd = voxels[:3][known].mean(0), voxels[:3][known].std(0)
    other = LogisticRegression(max_iter=300).fit((voxels[:3][known] - mean) / sd, classes[:3][known])
    said = other.predict((voxels[3] - mean) / sd)
    weights = draws.random((1, 50))
    sets = LabelSets({"one": (1,), "two": (2,)})
    counts = probe.counts(voxels[3:], classes[3:], weights, sets)[0]
    for place in (1, 2):
        both = weights[0][(said == place) & (classes[3] == place)].sum()
        assert counts[place - 1] == pytest.approx(
            [both, weights[0][said == place].sum(), weights[0][classes[3] == place].sum()]
        )
    alike = fit_dense_probe(voxels[:1], np.zeros((1, 50)))
    assert alike.counts(voxels[3:], classes[3:], weights, sets)[0][:, 1].tolist() == [0, 0]
    # A region holds what is of the smaller one in it.
    nested = LabelSets({"whole": (1, 2), "core": (2,)})
    of_regions = probe.counts(voxels[3:], classes[3:], weights, nested)[0]
    inside, true = said > 0, classes[3] > 0
    assert of_regions[0] == pytest.approx([weights[0][mask].sum() for mask in (inside & true, inside, true)])
    assert of_regions[1] == pytest.approx(counts[1])


@pytest.mark.parametrize(
    "network", [GroupNormUNetSettings(width=0.25), DynUNetSettings(width=0.125), SwinUNETRSettings(width=0.25)],
    ids=lambda settings: settings.name,
)  # fmt: skip
def test_a_segmenter_takes_encoder_and_decoder_of_the_pretraining(network):
    levels = {} if network.name == "groupnorm_unet" else {"features.levels": 5}
    settings = settings_of().model_copy(update={"model": network})
    settings = settings.model_copy(update={"features": settings.features.model_copy(update={"levels": 5})})
    torch.manual_seed(1)
    trained = TASK.build(settings, 2, {})
    torch.manual_seed(2)
    model = build_segmenter(network, 2, 4)
    report = load_part(model, weights_of(trained), "encoder_and_decoder")
    assert report.of_model > 0.99, (report, levels)
    prefix = "whole.network." if network.name != "groupnorm_unet" else ""
    theirs = {name.removeprefix(prefix): value for name, value in trained.state_dict().items()}
    for part in ("encoder", "decoder"):
        for module in model.parts[part]:
            for name, value in model.get_submodule(module).state_dict().items():
                assert torch.equal(value, theirs[f"{module.removeprefix('network.')}.{name}"])


def test_it_trains_on_all_scans_and_is_judged_on_the_labelled_ones(cohort):
    settings = settings_of(evaluation__target="dseg", evaluation__classes="brats2021", evaluation__voxels=256)
    assert needed_maps(settings) == ("guide", "dseg")
    splits = make_splits(cohort.manifest, folds=2, holdout=0.2, seed=1)
    subjects = Subjects.of(cohort, splits, InMemory.of(cohort, needed_maps(settings)))
    training = CellTraining(settings, subjects, Cell(0, 0), Place())
    labelled = set(np.flatnonzero(cohort.has_map("dseg")).tolist())
    assert set(training.labelled_rows.tolist()) <= labelled
    assert set(training.evaluation_rows.tolist()) <= labelled & set(splits.folds[0].tolist())
    assert set(training.training_rows.tolist()) > set(training.labelled_rows.tolist())
    losses = [training.run_epoch()["loss"] for _ in range(4)]
    assert np.isfinite(losses).all()
    outcome = training.judge()
    assert 0 <= outcome.metrics["dice"] <= 1
    assert {"dice_tc", "dice_wt", "dice_et", "validation_loss"} <= set(outcome.metrics)
    assert len(outcome.predictions) == len(training.evaluation_rows)
    assert outcome.pictures["colours"].shape[-1] == 3
    again = CellTraining(settings, subjects, Cell(0, 0), Place())
    assert [again.run_epoch()["loss"] for _ in range(4)] == losses


def test_it_learns_features_that_tell_clusters(cohort):
    """More training makes a smaller loss on people who are not trained on."""
    settings = settings_of(training__epochs=12, optimiser__learning_rate=3e-3, objective__neighbours__start=1.0,
                           objective__neighbours__end=1.0)  # fmt: skip
    splits = make_splits(cohort.manifest, folds=2, holdout=0.2, seed=1)
    subjects = Subjects.of(cohort, splits, InMemory.of(cohort, needed_maps(settings)))
    training = CellTraining(settings, subjects, Cell(0, 0), Place())
    before = training.judge(sites=False).metrics["validation_loss"]
    for _ in range(12):
        training.run_epoch()
    assert training.judge(sites=False).metrics["validation_loss"] < 0.8 * before


def test_a_vote_is_over_the_voxels_of_its_patch_where_sides_are_no_multiples():
    """A patch of features of 8 voxels a side is voted on by these voxels, though 46 / (46 // 8) is 9."""
    clusters = torch.zeros(1, 46, 16, 16, dtype=torch.long)
    clusters[:, 32:40] = 1
    grid = (5, 2, 2)
    found = majority_vote(clusters, grid, 2, 8)
    assert found[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1]
    loss = ConstrainedContrast(patch=8, neighbours={"start": 1.0, "end": 1.0, "shape": "linear"}).build()
    features = torch.rand(1, 4, 46, 16, 16)
    anchors = torch.tensor([[16, 17]])  # two patches of cluster 1
    value = loss(features, clusters, clusters >= 0, 0.5, anchors)
    assert torch.isfinite(value)
    assert loss.diagnostics["anchors_used"] == 2
