"""A model that is kept answers as the one that was trained: of every network, also one with a layer under two names."""

from __future__ import annotations

import pytest
import torch

from core.config import merge, resolve
from core.inference import Predictor, load_predictor, save_predictor
from core.tasks import find_task
from search_spaces import published

SMALL = {"data.classes": ["ball=1"], "data.normalise": "none"}
NETWORKS = {
    "res_unet": {"model.width": 0.125},
    "groupnorm_unet": {"model.width": 0.25},
    "dynunet": {"model.width": 0.125},
    "swin_unetr": {"model.width": 0.25},
    "swin_unetr_symmetry": {"model.width": 0.25},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_kept_model_gives_the_same_scores(tmp_path, name):
    settings = resolve(merge(published("tissue"), SMALL | NETWORKS[name] | {"model.name": name}))
    task = find_task("segmentation")
    facts = {"classes": {"ball": 1}}
    torch.manual_seed(0)
    model = task.build(settings, 1, facts)
    save_predictor(tmp_path, Predictor(settings, model, None, ("T1w",), None, facts))
    loaded = load_predictor(tmp_path).model
    volumes = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(volumes), model.eval()(volumes))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
