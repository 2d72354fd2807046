"""Symmetry-aware pre-training: what is computed, against formulas of its own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from small_cohort import write_small_cohort

from core.config import check_settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.tasks import find_task
from core.tasks.symmetry_pretraining import ASYMMETRY, JUDGED, SymmetryModel, healthy_of
from core.tasks.task import Judging, Observed
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.sweeps.resolve import with_first_stage
from distributed.training.first_stage import FirstStage
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import published

TASK = find_task("symmetry_pretraining")
SMALL = {"model.width": 0.25, "training.epochs": 2, "training.batch_size": 4, "decoder.kind": "transposed",
         "model.window": 3}  # fmt: skip
OFF = {f"objective.{name}.name": None for name in ("rotation", "contrast", "inpainting", "symmetry")}
ROWS = np.arange(4)


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("symmetry_pretraining"), SMALL | given))


def only(**parts):
    """Settings in which these losses are on and no other."""
    names = {"rotation": "rotation", "contrast": "simclr", "inpainting": "inpainting", "symmetry": "symmetry",
             "masked": "masked"}  # fmt: skip
    chosen = OFF | {f"objective.{name}.name": names[name] for name in parts}
    chosen |= {f"objective.{name}.{key}": value for name, own in parts.items() for key, value in own.items()}
    return resolve(merge(published("symmetry_pretraining"), SMALL | chosen))


@pytest.fixture(scope="module")
def heads():
    """(4, 1, X, Y, Z): random voxels in a ball off the middle of the grid."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(32.0),) * 3, indexing="ij"))
    inside = ((grid - torch.tensor([14.0, 16, 16])[:, None, None, None]) ** 2).sum(0) < 150
    draws = torch.randn(4, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    return draws * inside


def made(settings, seed=0):
    torch.manual_seed(seed)
    return TASK.build(settings, 1, {}), TASK.objective(settings, {})


def loss_of(settings, heads, healthy=(1, 1, 0, 1), progress=0.5):
    model, objective = made(settings)
    model.eval()
    seen = TASK.views(settings, heads, ROWS, 1, 0)
    return (
        TASK.step(model, objective, seen, torch.tensor(healthy, dtype=torch.float32), progress),
        model,
        seen,
    )


def test_the_published_model_has_the_published_number_of_parameters():
    """spec.md C.2: 28,942,695 with attention to the mirror image, 19,097,191 without."""
    for name, expected in (("swin_symmetry", 28_942_695), ("swin", 19_097_191)):
        chosen = {"model.name": name} | ({"model.layers": None} if name == "swin" else {})
        settings = published("symmetry_pretraining")
        settings["model"] = {"name": name}
        model = TASK.build(resolve(settings), 1, {})
        # Without the symmetry loss, the plain one has no head for it.
        if name == "swin":
            settings["objective"]["symmetry"] = None
            model = TASK.build(resolve(settings), 1, {})
        assert sum(each.numel() for each in model.parameters()) == expected, chosen


def test_the_sum_has_the_weights_of_the_parts(heads):
    settings = settings_of(objective__rotation__weight=0.5, objective__contrast__weight=2.0,
                           objective__inpainting__weight=3.0, objective__symmetry__weight=0.25)  # fmt: skip
    step, _, _ = loss_of(settings, heads)
    weights = {"rotation": 0.5, "contrast": 2.0, "inpainting": 3.0, "symmetry": 0.25}
    expected = sum(weight * step.noted[name].item() for name, weight in weights.items())
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isnan(step.noted["masked"])


def test_every_part_is_its_formula_on_what_the_model_gives(heads):
    step, model, seen = loss_of(settings_of(), heads)
    flat = seen["input"].flatten(0, 1)
    with torch.no_grad():
        own, other = model.encoder.feature_maps(flat[:, 0], flat[:, 1])
        attended = model.encoder.attention(own, other)
        pooled = attended.mean((2, 3, 4))
        rotation = F.cross_entropy(model.heads["rotation"].layer(pooled), seen["turns"].flatten())
        assert step.noted["rotation"].item() == pytest.approx(rotation.item(), rel=1e-4)
        painted = model.decoder(attended, tuple(flat.shape[-3:]))
        expected = (painted - seen["original"].flatten(0, 1)).abs().mean()
        assert step.noted["inpainting"].item() == pytest.approx(expected.item(), rel=1e-4)
        layer = model.heads["symmetry"].layers
        c = F.cosine_similarity(layer(own.mean((2, 3, 4))), layer(other.mean((2, 3, 4))))
        h = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1])
        cosine_nce = -(h * torch.log(c.sigmoid()) + (1 - h) * torch.log(1 - c.sigmoid())).mean()
        assert step.noted["symmetry"].item() == pytest.approx(cosine_nce.item(), rel=1e-4)
        z = F.normalize(model.heads["contrast"].layers(pooled)).view(4, 2, -1).transpose(0, 1).flatten(0, 1)
        s = (z @ z.T / 0.5).numpy()
        terms = [
            -np.log(np.exp(s[i, (i + 4) % 8]) / sum(np.exp(s[i, k]) for k in range(8) if k != i))
            for i in range(8)
        ]
        assert step.noted["contrast"].item() == pytest.approx(np.mean(terms), rel=1e-4)


