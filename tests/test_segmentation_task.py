"""Segmentation: losses against slow ones, networks of any size, judging case by case, and maps on a scan's own grid."""

from __future__ import annotations

import gzip
import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from process_helpers import run
from small_cohort import write_small_cohort

from core.config import check_settings, merge, needed_maps, resolve
from core.errors import UserError
from core.evaluation.label_sets import LabelSets
from core.evaluation.segmentation import surface_dice
from core.evaluation.splits import make_splits
from core.losses.segmentation import IGNORED, CrossEntropy, Dice, DiceCrossEntropy, Focal, Tversky
from core.models.segmenter import build_segmenter
from core.models.settings import (
    DynUNetSettings,
    GroupNormUNetSettings,
    ResUNetSettings,
    SwinUNETRSettings,
    SymmetrySwinUNETRSettings,
)
from core.own_grid import OwnGrid, image_like, place
from core.report.answer.verdict import judged_interval, judged_value
from core.tasks import find_task
from core.tasks.segmentation import classes_of, places_in
from core.tasks.task import Beside, ClassProbabilities, Judging, Observed
from core.volumes.cohort.description import stored_voxel_ml
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import splits_of
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import load_space, published

TASK = find_task("segmentation")
SMALL = {
    "data.classes": ["ball=1"], "model.width": 0.0625, "training.epochs": 2, "training.batch_size": 4,
    "data.normalise": "none",
}  # fmt: skip


def settings_of(**chosen):
    given = {name.replace("__", "."): value for name, value in chosen.items()}
    return resolve(merge(published("tissue"), SMALL | given))


def cases():
    draws = np.random.default_rng(0)
    scores = draws.normal(size=(2, 3, 4, 3, 2))
    classes = draws.integers(-1, 3, (2, 4, 3, 2))
    return scores, classes


def probabilities_of(scores):
    raised = np.exp(scores)
    return raised / raised.sum(axis=1, keepdims=True)


def slow_cross_entropy(scores, classes, weights=(1, 1, 1), smoothing=0.0):
    p, total, over = probabilities_of(scores), 0.0, 0.0
    for n, x, y, z in np.ndindex(classes.shape):
        true = classes[n, x, y, z]
        if true == IGNORED:
            continue
        for k in range(3):
            target = (1 - smoothing) * (k == true) + smoothing / 3
            total -= weights[k] * target * math.log(p[n, k, x, y, z])
        over += weights[true]
    return total / over


def slow_overlap(scores, classes, first, below):
    """1 - the mean over cases and classes from `first` on of an overlap, `below`(tp, p, t, p^2 sums) -> the ratio."""
    p, ratios = probabilities_of(scores), []
    for n in range(len(scores)):
        known = classes[n] != IGNORED
        for k in range(first, 3):
            predicted, true = p[n, k][known], (classes[n] == k)[known].astype(float)
            ratios.append(below(predicted, true))
    return 1 - np.mean(ratios)


def dice_ratio(p, t):
    return (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)


def squared_ratio(p, t):
    return (2 * (p * t).sum() + 1e-5) / ((p**2).sum() + (t**2).sum() + 1e-5)


def tversky_ratio(p, t):
    both = (p * t).sum()
    return (both + 1e-5) / (both + 0.3 * (p * (1 - t)).sum() + 0.7 * ((1 - p) * t).sum() + 1e-5)


def slow_focal(scores, classes):
    p, total, count = probabilities_of(scores), 0.0, 0
    for n, x, y, z in np.ndindex(classes.shape):
        true = classes[n, x, y, z]
        if true != IGNORED:
            of_true = p[n, true, x, y, z]
            total -= (1 - of_true) ** 2 * math.log(of_true)
            count += 1
    return total / count


@pytest.mark.parametrize(
    ("settings", "slowly"),
    [
        (CrossEntropy(), slow_cross_entropy),
        (
            CrossEntropy(class_weights=(0.5, 1, 2), label_smoothing=0.1),
            lambda s, c: slow_cross_entropy(s, c, (0.5, 1, 2), 0.1),
        ),
        (Dice(), lambda s, c: slow_overlap(s, c, 1, dice_ratio)),
        (Dice(background=True, squared=True), lambda s, c: slow_overlap(s, c, 0, squared_ratio)),
        (Tversky(alpha=0.3), lambda s, c: slow_overlap(s, c, 1, tversky_ratio)),
        (Focal(), slow_focal),
        (
            DiceCrossEntropy(dice_weight=2.0),
            lambda s, c: 2 * slow_overlap(s, c, 1, dice_ratio) + slow_cross_entropy(s, c),
        ),
    ],
)
def test_losses_are_their_formulas_and_leave_unknown_voxels_out(settings, slowly):
    scores, classes = cases()
    loss = settings.build()
    given = torch.from_numpy(scores).requires_grad_()
    found = loss(given, torch.from_numpy(classes), 0.5)
    assert found.item() == pytest.approx(slowly(scores, classes), rel=1e-4)
    found.backward()
    unknown = torch.from_numpy(classes == IGNORED)[:, None].expand_as(given)
    assert given.grad[unknown].abs().max() == 0
    assert given.grad[~unknown].abs().max() > 0
    nothing = loss(torch.from_numpy(scores), torch.full(classes.shape, IGNORED), 0.5)
    assert torch.isfinite(nothing)


