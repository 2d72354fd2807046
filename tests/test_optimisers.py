"""Optimisers, schedules and the length of a run: against torch's own machinery, by laws, and through a whole cell."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from of_age import assign
from own_task import BrighterSide
from small_cohort import SMALL, write_small_cohort
from torch import nn

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.models import build
from core.run_settings import PlateauSettings
from core.schedules import as_schedule
from core.volumes.views import ViewSettings, make_views
from distributed.batches.in_process import InMemory
from distributed.batches.plan import Plan, epoch_batches
from distributed.run.assignment import Cell
from distributed.training.loop import CellTraining
from distributed.training.optimiser import build_optimiser, plateau_factor, set_rates
from distributed.training.subjects import Place, Subjects
from distributed.training.trial import Runner
from search_spaces import published

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def settings(**changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(merge(published("brain_age"), SMALL | given))


def cell_of(cohort, chosen):
    subjects = Subjects(InMemory.of(cohort), cohort.manifest, make_splits(cohort.manifest, 3), ("stiffness",))
    return CellTraining(chosen, subjects, Cell(0, 0), Place())


def weights_of(training):
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


def test_polynomial_decay_is_a_power_of_what_is_left():
    schedule = as_schedule({"shape": "polynomial", "start": 0.2, "end": 0.05, "power": 0.9})
    for progress in (0.0, 0.3, 1.0):
        assert schedule(progress) == pytest.approx(0.05 + 0.15 * (1 - progress) ** 0.9)
    straight = as_schedule({"shape": "polynomial", "start": 1.0, "power": 1.0})
    assert straight(0.25) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(6))
def test_the_plateau_is_that_of_torch(seed):
    draws = np.random.default_rng(seed)
    losses = np.maximum.accumulate(draws.normal(2, 0.5, 40))[::-1] + draws.normal(0, 0.02, 40)
    chosen = PlateauSettings(factor=0.5, patience=int(draws.integers(0, 4)), threshold=1e-3, lowest=0.1)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=chosen.patience, threshold=1e-3, min_lr=0.1, eps=0
    )
    for done in range(1, len(losses) + 1):
        theirs.step(losses[done - 1])
        assert plateau_factor(chosen, losses[:done].tolist()) == pytest.approx(
            optimiser.param_groups[0]["lr"]
        )
    assert plateau_factor(None, [5.0] * 50) == 1.0


def test_a_plateau_lowers_the_rate_and_survives_an_interruption(cohort):
    chosen = settings(
        training__epochs=5, optimiser__decay=1.0,
        optimiser__plateau={"factor": 0.5, "patience": 0, "threshold": 0.9},
    )  # fmt: skip
    whole = cell_of(cohort, chosen)
    rates = [whole.run_epoch()["learning_rate"] for _ in range(4)]
    # No loss falls by nine tenths: after the first epoch the rate is halved in every epoch.
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5])
    parts = cell_of(cohort, chosen)
    parts.run_epoch(), parts.run_epoch()
    again = cell_of(cohort, chosen)
    again.load_state_dict(parts.state_dict())
    assert [again.run_epoch()["learning_rate"] for _ in range(2)] == rates[2:]
    assert torch.equal(weights_of(again), weights_of(whole))
    for training in (whole, parts, again):
        training.close()


def test_a_plateau_may_watch_people_who_are_not_trained_on_and_luck_moves_nothing(cohort):
    chosen = settings(
        training__epochs=4, training__inner=0.3, optimiser__decay=1.0, optimiser__learning_rate=1e-12,
        views__noise=0.5, optimiser__plateau={"factor": 0.5, "patience": 0, "threshold": 0.0, "watches": "inner"},
    )  # fmt: skip
    training = cell_of(cohort, chosen)
    assert training.inner_rows.size
    assert not np.intersect1d(training.inner_rows, training.training_rows).size
    rows = [training.run_epoch() for _ in range(3)]
    watched = [row["inner_loss"] for row in rows]
    assert training.losses == watched
    again = cell_of(cohort, chosen)
    again.load_state_dict(training.state_dict())
    assert again.losses == watched
    # The same weights have the same loss, whenever they are asked: noise is drawn as before.
    assert {again._inner_loss(0.75) for _ in range(3)} == {watched[-1]}
    for each in (training, again):
        each.close()


def test_adamw_takes_the_decay_off_the_weights_and_not_into_the_gradient():
    model = nn.Linear(2, 1, bias=False)
    chosen = settings(optimiser__name="adamw", optimiser__learning_rate=0.1, optimiser__weight_decay=0.5)
    optimiser = build_optimiser(chosen, model)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, -4.0]])
    optimiser.step()
    # The first step of Adam is the sign of the gradient (Kingma and Ba 2015), the decay is lr · wd · weight.
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-6, rtol=0)


def test_norms_and_biases_have_a_group_without_decay():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Linear(2, 1))
    chosen = settings(optimiser__no_decay="norms_and_biases", optimiser__weight_decay=0.01)
    optimiser = build_optimiser(chosen, model)
    set_rates(chosen, optimiser, 2)
    decayed, spared = optimiser.param_groups
    assert {parameter.ndim for parameter in decayed["params"]} == {5, 2}
    assert {parameter.ndim for parameter in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(list(model.parameters()))
    assert len(build_optimiser(settings(), model).param_groups) == 1


def test_the_warm_up_by_steps_rises_with_every_step(cohort):
    chosen = settings(optimiser__warmup_steps=5, optimiser__decay=1.0, training__epochs=4)
    training = cell_of(cohort, chosen)
    rates = []
    training.optimiser.register_step_pre_hook(
        lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"])
    )
    for _ in range(3):
        training.run_epoch()
    training.close()
    expected = [1e-4 * min(1, (step + 1) / 5) for step in range(len(rates))]
    assert len(rates) >= 6
    assert rates == pytest.approx(expected)
    with pytest.raises(UserError, match="exclude each other"):
        settings(optimiser__warmup_steps=5, optimiser__warmup=0.1)


@pytest.mark.parametrize(("subjects", "batch", "each"), [(10, 4, 2), (10, 4, 3), (7, 2, 5), (5, 8, 2)])
def test_steps_are_the_batches_of_one_pass_after_the_other(subjects, batch, each):
    rows = np.arange(subjects)
    plan = Plan(rows, batch, 3, range(1, 7), batches_per_epoch=each)
    taken = [rows.tolist() for epoch in range(1, 7) for rows in plan.epoch(epoch)]
    passes = [number for epoch in range(1, 7) for number in plan.passes(epoch)]
    expected = [
        (part.tolist(), number) for number in range(1, 50) for part in epoch_batches(rows, batch, 3, number)
    ]
    assert list(zip(taken, passes, strict=True)) == expected[: 6 * each]
    # What is read ahead, in one line for several batches, is the same.
    read = plan.reads(2, 4)["rows"].combine_chunks().flatten().to_pylist()
    assert read == np.concatenate(plan.epoch(2)).tolist()


def test_a_run_of_steps_is_judged_every_so_many(cohort, tmp_path):
    chosen = settings(training__steps=9, training__judge_every=3, training__batch_size=4)
    subjects = Subjects(InMemory.of(cohort), cohort.manifest, make_splits(cohort.manifest, 3), ("stiffness",))
    runner, answers = Runner(subjects), []
    assignment = assign(tmp_path / "0000", chosen.model_dump(mode="json"), [{"fold": 0, "seed": 0}])
    while not answers or not answers[-1]["done"]:
        answers.append(runner(assignment))
    assert [answer["epoch"] for answer in answers] == [1, 2, 3]
    assert all(math.isfinite(answer["value"]) for answer in answers)
    for wrong in ({"training__steps": 9}, {"training__steps": 10, "training__judge_every": 3}):
        with pytest.raises(UserError, match="judge_every"):
            settings(**wrong)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    """The network of this task has no batch norm, and its loss is a mean over subjects: both are exactly the same."""
    from test_own_task import cohort_of_sides

    cohort = cohort_of_sides(tmp_path / "cohort", 18)
    task = f"{HERE / 'own_task.py'}:BrighterSide"
    assert BrighterSide().about.name == "brighter_side"
    splits = make_splits(cohort.manifest, 2, 0.0, by="side")
    rows = splits.training(0)[:8]
    subjects = Subjects(InMemory.of(cohort), cohort.manifest, splits, ("T1w",))
    slopes = {}
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        chosen = resolve(
            {
                "task": task,
                "optimiser": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0},
                "training": {"epochs": 3, "batch_size": batch, "accumulate": accumulate},
            }
        )
        training = CellTraining(chosen, subjects, Cell(0, 0), Place())
        training.training_rows = rows
        for _ in range(3):
            training.run_epoch()
        training.close()
        slopes[batch] = float(training.model.slope.detach())
    assert slopes[4] == pytest.approx(slopes[8], rel=1e-5)
    assert slopes[2] == pytest.approx(slopes[8], rel=1e-5)
    assert slopes[8] != 1.0


def test_the_best_epoch_is_chosen_by_people_who_are_neither_trained_on_nor_judged(cohort):
    chosen = settings(training__keep="best", training__inner=0.25, training__epochs=4)
    training = cell_of(cohort, chosen)
    everyone, _ = training.labelled.rows_of(0)
    inner, trained, judged = (
        set(rows.tolist()) for rows in (training.inner_rows, training.training_rows, training.evaluation_rows)
    )
    assert inner | trained == set(everyone.tolist())
    assert not inner & trained
    assert not (inner | trained) & judged
    assert len(inner) == round(0.25 * len(everyone))
    with pytest.raises(
        UserError, match=r"training.inner=0.99 makes an inner split of 12 of 12 training scans"
    ):
        cell_of(cohort, settings(training__keep="best", training__inner=0.99))
    kept, values = {}, []
    for epoch in range(1, 5):
        training.run_epoch()
        kept[epoch] = weights_of(training).clone()
        observed = [training._observe(rows) for rows in (training.training_rows, training.inner_rows)]
        from core.tasks.task import Judging

        values.append(training.task.judge(chosen, *observed, Judging(sites=False)).metrics["mae"])
    best = int(np.argmin(values)) + 1
    assert training.best["epoch"] == best
    assert training.best["value"] == pytest.approx(min(values))
    training.judge()
    assert torch.equal(weights_of(training), kept[best])
    training.close()


def test_the_last_epoch_is_kept_by_default_and_nothing_is_set_aside(cohort):
    training = cell_of(cohort, settings())
    assert training.inner_rows.size == 0
    assert len(training.training_rows) == len(training.labelled.rows_of(0)[0])


def test_float16_is_refused_on_a_cpu(cohort):
    training = cell_of(cohort, settings(training__precision="float16"))
    with pytest.raises(UserError, match="float16 is for GPUs"):
        training.run_epoch()
    training.close()


@pytest.mark.gpu
def test_float16_trains_with_a_scaled_loss_on_a_gpu(cohort):
    subjects = Subjects(InMemory.of(cohort), cohort.manifest, make_splits(cohort.manifest, 3), ("stiffness",))
    chosen = settings(training__precision="float16", training__epochs=3, training__gradient_clip=1.0)
    training = CellTraining(chosen, subjects, Cell(0, 0), Place(torch.device("cuda")))
    losses = [training.run_epoch()["loss"] for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert training.state_dict()["scaler"]["scale"] > 1
    training.close()


def test_drop_path_acts_in_training_only():
    volumes = torch.randn(2, 1, 32, 32, 32)
    torch.manual_seed(0)
    plain = build("swin", width=0.25)
    torch.manual_seed(0)
    dropping = build("swin", width=0.25, drop_path=0.9)
    dropping.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain.eval()(volumes), dropping.eval()(volumes))
        torch.manual_seed(1)
        assert not torch.allclose(plain.train()(volumes), dropping.train()(volumes))


def test_a_gaussian_kernel_without_a_reference_is_refused():
    with pytest.raises(UserError, match="'gaussian' is 'rbf' by another name"):
        settings(objective__kernel="gaussian")
    assert settings(objective__kernel="gaussian", objective__reference="barbano", objective__neighbours=None)


def changed_share(probability, **change):
    volumes = torch.rand(200, 1, 6, 6, 6) + 0.5
    views = make_views(volumes, np.arange(200), 1, 0, ViewSettings(count=1, **change, **probability))
    return float((views[:, 0] != volumes).flatten(1).any(1).float().mean())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("crop_probability", {"crop": 0.5}),
        ("noise_probability", {"noise": 0.1}),
        ("move_probability", {"rotate": 20.0}),
        ("intensity_probability", {"scale": 0.2}),
    ],
)
def test_a_change_happens_to_a_share_of_the_views(name, change):
    assert changed_share({name: 0.0}, **change) == 0
    assert changed_share({name: 1.0}, **change) == 1
    # Of 200 draws with probability 0.3 the share lies within 0.3 ± 0.13 in all but one of 10,000 cases.
    assert abs(changed_share({name: 0.3}, **change) - 0.3) < 0.13


def test_a_view_is_turned_by_whole_quarters():
    volumes = torch.rand(40, 1, 5, 6, 6)
    views = make_views(volumes, np.arange(40), 3, 0, ViewSettings(count=2, quarter_turns="left_right"))
    found = set()
    for volume, of_volume in zip(volumes, views, strict=True):
        for view in of_volume:
            turns = [turn for turn in range(4) if np.array_equal(np.rot90(volume[0], turn, (1, 2)), view[0])]
            assert len(turns) == 1
            found.update(turns)
    assert found == {0, 1, 2, 3}
    with pytest.raises(UserError, match="need equal"):
        make_views(volumes, np.arange(40), 3, 0, ViewSettings(quarter_turns="up_down"))


@pytest.mark.parametrize("judge_every", [1, 3, 6])
def test_a_schedule_by_steps_does_not_depend_on_how_often_is_judged(cohort, judge_every):
    chosen = settings(
        optimiser__decay={"shape": "linear", "start": 1.0, "end": 0.0}, training__steps=6,
        training__judge_every=judge_every, training__batch_size=4,
    )  # fmt: skip
    training, rates = cell_of(cohort, chosen), []
    training.optimiser.register_step_pre_hook(
        lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"])
    )
    for _ in range(6 // judge_every):
        training.run_epoch()
    training.close()
    assert rates == pytest.approx([1e-4 * (1 - (step + 1) / 6) for step in range(6)])
