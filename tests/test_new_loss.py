"""The example of the manual: a loss in a file of the user is a full member of the family, without any other change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_cohort import SMALL, write_small_cohort

from core.files.python import defined_in
from core.losses import LOSSES, build

MANUAL = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def example(tmp_path):
    """The code block of the manual, as the file that it says it is."""
    text = MANUAL.read_text() if MANUAL.exists() else ""
    block = re.search(r"```python\n(# decoupled\.py.*?)```", text, re.DOTALL)
    if block is None:
        pytest.skip("the manual has no example decoupled.py")
    path = tmp_path / "decoupled.py"
    path.write_text(block[1])
    return path


@pytest.fixture
def decoupled(monkeypatch, example):
    monkeypatch.setitem(LOSSES, "decoupled", defined_in(example, "Decoupled", "loss"))


def test_train_takes_it_from_the_file(example, brainsweep):
    write_small_cohort(example.parent / "cohort", subjects=30)
    asked = ("train", example.parent / "cohort", "--task", f"{example}:DecoupledAge", "--folds", 3)
    small = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    code, out, err = brainsweep(
        *asked, *small, "--set", "objective.temperature=0.2", "--out", example.parent / "run"
    )
    assert code == 0, err
    assert "validation MAE" in out
    chosen = json.loads((example.parent / "run" / "run.json").read_text())["settings"]["objective"]
    assert (chosen["name"], chosen["temperature"]) == ("decoupled", 0.2)
    code, _, err = brainsweep(*asked, "--set", "objective.bin_width=3", "--out", example.parent / "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "objective.bin_width" in err


def test_the_example_of_the_manual(decoupled):
    embeddings = torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(embeddings, dim=-1)
    terms = []
    for b in range(5):
        for v in range(2):
            others = [z[b, v] @ z[c, u] / 0.2 for c in range(5) if c != b for u in range(2)]
            terms.append(torch.stack(others).exp().sum().log() - z[b, v] @ z[b, 1 - v] / 0.2)
    expected = torch.stack(terms).mean().item()
    for settings in ({}, {"chunk_rows": 3}):
        loss = build("decoupled", temperature=0.2, **settings)
        assert loss(embeddings, None, 0.5).item() == pytest.approx(expected)
    near = build("decoupled", neighbours={"end": 2, "shape": "linear"})
    assert torch.isfinite(near(embeddings, None, 1.0))