def test_weights_for_other_classes_are_refused():
    scores, classes = cases()
    loss = CrossEntropy(class_weights=(1, 1)).build()
    with pytest.raises(UserError, match="2 weights for 3 classes"):
        loss(torch.from_numpy(scores), torch.from_numpy(classes), 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        ResUNetSettings(width=0.125), GroupNormUNetSettings(width=0.25), DynUNetSettings(width=0.125),
        SwinUNETRSettings(width=0.25), SymmetrySwinUNETRSettings(width=0.25),
    ],
    ids=lambda settings: settings.name,
)  # fmt: skip
def test_every_network_takes_volumes_of_any_size(settings):
    torch.manual_seed(0)
    network = build_segmenter(settings, 2, 3)
    volumes = torch.randn(1, 2, 19, 23, 17)
    scores = network(volumes)
    depths = (3,) if settings.name == "dynunet" else ()
    assert scores.shape == (1, *depths, 3, 19, 23, 17)
    network.eval()
    with torch.no_grad():
        assert network(volumes).shape == (1, 3, 19, 23, 17)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small", maps=("dseg",))


def training_of(cohort, **chosen):
    settings = settings_of(**chosen)
    splits = make_splits(cohort.manifest, 2, 0.25, by="site")
    subjects = Subjects.of(cohort, splits, InMemory.of(cohort, needed_maps(settings)))
    return CellTraining(settings, subjects, Cell(0, 0), Place())


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {
            "views.crop_size": 8,
            "views.pad_to": 8,
            "views.count": 2,
            "views.crop_on_class": 0.5,
            "views.flip": 0.5,
        },
        {"model.name": "dynunet", "objective.name": "dice_cross_entropy"},
    ],
)
def test_a_bright_ball_is_learnt_and_scans_without_a_map_have_no_part(cohort, chosen):
    training = training_of(cohort, **{"training.epochs": 30, "optimiser.learning_rate": 0.01, **chosen})
    having = set(np.flatnonzero(cohort.has_map("dseg")).tolist())
    assert set(training.training_rows.tolist()) <= having
    assert set(training.evaluation_rows.tolist()) <= having
    losses = [training.run_epoch()["loss"] for _ in range(30)]
    outcome = training.judge()
    assert losses[-1] < losses[0] / 2
    assert outcome.metrics["dice"] > 0.9
    assert outcome.metrics["dice_ball"] == outcome.metrics["dice"]
    assert np.isfinite(outcome.metrics["hausdorff95"])
    np.testing.assert_allclose(outcome.predictions["error"], 1 - outcome.predictions["dice_ball"])


