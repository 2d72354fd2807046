"""The classical baseline against scikit-learn's exact principal components, and without a look at whom it judges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from small_cohort import write_small_cohort

from core.config import resolve
from core.evaluation.probes import fit_age_probe
from core.evaluation.splits import Splits
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.training.subjects import Place, Subjects
from distributed.training.voxels import COARSEST, VoxelCell
from search_spaces import published

EVALUATED, OTHERS = np.arange(1, 24, 4), np.array([row for row in range(24) if row % 4 != 1])
SPLITS = Splits(np.array([], dtype=np.int64), (EVALUATED, OTHERS))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def cell_of(cohort, volumes=None, ages=None, edges=(8.0, 8.0, 8.0)):
    held = InMemory.of(cohort)
    held = held if volumes is None else InMemory(volumes, held.scales)
    manifest = cohort.manifest if ages is None else cohort.manifest.assign(age=ages)
    subjects = Subjects(held, manifest, SPLITS, ("stiffness",), edges=edges)
    cell = VoxelCell(resolve(published("brain_age")), subjects, Cell(0, 0), Place())
    cell.run_epoch()
    return cell


def normalised(cohort):
    """Voxels (24, X, Y, Z), scaled by what is not zero in the training volumes; zeros stay zero."""
    volumes = cohort.read(np.arange(24))[:, 0].astype(np.float64)
    inside = volumes[OTHERS][volumes[OTHERS] != 0]
    return np.where(volumes != 0, (volumes - inside.mean()) / inside.std(), 0)


@pytest.mark.parametrize("edges", [(8.0, 8.0, 8.0), (4.0, 4.0, 4.0), (2.0, 4.0, 9.0)])
def test_it_is_principal_components_and_the_probe_of_ages(cohort, edges):
    voxels = normalised(cohort)
    # Blocks are voxels of at most 8 mm along every axis.
    x, y, z = (max(1, int(COARSEST // edge)) for edge in edges)
    voxels = voxels.reshape(24, 12 // x, x, 12 // y, y, 12 // z, z).mean(axis=(2, 4, 6))
    voxels = voxels.reshape(24, -1)
    components = PCA(len(OTHERS) - 1, svd_solver="full").fit(voxels[OTHERS])
    training, evaluated = (components.transform(voxels[rows]) for rows in (OTHERS, EVALUATED))
    ages, people = cohort.manifest["age"].to_numpy(), cohort.manifest["subject"].to_numpy(str)
    cell = cell_of(cohort, edges=edges)
    for rows, expected in ((OTHERS, training), (EVALUATED, evaluated)):
        found = cell.observed(rows).embeddings @ cell.turn.T
        # The sign of a component is free.
        np.testing.assert_allclose(
            np.abs(found), np.abs(expected), rtol=0, atol=2e-3 * np.abs(expected).max()
        )
    probe = fit_age_probe(cell.observed(OTHERS).embeddings, ages[OTHERS], people[OTHERS])
    predicted = probe.predict(cell.observed(EVALUATED).embeddings)
    outcome = cell.judge(sites=False)
    np.testing.assert_allclose(outcome.predictions["predicted"], predicted, rtol=1e-9)
    assert outcome.metrics["mae"] == pytest.approx(np.abs(predicted - ages[EVALUATED]).mean())


def test_whom_it_judges_has_no_part_in_it(cohort):
    volumes, ages = InMemory.of(cohort).volumes.copy(), cohort.manifest["age"].to_numpy().copy()
    first = cell_of(cohort)
    volumes[EVALUATED] *= 5
    ages[EVALUATED] += 40
    second = cell_of(cohort, volumes, ages)
    np.testing.assert_array_equal(first.components.components_, second.components.components_)
    assert first.judge().fitted == second.judge().fitted
    volumes[OTHERS[0]] *= 5
    assert not np.array_equal(first.components.components_, cell_of(cohort, volumes).components.components_)


def test_it_is_about_as_good_as_a_ridge_on_the_voxels(cohort):
    """Of components that are all taken for equally large, those that are noise hide the age."""
    turned, as_they_are, ridges = [], [], []
    for seed in range(12):
        draws = np.random.default_rng(seed)
        # Brains differ in many ways, in a few of them much; age is in the two largest.
        people, ways = draws.normal(size=(24, 60)), draws.normal(size=(60, 12**3))
        volumes = 10 + (people / np.arange(1, 61)) @ ways + draws.normal(0, 1, (24, 12**3))
        ages = 50 + 10 * (people[:, 0] + people[:, 1]) + draws.normal(0, 6, 24)
        cell = cell_of(cohort, volumes=volumes.reshape(24, 1, 12, 12, 12).astype(np.float32), ages=ages)
        turned.append(cell.judge(sites=False).metrics["mae"])
        cell.turn = np.eye(len(cell.turn))
        as_they_are.append(cell.judge(sites=False).metrics["mae"])
        ridge = RidgeCV(np.logspace(-2, 6, 30)).fit(volumes[OTHERS], ages[OTHERS])
        ridges.append(np.abs(ridge.predict(volumes[EVALUATED]) - ages[EVALUATED]).mean())
    assert np.mean(turned) < 1.15 * np.mean(ridges)
    assert np.mean(turned) < 0.9 * np.mean(as_they_are)