def test_turned_heads_are_turned_alike_on_both_sides_and_the_original_is_not_corrupted(heads):
    settings = settings_of(patches__mirrors=False)
    seen = TASK.views(settings, heads, ROWS, 1, 0)
    for row in range(4):
        for view in range(2):
            turn = int(seen["turns"][row, view])
            assert torch.equal(seen["original"][row, view], torch.rot90(heads[row], turn, (2, 3)))
            replaced = (seen["input"][row, view, 0] != seen["original"][row, view]).float().mean()
            assert 0 < replaced < 0.8
    whole = settings_of(patches__drop=0.0, patches__swap=0.0)
    plain = TASK.views(whole, heads, ROWS, 1, 0)
    assert torch.equal(plain["input"][:, :, 0], plain["original"])


def test_only_what_is_on_is_computed(heads, monkeypatch):
    asked = []
    whole = SymmetryModel.forward

    def watched(self, own, mirrored, wanted):
        asked.append((len(own), set(wanted)))
        return whole(self, own, mirrored, wanted)

    monkeypatch.setattr(SymmetryModel, "forward", watched)
    settings = only(rotation={}, symmetry={"weight": {"shape": "linear", "start": 1.0, "end": 0.0}})
    step, model, seen = loss_of(settings, heads, progress=1.0)
    # One view without a contrast; the symmetry has the weight 0 at the end.
    assert asked == [(4, {"rotation"})]
    assert model.decoder is None
    assert set(model.heads) == {"rotation", "symmetry"}
    assert seen["input"].shape[1] == 1
    assert torch.isnan(step.noted["symmetry"])
    asked.clear()
    loss_of(only(masked={}), heads)
    assert asked == [(4, {"masked"})]


def test_who_is_neither_healthy_nor_ill_has_no_part_in_the_symmetry_loss(heads):
    settings = only(rotation={}, symmetry={})
    known, _, _ = loss_of(settings, heads, healthy=(1, 0, np.nan, np.nan))
    model, objective = made(settings)
    model.eval()
    seen = {name: each[:2] for name, each in TASK.views(settings, heads, ROWS, 1, 0).items()}
    of_two = TASK.step(model, objective, seen, torch.tensor([1.0, 0.0]), 0.5)
    assert known.noted["symmetry"].item() == pytest.approx(of_two.noted["symmetry"].item(), rel=1e-5)


def test_masked_blocks_are_hidden_in_the_mirror_image_too(heads):
    seen = TASK.views(only(masked={"blocks.ratio": 0.6}), heads, ROWS, 1, 0)
    hidden, mirrored, original = seen["masked"].unbind(1)
    where = seen["hidden"]
    assert 0.4 < where.float().mean() < 0.8
    assert (hidden[where] == 0).all()
    assert (mirrored[where] == 0).all()
    assert torch.equal(hidden[~where], original[~where])
    assert mirrored[~where].abs().sum() > 0


def test_a_symmetric_head_has_no_asymmetry_and_a_lopsided_one_has(heads):
    settings = settings_of()
    model, _ = made(settings)
    model.eval()
    even = heads + heads.flip(2)
    lopsided = even.clone()
    lopsided[:, :, :12] *= 0.2
    with torch.no_grad():
        none, some = (TASK.observe(settings, model, each)[ASYMMETRY] for each in (even, lopsided))
    assert none.abs().max() < 1e-5
    assert (some > none + 1e-4).all()


def test_the_area_of_the_asymmetry_counts_people_and_leaves_the_unknown_out():
    settings = settings_of(evaluation__disease="group")
    asymmetry = np.array([0.1, 0.3, 0.4, 0.2, 0.9])
    healthy = np.array([1.0, 0.0, 0.0, 1.0, np.nan])
    subjects = np.array(["a", "b", "b", "c", "d"])
    outputs = {"loss": np.ones(5), ASYMMETRY: asymmetry}
    seen = Observed(
        np.full(5, "x", object), np.full(5, "s"), subjects, np.zeros((5, 2)), outputs, more={JUDGED: healthy}
    )
    found = TASK.judge(settings, seen, seen, Judging(sites=False))
    assert found.metrics["asymmetry_auc"] == roc_auc_score([0, 1, 0], [0.1, 0.35, 0.2])
    assert found.predictions[ASYMMETRY].tolist() == asymmetry.tolist()
    assert "asymmetry_auc" in TASK.describe(settings).objectives
    assert "asymmetry_auc" not in TASK.describe(settings_of()).metrics