def test_cases_are_judged_one_by_one_and_what_is_in_neither_map_is_counted(cohort):
    """Three cases and two classes, against counts by hand; the second class is in no map of the first case."""
    settings = settings_of(data__classes=["one=1", "two=7"], data__balanced="site")
    probabilities = torch.zeros(3, 3, 4, 4, 4)
    reference = torch.zeros(3, 4, 4, 4, dtype=torch.int16)
    reference[:, :2] = 1
    reference[1:, 2] = 7
    predicted = torch.zeros(3, 4, 4, 4, dtype=torch.long)
    predicted[:, :1] = 1
    predicted[2, 2] = 2
    reference[2, 3, 0, 0] = IGNORED
    predicted[2, 3, 0, 0] = 2
    probabilities.scatter_(1, predicted[:, None], 1.0)

    class Fixed(torch.nn.Module):
        def forward(self, volumes):
            return 20 * probabilities

    beside = Beside({"dseg": reference}, (1.0, 2.0, 3.0), torch.full((3,), 0.006), final=True)
    seen = TASK.observe_with_maps(settings, Fixed(), torch.zeros(3, 1, 4, 4, 4), beside)
    outputs = {name: values.numpy() for name, values in seen.items()}
    people = np.array(["a", "b", "c"])
    observed = Observed(np.full(3, "dseg", object), np.full(3, ""), people, outputs.pop("embedding"), outputs)
    outcome = TASK.judge(settings, observed, observed, Judging())
    # Of class one 16 of 32 voxels are found: 2 * 16 / 48. Class two is missed in b, and whole in c.
    one = 2 * 16 / 48
    assert (1 - outcome.predictions["error"]).tolist() == pytest.approx([one, one / 2, (one + 1) / 2])
    assert outcome.predictions["predicted"].tolist() == pytest.approx([16 / 64, 16 / 64, 33 / 64])
    assert outcome.metrics["dice"] == pytest.approx(np.mean([one, one / 2, (one + 1) / 2]))
    assert outcome.metrics["dice_two"] == pytest.approx(0.5)
    assert outcome.metrics["undefined"] == 1
    assert outcome.predictions["ml_two"].tolist() == pytest.approx([0, 0, 16 * 6 / 1000])
    assert outcome.predictions["reference_ml_one"].tolist() == pytest.approx([32 * 6 / 1000] * 3)
    # Of class two nothing can be wrong in a: it is in neither map.
    wrong = (outcome.predictions["ml_two"] - outcome.predictions["reference_ml_two"]).abs().tolist()
    expected = [0.096, (0.096 + wrong[1]) / 2, (0.096 + wrong[2]) / 2]
    assert outcome.metrics["volume_error"] == pytest.approx(np.mean(expected))
    assert outcome.metrics["volume_error_two"] == pytest.approx((wrong[1] + wrong[2]) / 2)
    # The surface of class one is one voxel of 1 mm off; class two of b is infinitely far.
    assert outcome.metrics["hausdorff95"] == pytest.approx(1.0)
    assert math.isfinite(outcome.metrics["surface_dice"])
    early = TASK.observe_with_maps(
        settings,
        Fixed(),
        torch.zeros(3, 1, 4, 4, 4),
        Beside(beside.maps, beside.edges, beside.voxel_ml, final=False),
    )
    assert torch.isnan(early["distances"]).all()


def test_a_voxel_of_a_registered_brain_is_as_large_as_the_brain_was():
    """Stretched by 1.2, 1.1 and 1.0 along the axes, and turned; a phantom, and one whose affine is not known."""
    turn = nib.eulerangles.euler2mat(0.3, 0.2, 0.1)
    affine = np.column_stack([turn @ np.diag([4 / 1.2, 4 / 1.1, 4.0]), [1.0, 2.0, 3.0]])
    manifest = pd.DataFrame({"affine": [affine.reshape(-1).tolist(), None]})
    found = stored_voxel_ml(manifest, (4.0, 4.0, 4.0))
    assert found.tolist() == pytest.approx([0.064 / (1.2 * 1.1), 0.064])
    assert stored_voxel_ml(pd.DataFrame({"age": [1.0]}), (1.0, 2.0, 5.0)).tolist() == pytest.approx([0.01])


def test_surface_dice_is_the_share_of_surfaces_within_a_tolerance():
    one, other = np.zeros((12, 8, 8), bool), np.zeros((12, 8, 8), bool)
    one[2:8, 2:6, 2:6], other[3:9, 2:6, 2:6] = True, True
    edges = np.array([2.0, 1.0, 1.0])
    assert surface_dice(one, one, edges, 0.5) == 1
    assert surface_dice(one, other, edges, 2.0) == 1
    assert 0 < surface_dice(one, other, edges, 1.5) < 1
    assert surface_dice(one, np.zeros_like(one), edges, 5.0) == 0
    assert math.isnan(surface_dice(np.zeros_like(one), np.zeros_like(one), edges, 5.0))


def test_numbers_of_a_map_become_places_and_unknown_voxels_stay_so():
    settings = settings_of(data__classes=["lesion=255", "other=4"])
    found = places_in(torch.tensor([[[[0, 255, 4, 3, -1]]]], dtype=torch.int16), classes_of(settings))
    assert found.flatten().tolist() == [0, 1, 2, 0, IGNORED]


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"data.classes": ["a=1", "b=1"]}, "numbers of its own"),
        ({"data.classes": ["a=0"]}, "0 is the background"),
        ({"data.classes": ["a"]}, r"data\.classes"),
        ({"views.crop": 0.5}, r"views\.crop_size"),
    ],
)
def test_what_cannot_act_is_refused(chosen, says):
    with pytest.raises(UserError, match=says):
        check_settings(resolve(merge(published("tissue"), chosen)))


def test_a_map_that_the_cohort_lacks_is_named(cohort):
    with pytest.raises(UserError, match=r"has no maps 'lesion': it has dseg"):
        TASK.labels(settings_of(data__target="lesion"), cohort.manifest)
    # New people need no column in which the folds of others were alike.
    assert len(TASK.labels(settings_of(data__balanced="protocol"), cohort.manifest)) == len(cohort)
    with pytest.raises(UserError, match="alike in 'protocol', and the cohort has no such column"):
        splits_of(SweepRequest(), cohort.manifest, "protocol")


