"""Several workers train as one, report what they save, and continue where they were interrupted."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from of_age import assign
from process_helpers import MADE_SMALL, run
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.evaluation.splits import make_splits
from core.inference import load_predictor
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import InMemory
from distributed.training.subjects import Place, Subjects
from distributed.training.trial import Runner
from search_spaces import published

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EPOCHS = 10
CELLS = [{"fold": 0, "seed": 0}]
WITH_DROPOUT = {
    "model.name": "swin_symmetry", "model.width": 0.25, "model.window": 2, "training.epochs": 3,
}  # fmt: skip
STAGED = {
    "pretraining.task": "brain_age", "pretraining.training.epochs": 2, "pretraining.training.batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A cohort, and the runs that `brainsweep train` makes of it with one worker and with two."""
    folder = tmp_path_factory.mktemp("workers")
    write_small_cohort(folder / "cohort", subjects=45)
    for workers in (1, 2):
        done = run(
            "train", "cohort", "--folds", 3, *MADE_SMALL, "--set", f"training.epochs={EPOCHS}",
            "--set", "training.batch_size=16", "--workers", workers, "--out", f"of-{workers}", cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_two_workers_have_the_losses_of_one(workplace):
    losses = [pd.read_csv(workplace / f"of-{workers}" / "history.csv")["loss"] for workers in (1, 2)]
    assert len(losses[0]) == EPOCHS
    # Float32 sums in another order: 1e-6 apart at first, and up to three times farther after each epoch. Gradients of
    # half the size were 2.0 apart.
    np.testing.assert_allclose(losses[1][:6], losses[0][:6], rtol=0, atol=1e-4)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_reported_is_what_is_saved(workplace, workers):
    folder, cohort = workplace / f"of-{workers}", Cohort.open(workplace / "cohort")
    roles = pd.read_csv(folder / "splits.csv").set_index("subject")["role"]
    rows = np.flatnonzero(cohort.manifest["subject"].map(roles) == "fold 0")
    predictor = load_predictor(folder / "best")
    assert any(isinstance(module, torch.nn.BatchNorm3d) for module in predictor.model.modules())
    errors = np.abs(
        predictor.predict(cohort.read(rows))["predicted"].to_numpy() - cohort.manifest["age"].to_numpy()[rows]
    )
    cells = pd.read_csv(folder / "cells.csv")
    assert cells["n"].tolist() == [len(rows)]
    assert errors.mean() == pytest.approx(cells["mae"].item(), abs=1e-3)


def all_epochs(
    rank: int, folder: Path, chosen: dict, folds: int, interrupted_after: int | None
) -> dict[str, Any]:
    """The history, the cells and the seeds of a trial; its worker begins anew after some epochs."""
    cohort = Cohort.open(folder / "cohort")
    subjects = Subjects.of(cohort, make_splits(cohort.manifest, folds=folds), InMemory.of(cohort))
    runner = Runner(subjects, Place(rank=rank, workers=2))
    assignment = assign(folder / f"interrupted-{interrupted_after}" / "trials" / "0000", chosen, CELLS)
    seeds = []
    while True:
        answer = runner(assignment)
        seeds.append(torch.initial_seed())
        # As in a slot, where an epoch begins for all workers when the first one has saved the last epoch.
        dist.barrier()
        if answer["done"]:
            break
        if answer["epochs"] == interrupted_after:
            runner = Runner(subjects, Place(rank=rank, workers=2))
            torch.rand(7)  # whatever happened in between
        state = runner.trial.training.model.state_dict() if runner.trial and runner.trial.training else {}
        for name, mine in state.items():
            theirs = mine.clone()
            dist.broadcast(theirs, src=0)
            assert torch.equal(theirs, mine), name
    progress = json.loads((Path(assignment["folder"]) / "progress.json").read_text())
    times = ("seconds", "spent_seconds", "first_step_at")
    history = [{key: row[key] for key in row if key not in times} for row in progress["history"]]
    return {"history": history, "cells": progress["cells"], "seeds": seeds}


def one_worker(rank: int, port: int, folder: Path, chosen: dict, folds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = [all_epochs(rank, folder, chosen, folds, after) for after in (None, 1, 2)]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    # See tests/test_losses_distributed.py.
    os._exit(0)


@pytest.mark.parametrize(
    ("changes", "folds"),
    [({"training.epochs": 3}, 19), (WITH_DROPOUT, 3), ({"training.epochs": 3} | STAGED, 3)],
    ids=["one subject to validate on", "dropout", "two stages"],
)
def test_a_trial_of_two_workers_that_is_continued_ends_with_the_same_numbers(tmp_path, changes, folds):
    write_small_cohort(tmp_path / "cohort")
    base = published("brain_age") | (
        {"pretraining": {"task": "brain_age"}} if changes.keys() & STAGED else {}
    )
    chosen = resolve(merge(base, SMALL | changes)).model_dump(mode="json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_worker, args=(port, tmp_path, chosen, folds), nprocs=2)
    of_both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for whole, *parts in of_both:
        assert len([row for row in whole["history"] if "stage" not in row]) == 3
        assert len(whole["history"]) == (5 if "pretraining.task" in changes else 3)
        assert whole["cells"][0]["n"] == (1 if folds == 19 else 7)
        for part in parts:
            assert str(part) == str(whole)
    # Dropout masks of different subjects are independent.
    seeds = [whole["seeds"] for whole, *_ in of_both]
    assert len({*seeds[0], *seeds[1]}) == 6