def test_who_is_healthy_is_read_from_a_column():
    manifest = pd.DataFrame({"group": ["control", "adhd", "", "1"], "site": "x"})
    settings = settings_of(data__diagnosis="group", data__healthy=["control", "1"])
    assert healthy_of(settings, manifest, "group")[[0, 1, 3]].tolist() == [1, 0, 1]
    assert np.isnan(healthy_of(settings, manifest, "group")[2])
    assert healthy_of(settings_of(), manifest, "").tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="no column 'grup'"):
        healthy_of(settings_of(), manifest, "grup")
    with pytest.raises(UserError, match="nobody has this in group, which has 1, adhd, control"):
        healthy_of(settings_of(data__healthy=["well"]), manifest, "group")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"views.count": 2, "objective.contrast.name": None}, "cannot act without objective.contrast"),
        ({"views.count": 3}, "the contrast is of two views"),
        ({"views.quarter_turns": "left_right"}, "objective.rotation turns heads itself"),
        ({**OFF, "objective.symmetry.name": "symmetry"}, "which nothing would train"),
        ({"model.patch": 4}, "five doublings"),
        (OFF, "no loss is on"),
    ],
)
def test_what_cannot_act_together_is_refused(chosen, words):
    with pytest.raises(UserError, match=words):
        check_settings(resolve(merge(published("symmetry_pretraining"), SMALL | chosen)))


def test_one_voxel_of_features_is_refused_before_anything_starts_and_padding_is_said():
    interpolated = settings_of(decoder__kind="interpolated")
    with pytest.raises(UserError, match="leave one voxel of features"):
        TASK.check_grid(interpolated, (32, 32, 32))
    with pytest.raises(UserError, match="reads two"):
        TASK.check_grid(settings_of(model__pooling="corner"), (32, 32, 32))
    assert TASK.check_grid(interpolated, (64, 64, 64)) == []
    notes = TASK.check_grid(interpolated, (178, 208, 178))
    assert "padded to 178 x 208 x 208" in notes[0]
    assert "to 192 x 224 x 224" in notes[1]
    assert TASK.check_grid(settings_of(views__crop_size=32), (178, 208, 178)) == []


def test_the_validation_loss_is_the_same_at_every_call_and_in_any_company(heads):
    settings = settings_of()
    model, _ = made(settings)
    model.eval()
    with torch.no_grad():
        together = TASK.losses(settings, model, heads)
        torch.manual_seed(5)
        again = torch.cat([TASK.losses(settings, model, heads[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(together, again, rtol=1e-4, atol=1e-5)
    assert len(set(together.tolist())) == 4


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    cohort = write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")
    manifest = cohort.manifest.assign(group=["control", "case"] * 12)
    return Subjects(
        InMemory.of(cohort), manifest, make_splits(manifest, folds=2, holdout=0.25), ("stiffness",)
    )


TINY = {"model.name": "resnet18", "model.width": 0.0625, "training.epochs": 1, "training.batch_size": 8,
        "decoder.kind": "transposed", "data.diagnosis": "group", "data.healthy": ["control"]}  # fmt: skip


def test_a_diagnosis_beyond_the_budget_of_labels_is_not_used(subjects):
    """Neither in a pre-training by itself nor in a first stage; whose scan it is it still trains on."""
    settings = resolve(
        merge(published("symmetry_pretraining"), TINY | {"evaluation.probes": ["age"], "data.labelled": 4})
    )
    alone = CellTraining(settings, subjects, Cell(0, 0), Place())
    known = subjects.splits.training(0)
    told = known[~np.isnan(alone.targets[known])]
    assert len(alone.labelled_rows) == 4
    assert set(told.tolist()) == set(alone.labelled_rows.tolist())
    assert set(known.tolist()) <= set(alone.training_rows.tolist())
    stage = {f"pretraining.{name}": value for name, value in TINY.items() if not name.startswith("model.")}
    small = {"model.width": 0.0625, "training.epochs": 1, "training.batch_size": 8, "data.labelled": 4}
    whole = resolve(merge(with_first_stage(published("brain_age"), {"pretraining.task": "symmetry_pretraining"}),
                          {"pretraining.task": "symmetry_pretraining", **stage, **small}))  # fmt: skip
    first = FirstStage(whole, subjects, Cell(0, 0), Place(), Path("nowhere"), 0)
    of_trial = CellTraining(whole.model_copy(update={"pretraining": None}), subjects, Cell(0, 0), Place())
    training = CellTraining(first.settings, subjects, first.cell, Place(), rows=first.rows,
                            without_label=first.without_label)  # fmt: skip
    told = known[~np.isnan(training.targets[known])]
    assert set(told.tolist()) == set(of_trial.labelled_rows.tolist())
    more = resolve(merge(whole.model_dump(mode="json"), {"data.labelled": 6}))
    other = FirstStage(more, subjects, Cell(0, 0), Place(), Path("nowhere"), 0)
    assert other.folder != first.folder


@pytest.mark.parametrize(
    ("space", "changes", "words"),
    [
        ("tissue", {"pretraining.task": "symmetry_pretraining"}, "cannot come before model.name=res_unet"),
        ("symmetry_classification", {"pretraining.task": "symmetry_pretraining", "data.target": "x",
                                     "pretraining.evaluation.disease": "x"}, "pretraining.evaluation.disease"),
    ],
)  # fmt: skip
def test_first_stages_that_cannot_be_are_refused(space, changes, words):
    with pytest.raises(UserError, match=words):
        resolve(merge(with_first_stage(published(space), changes), changes))