def test_the_interval_of_an_overlap_is_that_of_what_it_lacks():
    draws = np.random.default_rng(0)
    errors = draws.uniform(0.1, 0.3, 30)
    table = pd.DataFrame(
        {"subject": [f"{row}" for row in range(30)], "method": "search winner", "error": errors}
    )
    value = judged_value(table, "search winner", TASK.about)
    low, high = judged_interval(table, "search winner", TASK.about)
    assert value == pytest.approx(1 - errors.mean())
    assert low < value < high < 1


@pytest.mark.parametrize("code", [0, 1, 4])
def test_a_segmentation_lies_on_the_voxels_of_its_scan(tmp_path, code):
    """A ball in mm, known on a coarse grid, comes back on a fine, turned, mirrored grid with a trailing axis."""
    own = np.array([[-1.5, 0.2, 0, 30], [0.1, 0, 1.2, -20], [0, 1.4, 0.1, -30], [0, 0, 0, 1.0]])
    shape = (40, 44, 36)
    image = nib.Nifti1Image(np.zeros((*shape, 1), np.int16), own)
    image.set_sform(own, 2)
    image.set_qform(own, code)
    image.to_filename(tmp_path / "scan.nii.gz")
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = -40
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), -1) * 4.0 - 40
    ball = 1 / (1 + np.exp(np.linalg.norm(grid - [0, 5, -5], axis=-1) - 12))
    given = ClassProbabilities(np.stack([1 - ball, ball])[None], LabelSets({"ball": (7,)}))
    found = place(given, coarse, OwnGrid.of_file(tmp_path / "scan.nii.gz"))
    written = image_like(tmp_path / "scan.nii.gz", found.classes_xyz)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ own[:3, :3].T + own[:3, 3]
    true = np.linalg.norm(places - [0, 5, -5], axis=-1) < 12
    classes = np.asarray(written.dataobj)
    assert classes.shape == (*shape, 1)
    assert set(np.unique(classes)) == {0, 7}
    mine = classes[..., 0] == 7
    assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.95
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    assert int(written.header["qform_code"]) == code
    assert int(written.header["sform_code"]) == 2
    voxel = abs(np.linalg.det(own[:3, :3])) / 1000
    assert found.milliliters["ball"] == pytest.approx(mine.sum() * voxel)
    several = image_like(tmp_path / "scan.nii.gz", np.moveaxis(found.probabilities_kxyz[1:], 0, -1))
    assert several.shape == (*shape, 1)
    np.testing.assert_allclose(found.probabilities_kxyz.sum(axis=0), 1, atol=1e-5)
    beyond = np.abs(places).max(axis=-1) > 50
    assert not mine[beyond].any()


def test_the_space_gives_a_weight_to_a_sum_only_and_patches_as_a_whole():
    import optuna

    space, base = load_space("tissue")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    kinds, networks = set(), set()
    for _ in range(60):
        proposed = space(study.ask())
        settings = resolve(merge(base, proposed))
        check_settings(settings)
        kinds.add((settings.objective.name, settings.views.crop_size))
        networks.add(settings.model.name)
        assert ("objective.dice_weight" in proposed) == (settings.objective.name == "dice_cross_entropy")
    assert len(kinds) == 6
    assert len(networks) == 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_for_the_best_segmentation_writes_a_page_and_maps(tmp_path):
    write_small_cohort(tmp_path / "cohort", 24, maps=("dseg",))
    small = SMALL | {"data.classes": "[ball=1]"}
    changes = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    done = run(
        "sweep", "cohort", "--task", "segmentation", "--trials", 2, "--folds", 2, "--slots", 1, "--scheduler", "none",
        "--set", "model.name=res_unet", "--out", "run", *changes, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert trials["state"].tolist() == ["COMPLETE"] * 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Dice of ball" in page
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])
    scan = np.zeros((24, 24, 24, 1), dtype=np.float32)
    scan[6:18, 6:18, 6:18] = 2
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "own_T1w.nii.gz")
    made = run("predict", "run", "own_T1w.nii.gz", "--out", "maps", "--probabilities", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    written = nib.load(tmp_path / "maps" / "own_T1w_dseg.nii.gz")
    assert written.shape == (24, 24, 24, 1)
    assert (tmp_path / "maps" / "own_T1w_dseg_probabilities.nii.gz").exists()
    assert "ml_ball" in pd.read_csv(tmp_path / "maps" / "predictions.csv")
    assert gzip.decompress((tmp_path / "maps" / "own_T1w_dseg.nii.gz").read_bytes())
    refused = run("predict", "run", "own_T1w.nii.gz", "--probabilities", cwd=tmp_path)
    assert (refused.returncode, "needs --out FOLDER" in refused.stderr) == (2, True)
