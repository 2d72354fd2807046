"""Constraint maps: laws of a clustering, an overlay with a map, and the command that makes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from process_helpers import run
from sklearn.metrics import adjusted_rand_score

from core.errors import UserError
from core.volumes.cohort.overlay import DERIVED
from core.volumes.cohort.reader import Cohort
from core.volumes.derive.constraint import ConstraintSettings, constraint_map, explained_by
from core.volumes.phantom.cohort import phantom_subject, write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.commands.constraining import derive_constraint


def three_tissues(noise=0.02, seed=0):
    """Two contrasts (2, X, Y, Z) of three tissues in slabs, and which (X, Y, Z); a margin of background."""
    truth = np.zeros((14, 12, 12), int)
    truth[1:5, 1:-1, 1:-1], truth[5:9, 1:-1, 1:-1], truth[9:13, 1:-1, 1:-1] = 1, 2, 3
    means = np.array([[0, 1.0, 2.0, 3.0], [0, 5.0, 1.0, 5.0]])
    draws = np.random.default_rng(seed)
    volume = means[:, truth] + noise * draws.normal(size=(2, *truth.shape)) * (truth > 0)
    return volume.astype(np.float32), truth


def test_clusters_are_the_tissues_where_these_are_plain():
    volume, truth = three_tissues()
    made = constraint_map(volume, ConstraintSettings(clusters=3, components=2))
    inside = truth > 0
    assert (made[~inside] == 0).all()
    assert set(np.unique(made[inside])) == {1, 2, 3}
    assert adjusted_rand_score(truth[inside], made[inside]) > 0.95


def test_the_scale_of_a_contrast_and_the_order_of_contrasts_change_no_borders():
    volume, truth = three_tissues()
    settings = ConstraintSettings(clusters=3, components=2)
    made, inside = constraint_map(volume, settings), truth > 0
    scaled = volume * np.array([1000, 0.01], np.float32)[:, None, None, None]
    for other in (scaled, volume[::-1].copy()):
        assert adjusted_rand_score(made[inside], constraint_map(other, settings)[inside]) > 0.98


def test_the_same_seed_gives_the_same_map_and_total_variation_joins_voxels():
    volume, _ = three_tissues(noise=0.8)
    settings = ConstraintSettings(clusters=6, components=2)
    made = constraint_map(volume, settings)
    assert np.array_equal(made, constraint_map(volume, settings))

    def borders(classes):
        return sum(int((np.diff(classes, axis=axis) != 0).sum()) for axis in range(3))

    smooth = constraint_map(volume, settings.model_copy(update={"tv": 2.0}))
    rough = constraint_map(volume, settings.model_copy(update={"tv": 400.0}))
    assert borders(smooth) < 0.8 * borders(rough)


def test_one_contrast_is_enough_and_too_few_voxels_are_refused():
    volume, truth = three_tissues()
    made = constraint_map(volume[:1], ConstraintSettings(clusters=3))
    assert set(np.unique(made)) == {0, 1, 2, 3}
    # With one contrast clusters are levels: in the order of their grey values.
    means = [volume[0][made == number].mean() for number in (1, 2, 3)]
    assert means in (sorted(means), sorted(means, reverse=True))
    with pytest.raises(UserError, match="cannot be divided into 20 clusters"):
        constraint_map(volume[:, 1:3, 1:4, 1:3], ConstraintSettings())
    assert truth.any()


def test_the_share_of_variance_that_clusters_explain_is_that_of_the_formula():
    draws = np.random.default_rng(0)
    classes = draws.integers(0, 4, (6, 5, 4)).astype(np.int16)
    values = draws.normal(size=classes.shape).astype(np.float32) + classes
    inside = classes > 0
    whole = ((values[inside] - values[inside].mean()) ** 2).sum()
    within = sum(((values[classes == k] - values[classes == k].mean()) ** 2).sum() for k in (1, 2, 3))
    assert explained_by(classes, values) == pytest.approx(1 - within / whole, rel=1e-5)


@pytest.fixture
def cohort(tmp_path):
    settings = PhantomSettings(kind="contrasts", subjects=6, spacing=8.0)
    return write_phantom_cohort(tmp_path / "cohort", settings)


def test_a_derived_map_is_read_like_any_other_and_the_cohort_stays_the_same(cohort):
    before = {path: path.read_bytes() for path in cohort.folder.rglob("*") if path.is_file()}
    settings = ConstraintSettings(contrasts=("t1gd", "flair"), clusters=5)
    description, page = derive_constraint(cohort.folder, "guide", settings)
    assert {path: path.read_bytes() for path in before} == before
    opened = Cohort.open(cohort.folder)
    assert opened.description.hash == cohort.description.hash
    assert "guide" in opened.map_names
    assert description.maps == ("guide",)
    assert opened.has_map("guide").all()
    rows = [4, 0, 3]
    expected = np.stack([constraint_map(opened.read([row])[0][[1, 3]], settings) for row in rows])
    assert np.array_equal(opened.read_map("guide", rows), expected)
    boxes = [(slice(2, 9), slice(3, 8), slice(4, 6))] * 3
    assert np.array_equal(opened.read_map("guide", rows, boxes=boxes), expected[:, 2:9, 3:8, 4:6])
    into = np.empty_like(expected)
    opened.read_map("guide", rows, out=into)
    assert np.array_equal(into, expected)
    held = InMemory.of(opened, ("guide",))
    assert np.array_equal(held.read_map("guide", np.array(rows)), expected)
    assert "Clusters explain" in page.read_text()
    # The same again is done already; another one under this name is refused.
    assert derive_constraint(cohort.folder, "guide", settings) == (description, page)
    with pytest.raises(UserError, match="give --constraint another name"):
        derive_constraint(cohort.folder, "guide", settings.model_copy(update={"tv": 1.0}))
    with pytest.raises(UserError, match="no channel 't1'"):
        derive_constraint(cohort.folder, "other", ConstraintSettings(contrasts=("t1",)))
    with pytest.raises(UserError, match="has a map dseg already"):
        derive_constraint(cohort.folder, "dseg", settings)


def test_what_was_made_before_a_stop_is_not_made_again(cohort):
    settings, made = ConstraintSettings(clusters=5), []

    def stopping(tasks, memory):
        from distributed.commands.constraining import make_maps

        made.append(len(tasks))
        yield make_maps(tasks[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derive_constraint(cohort.folder, "guide", settings, runner=stopping)
    assert "guide" not in Cohort.open(cohort.folder).map_names

    def going_on(tasks, memory):
        from distributed.commands.constraining import make_maps

        made.append(len(tasks))
        return map(make_maps, tasks)

    derive_constraint(cohort.folder, "guide", settings, runner=going_on)
    assert made == [2, 1]
    assert Cohort.open(cohort.folder).has_map("guide").all()
    assert not list((cohort.folder / DERIVED).glob(".*"))


def test_several_counts_make_several_maps_through_the_command(cohort):
    made = run("derive", cohort.location, "--constraint", "tissue", "--contrasts", "t2w", "--clusters", "3,6",
               cwd=cohort.folder.parent)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "with one contrast" in " ".join(made.stdout.split())
    opened = Cohort.open(cohort.folder)
    assert {"tissue-3", "tissue-6"} <= set(opened.map_names)
    assert opened.read_map("tissue-6", [0]).max() == 6
    names = json.loads((cohort.folder / DERIVED / "index.json").read_text())
    assert names == ["tissue-3", "tissue-6"]
    wrong = run(
        "derive", cohort.location, "--constraint", "x", "--clusters", "three", cwd=cohort.folder.parent
    )
    assert wrong.returncode == 2
    assert "whole numbers such as 20 or 10,20,30" in wrong.stderr
    neither = run("derive", cohort.location, cwd=cohort.folder.parent)
    assert "derive what?" in neither.stderr


def test_contrasts_follow_from_relaxation_times():
    """Fluid is dark in T1w and FLAIR and bright in T2w; with gadolinium enhancing tissue alone is brighter."""
    settings = PhantomSettings(kind="contrasts", subjects=40, spacing=4.0)
    drawn = [phantom_subject(settings, index) for index in range(40)]
    ill = [each for each in drawn if each.columns["disease"] == "tumour"]
    labelled = [each for each in drawn if each.maps]
    assert 24 <= len(ill) <= 38
    assert 8 <= len(labelled) <= 24
    for each in labelled[:4]:
        images, tissue, tumour = each.brain.channels, each.brain.tissue, each.maps["dseg"]
        well = tumour == 0

        def of(name, number, images=images, tissue=tissue, well=well):
            return np.median(images[name][(tissue == number) & well])

        assert of("t1w", 1) < of("t1w", 2) < of("t1w", 3)
        assert of("t2w", 1) > of("t2w", 2) > of("t2w", 3)
        assert of("flair", 1) < 0.6 * of("flair", 3)
        grey = np.median(images["t1gd"][(tissue == 2) & well]) / np.median(
            images["t1w"][(tissue == 2) & well]
        )
        enhancing = np.median(images["t1gd"][tumour == 4]) / np.median(images["t1w"][tumour == 4])
        assert enhancing > 1.3 * grey
        assert np.median(images["flair"][tumour == 2]) > 1.3 * of("flair", 3)
        assert set(np.unique(tumour)) == {0, 1, 2, 4}
