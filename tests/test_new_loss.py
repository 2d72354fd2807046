"""The example of the README: a loss added with one file and one line is a full member of the family."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from core.losses import LOSSES, build

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def decoupled(monkeypatch):
    """The README's code block, run as the module it says it is."""
    text = README.read_text() if README.exists() else ""
    block = re.search(r"```python\n(# core/losses/decoupled\.py\n.*?)```", text, re.DOTALL)
    if block is None:
        pytest.skip("README.md has no core/losses/decoupled.py example")
    module = types.ModuleType("core.losses.decoupled")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block[1], module.__dict__)
    monkeypatch.setitem(LOSSES, "decoupled", module.Decoupled)


def test_the_example_of_the_readme(decoupled):
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
