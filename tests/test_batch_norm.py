"""Batch norm over two workers (gloo) gives the losses, gradients and running statistics of one process."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.losses import build
from distributed.training.batch_norm import BatchNormOverWorkers, synchronise_batch_norm

BATCHES = (7, 5)
"""The subjects of two steps; a share is what the first worker takes of the first."""
CASES: dict[str, dict[str, Any]] = {
    "as published": {"loss": "exponential", "share": 4},
    "nearly all at one worker": {"loss": "l1", "share": 6},
    "all at one worker": {"loss": "l1", "share": 7},
    "no momentum": {"loss": "l1", "share": 3, "norm": {"momentum": None}},
    "no weights": {"loss": "l1", "share": 3, "norm": {"affine": False}},
    "nothing tracked": {"loss": "l1", "share": 3, "norm": {"track_running_stats": False}},
}


def model_of(case: str) -> nn.Module:
    torch.manual_seed(3)
    settings = CASES[case].get("norm", {})
    return nn.Sequential(
        nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4, **settings), nn.Tanh(),
        nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6, **settings), nn.Tanh(),
        nn.Linear(6, 1 if CASES[case]["loss"] == "l1" else 3),
    ).double()  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (B, 2, 1, 3, 3, 3), whose mean is far from 0, and ages (B,)."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(BATCHES[step], 2, 1, 3, 3, 3, dtype=torch.float64, generator=generator)
    return 100 + views, 80 * torch.rand(BATCHES[step], generator=generator)


def train(case: str, model: nn.Module, mine: slice, device: str = "cpu") -> dict[str, Any]:
    """Two steps on a part of every batch, then evaluation: plain numbers."""
    objective = build(CASES[case]["loss"])
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses, gradients = [], []
    for step in range(len(BATCHES)):
        views, ages = (whole[mine].to(device) for whole in batch(step))
        optimiser.zero_grad()
        output = model(views.flatten(0, 1))
        loss = objective(output.view(len(views), 2, output.shape[-1]), ages, 1.0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        gradients.append([parameter.grad.tolist() for parameter in model.parameters()])
    model.eval()
    state = {name.removeprefix("module."): value.tolist() for name, value in model.state_dict().items()}
    answer = model(batch(0)[0].flatten(0, 1).to(device)).tolist()
    return {"losses": losses, "gradients": gradients, "state": state, "answer": answer}


def one_worker(rank: int, port: int, device: str, folder: Path) -> None:
    results: dict[str, Any] = {}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for case, settings in CASES.items():
        mine = slice(settings["share"], None) if rank else slice(settings["share"])
        model = model_of(case).to(device)
        synchronise_batch_norm(model, torch.device(device))
        results[case] = train(case, DistributedDataParallel(model), mine, device)
    alone = nn.Sequential(nn.BatchNorm1d(2))
    synchronise_batch_norm(alone, torch.device("cpu"))
    try:
        alone(torch.ones(1 - rank, 2))
    except ValueError as error:
        results["one value"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    # See tests/test_losses_distributed.py.
    os._exit(0)


def of_two_workers(device: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_worker, args=(port, device, folder), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_workers_train_as_one(device, tmp_path):
    workers = of_two_workers(device, tmp_path)
    for case in CASES:
        alone = train(case, model_of(case), slice(None))
        first, second = (worker[case] for worker in workers)
        # Every worker says the loss of the whole batch, and what the first one saves is what the others have.
        assert first == second, case
        assert first["state"].keys() == alone["state"].keys()
        for part in alone:
            numbers = (torch.tensor(flat(each[part]), dtype=torch.float64) for each in (first, alone))
            torch.testing.assert_close(
                *numbers, rtol=1e-8, atol=1e-10, msg=lambda text, where=(case, part): f"{where}: {text}"
            )
    for worker in workers:
        assert "needs more than one value per channel" in worker["one value"]


@pytest.fixture
def one_worker_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_one_worker_alone_trains_as_with_the_batch_norm_of_torch(case, one_worker_group):
    model = model_of(case)
    synchronise_batch_norm(model, torch.device("cpu"))
    assert sum(isinstance(module, BatchNormOverWorkers) for module in model) == 2
    alone, torchs = train(case, model, slice(None)), train(case, model_of(case), slice(None))
    for part in torchs:
        torch.testing.assert_close(
            torch.tensor(flat(alone[part])), torch.tensor(flat(torchs[part])), rtol=1e-5, atol=1e-6
        )


def flat(nested: Any) -> list[float]:
    """All numbers in nested lists and dictionaries, in order."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [number for each in nested for number in flat(each)] if isinstance(nested, list) else [nested]


def test_parameters_and_buffers_stay_where_they_are():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3, eps=0.1), nn.InstanceNorm1d(3)))
    before = model.state_dict(keep_vars=True)
    model.eval()
    synchronise_batch_norm(model, torch.device("cpu"))
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert isinstance(model[1][0], BatchNormOverWorkers)
    assert (model[1][0].eps, model[1][0].training) == (0.1, False)
    assert isinstance(model[1][1], nn.InstanceNorm1d)
