"""Occlusion maps: of a model whose answer is known, beside random weights, and through the command."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from process_helpers import run
from small_cohort import write_small_cohort

from core.errors import UserError
from core.explaining import explain
from core.files.pictures import read_pictures
from core.inference import Predictor
from core.tasks import find_task


class Corner(torch.nn.Module):
    """Its answer is the sum over a cube: nothing else matters."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(weight)))

    def forward(self, volumes):
        return self.weight * volumes[:, :, 2:6, 2:6, 2:6].sum((1, 2, 3, 4))


class Sums:
    """As much of a task as an explanation asks."""

    about = find_task("brain_age").about

    def build(self, settings, channels, facts):
        return Corner(0.0)

    def observe(self, settings, model, volumes):
        return {"embedding": model(volumes)[:, None]}

    def predictions(self, settings, outputs, fitted, facts):
        return pd.DataFrame({"predicted": outputs["embedding"][:, 0]})

    def segmented_classes(self, settings):
        return None


@pytest.fixture
def predictor(monkeypatch):
    from core import explaining
    from core.config import resolve

    monkeypatch.setattr(explaining, "find_task", lambda name: Sums())
    settings = resolve({"task": "brain_age", "data": {"normalise": "none"}})
    return Predictor(settings, Corner(1.0), None, ("t1w",), None, {})


def test_the_map_is_what_hiding_takes_away(predictor):
    """At every voxel the mean, over the cubes that hide it, of what a cube shares with the one that matters."""
    # Hidden voxels have the mean, 1: what is taken away is what the cube has above it.
    volume = np.ones((1, 12, 12, 12), np.float32)
    volume[:, 2:6, 2:6, 2:6] += 1
    volume[:, 8:12, 8:12, 8:12] -= 0.999
    volume *= 1 / volume.mean()
    found = explain(predictor, [volume], 4)
    above = float(volume[0, 3, 3, 3] - 1)
    assert found.scans == 1
    assert found.what == "absolute change of what is predicted"
    line = [[max(0, min(start + 4, 6) - max(start, 2)) for start in range(0, 9, 2) if start <= at < start + 4]
            for at in range(12)]  # fmt: skip
    mean = np.array([np.mean(each) for each in line])
    np.testing.assert_allclose(
        found.trained, above * np.einsum("i,j,k->ijk", mean, mean, mean), rtol=1e-3, atol=1e-3
    )
    assert (found.random == 0).all()
    # Its side matters more than the opposite one.
    assert found.difference[3, 3, 3] == pytest.approx(27 * above, rel=1e-3)
    assert found.difference[8, 3, 3] == pytest.approx(-27 * above, rel=1e-3)


def test_a_cube_larger_than_the_volume_is_refused(predictor):
    with pytest.raises(UserError, match="a hidden cube of 13 voxels does not fit"):
        explain(predictor, [np.ones((1, 12, 12, 12), np.float32)], 13)


@pytest.mark.slow
def test_the_command_writes_maps_and_the_report_draws_them(tmp_path):
    cohort = write_small_cohort(tmp_path / "small")
    made = run("sweep", cohort.location, "--trials", 1, "--folds", 2, "--out", "run", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    said = run("explain", "run", cohort.location, "--people", 2, "--cube", 24, cwd=tmp_path)
    assert "mean over 2 scans" in " ".join(said.stdout.split()), said.stderr
    maps = read_pictures(tmp_path / "run" / "explained" / "maps.npz")
    assert maps["trained"].shape == cohort.description.shape
    assert np.abs(maps["trained"]).max() > 0
    assert "Where the winner looks" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "explained" / "difference.nii.gz").exists()
