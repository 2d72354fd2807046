"""Pre-training alone: who is trained on, what probes read, and masked autoencoding."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from of_age import assign
from process_helpers import run
from sklearn.metrics import roc_auc_score
from small_cohort import SMALL, write_small_cohort

from core.config import check_settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.files.tables import PROBABILITY
from core.models.segmenter import build_segmenter
from core.models.weights import load_part, weights_of
from core.report.answer.record import read_run
from core.tasks import find_task
from core.tasks.masked_pretraining import ReconstructionError, ReconstructionSettings
from core.tasks.pretraining import PROBES
from core.tasks.task import Judging
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.views.masks import MaskSettings, hide_blocks
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from distributed.training.trial import Runner
from search_spaces import published

MASKED = {
    "model.name": "resnet18", "model.width": 0.0625, "training.epochs": 2, "training.batch_size": 8, "masks.block": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("masked_pretraining"), MASKED | given))


def subjects_of(cohort, **columns):
    manifest = cohort.manifest.assign(**columns)
    splits = make_splits(manifest, folds=2, holdout=0.25)
    return Subjects(InMemory.of(cohort), manifest, splits, ("stiffness",))


@pytest.mark.parametrize(("ratio", "block"), [(0.75, 2), (0.4, 3), (0.99, 4), (0.01, 4), (0.5, 8)])
def test_whole_blocks_are_hidden_in_the_share_that_was_asked_for(ratio, block):
    volumes = torch.rand(5, 2, 9, 8, 7) + 1
    hidden, where = hide_blocks(volumes, range(5), 1, 0, MaskSettings(ratio=ratio, block=block))
    assert where.shape == (5, 1, 9, 8, 7)
    assert torch.equal(hidden == 0, where.expand_as(hidden))
    assert torch.equal(hidden[~where.expand_as(hidden)], volumes[~where.expand_as(hidden)])
    blocks = -(-9 // block) * -(-8 // block) * -(-7 // block)
    for mask in where[:, 0].numpy():
        corners = mask[::block, ::block, ::block]
        expected = corners.repeat(block, 0).repeat(block, 1).repeat(block, 2)[:9, :8, :7]
        assert (mask == expected).all()
        assert corners.sum() == min(max(1, round(ratio * blocks)), max(1, blocks - 1))


def test_a_block_as_large_as_the_volume_is_refused():
    with pytest.raises(UserError, match=r"masks\.block=9 is as large as a volume of 9 x 8 x 7"):
        hide_blocks(torch.ones(1, 1, 9, 8, 7), [0], 1, 0, MaskSettings(block=9))


def test_masks_are_a_function_of_seed_subject_and_epoch():
    volumes, settings = torch.ones(3, 1, 8, 8, 8), MaskSettings(block=2)

    def masks(rows, epoch=1, seed=0):
        return hide_blocks(volumes[: len(rows)], rows, epoch, seed, settings)[1]

    together = masks([4, 7, 9])
    assert torch.equal(masks([9, 4])[0], together[2])
    for other in (masks([7])[0], masks([4], epoch=2)[0], masks([4], seed=1)[0]):
        assert not torch.equal(other, together[0])


@pytest.mark.parametrize("voxels", ["hidden", "brain"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_loss_is_the_mean_over_the_voxels_that_count(voxels, norm):
    draws = np.random.default_rng(0)
    original, painted = draws.normal(size=(2, 3, 2, 4, 4, 4))
    original[draws.random(original.shape) < 0.3] = 0
    hidden = draws.random((3, 1, 4, 4, 4)) < 0.5
    found = ReconstructionError(ReconstructionSettings(voxels=voxels, norm=norm))(
        *(torch.from_numpy(each) for each in (painted, original, hidden))
    )
    for scan in range(3):
        differences = [
            abs(painted[scan][place] - original[scan][place]) ** (1 if norm == "l1" else 2)
            for place in np.ndindex(2, 4, 4, 4)
            if original[scan][place] != 0 and (voxels == "brain" or hidden[scan, 0][place[1:]])
        ]
        assert found[scan].item() == pytest.approx(np.mean(differences), rel=1e-5)


def test_nothing_is_asked_of_background():
    loss = ReconstructionError(ReconstructionSettings())
    nothing = torch.zeros(1, 1, 4, 4, 4)
    assert loss(nothing + 5, nothing, nothing == 0).item() == 0


def test_it_trains_on_people_without_a_value_and_never_on_those_who_are_judged(cohort):
    ages = cohort.manifest["age"].to_numpy().copy()
    ages[::4] = np.nan
    subjects = subjects_of(cohort, age=ages)
    splits, unknown = subjects.splits, set(np.flatnonzero(np.isnan(ages)).tolist())
    training = CellTraining(settings_of(**{PROBES: ["age"]}), subjects, Cell(0, 0), Place())
    judged = set(splits.folds[0].tolist()) - unknown
    assert set(training.evaluation_rows.tolist()) == judged
    assert set(training.training_rows.tolist()) == set(splits.development.tolist()) - judged
    assert set(training.labelled_rows.tolist()) == set(splits.training(0).tolist()) - unknown
    few = CellTraining(settings_of(**{PROBES: ["age"], "data.labelled": 4}), subjects, Cell(0, 0), Place())
    assert len(few.labelled_rows) == 4
    assert set(few.training_rows.tolist()) == set(training.training_rows.tolist())
    refit = CellTraining(settings_of(**{PROBES: ["age"]}), subjects, Cell(HOLDOUT, 0), Place())
    assert not set(refit.training_rows.tolist()) & set(splits.holdout.tolist())


def test_the_inner_people_of_the_best_epoch_are_not_trained_on(cohort):
    kept = settings_of(**{PROBES: ["age"], "training.keep": "best", "training.inner": 0.4})
    training = CellTraining(kept, subjects_of(cohort), Cell(0, 0), Place())
    assert training.inner_rows.size
    assert not set(training.inner_rows.tolist()) & set(training.training_rows.tolist())


def test_simclr_alone_takes_everyone_too(cohort):
    ages = cohort.manifest["age"].to_numpy().copy()
    ages[1::4] = np.nan
    settings = resolve(
        merge(published("brain_age"), SMALL | {"objective.name": "simclr", "views.noise": 0.1})
    )
    subjects = subjects_of(cohort, age=ages)
    training = CellTraining(settings, subjects, Cell(0, 0), Place())
    assert set(np.flatnonzero(np.isnan(ages))) & set(training.training_rows)
    training.run_epoch()
    assert np.isfinite(training.judge().metrics["mae"])


def test_every_probe_is_judged_on_the_people_who_have_its_value(cohort):
    """The area under the ROC curve against scikit-learn, and ages that some people lack."""
    kind = np.array(["x", "y"], dtype=object)[np.arange(len(cohort)) % 2]
    ages = cohort.manifest["age"].to_numpy().copy()
    ages[5::6] = np.nan
    settings = settings_of(**{PROBES: ["kind", "age"]})
    subjects, task = subjects_of(cohort, kind=kind, age=ages), find_task("masked_pretraining")
    training = CellTraining(settings, subjects, Cell(0, 0), Place())
    training.run_epoch()
    seen = [training._observe(rows) for rows in (training.labelled_rows, training.evaluation_rows)]
    outcome = task.judge(settings, *seen, Judging(sites=False))
    truth = seen[1].labels == "y"
    assert outcome.metrics["kind_macro_auc"] == pytest.approx(
        roc_auc_score(truth, outcome.predictions[f"{PROBABILITY}y"])
    )
    # Ages of people who lack one move nothing; those of others do.
    known = ~np.isnan(ages)
    assert np.isfinite(outcome.metrics["age_mae"])
    shifted = subjects_of(cohort, kind=kind, age=np.where(known, ages + 10, np.nan))
    again = CellTraining(settings, shifted, Cell(0, 0), Place())
    again.model.load_state_dict(training.model.state_dict())
    moved = task.judge(
        settings, *(again._observe(rows) for rows in (training.labelled_rows, training.evaluation_rows)),
        Judging(sites=False),
    )  # fmt: skip
    assert moved.metrics["kind_macro_auc"] == outcome.metrics["kind_macro_auc"]
    assert moved.metrics["age_mae"] == pytest.approx(outcome.metrics["age_mae"], rel=1e-3)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({PROBES: ["age", "age"]}, r"evaluation\.probes names age twice"),
        ({PROBES: ["site"]}, "features should not tell the site"),
        ({"model.name": "resnext50"}, "not 32 times coarser"),
        ({"views.count": 2}, r"views\.count=2 cannot act"),
    ],
)
def test_what_cannot_act_is_refused(chosen, says):
    with pytest.raises(UserError, match=says):
        check_settings(resolve(merge(published("masked_pretraining"), chosen)))


@pytest.mark.parametrize("name", ["groupnorm_unet", "res_unet", "dynunet"])
def test_a_u_net_paints_by_its_own_decoder_and_a_segmentation_begins_with_it(name):
    task, chosen = find_task("masked_pretraining"), {"model": {"name": name, "width": 0.25}, "masks.block": 2}
    settings = resolve(merge(published("masked_pretraining"), chosen))
    check_settings(settings)
    torch.manual_seed(0)
    model, volumes = task.build(settings, 2, {}).train(), torch.rand(2, 2, 20, 24, 16) + 1
    seen = task.views(settings, volumes, [0, 1], 0, 0)
    objective, optimiser = task.objective(settings, {}), torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = task.step(model, objective, seen, torch.zeros(2), 0.5).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model(volumes).shape == volumes.shape
    embedding = model.eval().embed(volumes)
    assert embedding.shape[0] == 2
    assert embedding.ndim == 2
    segmenter = build_segmenter(settings.model, 2, 4)
    load_part(segmenter, weights_of(model), "encoder_and_decoder")
    own, theirs = dict(segmenter.named_parameters()), dict(model.named_parameters())
    begun = [each for part in ("encoder", "decoder") for each in segmenter.parts[part]]
    for place in (each for each in own if each.startswith(tuple(f"{module}." for module in begun))):
        [same] = [each for each in theirs if each.endswith("." + place.removeprefix("network."))]
        assert torch.equal(own[place], theirs[same]), place
    with pytest.raises(UserError, match=f"interpolated cannot act: {name} paints by its own decoder"):
        check_settings(
            resolve(merge(published("masked_pretraining"), chosen | {"decoder.kind": "interpolated"}))
        )


def test_a_first_stage_is_checked_and_has_no_probes():
    base = published("brain_age") | {"pretraining": published("masked_pretraining")}
    check_settings(resolve(base))
    with pytest.raises(UserError, match="in 'pretraining': masked_pretraining paints"):
        check_settings(resolve(merge(base, {"model.name": "resnext50"})))
    with pytest.raises(UserError, match="a first stage is not judged"):
        resolve(merge(base, {f"pretraining.{PROBES}": ["age"]}))


def test_it_can_be_the_first_stage_of_a_trial(cohort, tmp_path):
    changes = {
        f"pretraining.{name}": value for name, value in MASKED.items() if not name.startswith("model.")
    }
    base = published("brain_age") | {"pretraining": published("masked_pretraining")}
    settings = resolve(merge(base, SMALL | changes)).model_dump(mode="json")
    runner = Runner(subjects_of(cohort))
    assignment = assign(tmp_path / "trials" / "0000", settings, [{"fold": 0, "seed": 0}])
    for _ in range(2):
        runner(assignment)
    earlier = {name: value.clone() for name, value in runner.trial.earlier.items()}
    assert any(name.startswith("decoder.") for name in earlier)
    training = runner.trial._current_cell()
    for name, value in training.model.encoder.state_dict().items():
        assert torch.equal(value, earlier[f"encoder.{name}"]), name
    answer = runner(assignment)
    while not answer["done"]:
        answer = runner(assignment)
    assert np.isfinite(answer["value"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_over_pre_trainings_shows_what_each_probe_gains_and_starts_another(tmp_path):
    for seed, name in enumerate(("cohort", "other")):
        write_phantom_cohort(tmp_path / name, PhantomSettings(subjects=24, spacing=8, seed=seed))
    changed = [word for name, value in MASKED.items() for word in ("--set", f"{name}={value}")]
    asked = ("--task", "masked_pretraining", "--trials", 2, "--folds", 2, "--slots", 1, *changed)
    done = run(
        "sweep", "cohort", *asked, "--set", f"{PROBES}=[age,sex]", "--objectives", "age_mae,sex_macro_auc",
        "--scheduler", "none", "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert trials["state"].tolist() == ["COMPLETE"] * 2
    record = read_run(tmp_path / "run")
    assert list(record.objectives) == ["age_mae", "sex_macro_auc"]
    assert all(len(trial.values) == 2 for trial in record.study.trials)
    held_out = pd.read_csv(tmp_path / "run" / "holdout.csv")
    assert {"search winner", "published", "voxels", "training median"} <= set(held_out["method"])
    alone = run("sweep", "cohort", *asked, "--out", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert "reconstruction loss" in (tmp_path / "alone" / "report.html").read_text()
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    refused = run("train", "cohort", "--folds", 2, "--set", "begin.weights=alone", *small, cwd=tmp_path)
    assert refused.returncode == 2
    begun = run(
        "train", "other", "--folds", 2, "--set", "begin.weights=alone", *small, "--out", "fine", cwd=tmp_path
    )
    assert begun.returncode == 0, begun.stderr
