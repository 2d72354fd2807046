"""What may befall one trial and must not befall the others: no memory, damaged or planted files. No Ray."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from of_age import assign
from ray.tune.experiment import Trial
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.inference import load_predictor
from core.run_names import CHECKPOINT, PROGRESS
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, read_progress
from distributed.run.working_copy import DAMAGED
from distributed.sweeps.forget_finished import ForgetFinished
from distributed.training.loop import CellTraining
from distributed.training.out_of_memory import out_of_memory
from distributed.training.subjects import Place, Subjects
from distributed.training.trial import Runner
from search_spaces import published

CELLS = [{"fold": 0, "seed": 0}, {"fold": 1, "seed": 0}]
IMPOSSIBLE = 2**60
"""Bytes that no machine has: asking for them fails at once, and as it does when memory really is short."""
SHORTAGES = {
    "numpy": lambda: np.empty(IMPOSSIBLE, np.uint8),
    "torch": lambda: torch.empty(IMPOSSIBLE, dtype=torch.uint8),
    "python": lambda: bytearray(IMPOSSIBLE),
}


class Planted:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    cohort = write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")
    return Subjects(
        InMemory.of(cohort), cohort.manifest, make_splits(cohort.manifest, folds=3), ("stiffness",)
    )


@pytest.fixture(scope="module")
def settings():
    return resolve(merge(published("brain_age"), SMALL)).model_dump(mode="json")


def run_all(runner, assignment):
    answers = [runner(assignment)]
    while not answers[-1]["done"]:
        answers.append(runner(assignment))
    return answers


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_trial_that_runs_out_of_memory_fails_by_itself_and_the_next_is_not_disturbed(
    subjects, settings, tmp_path, monkeypatch, shortage
):
    undisturbed = run_all(Runner(subjects), assign(tmp_path / "0001", settings, CELLS))[-1]["value"]
    runner = Runner(subjects)
    runner(assign(tmp_path / "0000", settings, CELLS))
    with monkeypatch.context() as patch:
        patch.setattr(CellTraining, "run_epoch", lambda training: SHORTAGES[shortage]())
        answer = runner(assign(tmp_path / "0000", settings, CELLS))
    assert answer["done"]
    assert not answer["finished"]
    assert answer["epochs"] == 1
    assert "out of memory" in answer["failed"]
    assert "training.batch_size" in answer["failed"]
    assert "\n" not in answer["failed"]
    assert run_all(runner, assign(tmp_path / "0002", settings, CELLS))[-1]["value"] == undisturbed


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_one_of_several_workers_ends_with_it_because_the_others_wait(
    subjects, settings, tmp_path, monkeypatch, shortage
):
    monkeypatch.setattr(CellTraining, "__init__", lambda *arguments, **more: SHORTAGES[shortage]() and None)
    with pytest.raises((MemoryError, RuntimeError)):
        Runner(subjects, Place(workers=2))(assign(tmp_path / "0000", settings, CELLS))


def test_what_tune_keeps_of_a_finished_trial_does_not_grow_with_its_metrics_or_settings():
    trials = {}
    for size in (3, 300):
        settings = {f"setting{i}": i for i in range(size)}
        trials[size] = Trial("stub", stub=True, trial_id="same", config=settings, evaluated_params=settings)
        for epoch in (1, 2):
            trials[size].update_last_result({f"metric{i}": 1.0 for i in range(size)} | {"epoch": epoch})

    def kept(trial):
        trial.invalidate_json_state()
        return sum(len(state) for state in trial.get_json_state())

    assert kept(trials[300]) > 10 * kept(trials[3])
    for trial in trials.values():
        ForgetFinished().on_trial_complete(0, [], trial)
    assert abs(kept(trials[300]) - kept(trials[3])) < 100  # times and random ids differ


def test_other_errors_are_not_taken_for_a_want_of_memory(subjects, settings, tmp_path, monkeypatch):
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert "on the GPU" in out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    )

    def fail(training):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(CellTraining, "run_epoch", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        Runner(subjects)(assign(tmp_path / "0000", settings, CELLS))


def planted_files(witness):
    plain, saved = pickle.dumps(Planted(witness)), io.BytesIO()
    torch.save({"state": Planted(witness)}, saved)
    old, text = io.BytesIO(), pickle.dumps(Planted(witness), protocol=0)
    torch.save({"state": Planted(witness)}, old, _use_new_zipfile_serialization=False)
    return {"pickle": plain, "torch": saved.getvalue(), "old torch": old.getvalue(), "text pickle": text}


def test_the_planted_files_are_dangerous(tmp_path):
    for content in planted_files(tmp_path / "witness").values():
        torch.load(io.BytesIO(content), weights_only=False) if b"state" in content else pickle.loads(content)
        assert (tmp_path / "witness").exists()
        os.unlink(tmp_path / "witness")


@pytest.mark.parametrize("saved", [[1], {"a": 1}, torch.zeros(2), "text"])
def test_a_checkpoint_of_another_shape_is_set_aside(subjects, settings, tmp_path, saved):
    """The trial begins again from its settings, and ends as if nothing had happened."""
    assignment, whole = (assign(tmp_path / name, settings, CELLS) for name in ("0000", "0001"))
    Runner(subjects)(assignment)
    torch.save(saved, tmp_path / "0000" / CHECKPOINT)
    first, *_, last = run_all(Runner(subjects), assignment)
    assert "was set aside" in first["note"]
    assert first["epochs"] == 1
    assert last["value"] == run_all(Runner(subjects), whole)[-1]["value"]


def test_a_member_of_a_population_takes_no_answer_of_another_configuration(subjects, settings, tmp_path):
    """Its folder stays where it is, because other members begin from what it has kept."""
    donor = assign(tmp_path / "0001", settings, CELLS[:1], keep_every=1)
    Runner(subjects)(donor)
    member = assign(tmp_path / "0000", settings, CELLS[:1])
    finished = run_all(Runner(subjects), member)[-1]
    changed = merge(settings, {"optimiser.learning_rate": 0.005})
    again = assign(tmp_path / "0000", changed, CELLS[:1])
    again["begin"] = str(tmp_path / "0001" / "checkpoint-1.pt")
    answers = run_all(Runner(subjects), again)
    assert answers[0]["epochs"] == 2
    assert answers[-1]["value"] != finished["value"]
    assert not list(tmp_path.glob("*-set-aside"))


@pytest.mark.parametrize("kind", planted_files(Path("nowhere")))
def test_a_planted_checkpoint_is_refused_and_nothing_of_it_runs(subjects, settings, tmp_path, kind):
    assignment = assign(tmp_path / "0000", settings, CELLS)
    Runner(subjects)(assignment)
    (tmp_path / "0000" / CHECKPOINT).write_bytes(planted_files(tmp_path / "witness")[kind])
    answer = Runner(subjects)(assignment)
    assert not (tmp_path / "witness").exists()
    assert (
        f"checkpoint {tmp_path}/0000/{CHECKPOINT} is damaged or was not written by a sweep" in answer["note"]
    )
    assert "failed" not in answer


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_trial_whose_checkpoint_is_cut_off_begins_again_and_says_so(subjects, settings, tmp_path, kept):
    assignment, whole = (assign(tmp_path / name / "0000", settings, CELLS) for name in ("cut", "whole"))
    Runner(subjects)(assignment)
    checkpoint = tmp_path / "cut" / "0000" / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    first, *_, last = run_all(Runner(subjects), assignment)
    assert f"checkpoint {checkpoint} is damaged" in first["note"]
    assert first["epochs"] == 1
    assert (checkpoint.parent / f"{CHECKPOINT}{DAMAGED}").exists()
    assert last["value"] == run_all(Runner(subjects), whole)[-1]["value"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"history": []}'])
def test_a_damaged_progress_costs_nothing_of_a_trial_that_has_a_checkpoint(
    subjects, settings, tmp_path, content
):
    assignment, whole = (assign(tmp_path / name / "0000", settings, CELLS) for name in ("cut", "whole"))
    Runner(subjects)(assignment)
    progress = tmp_path / "cut" / "0000" / PROGRESS
    progress.write_text(content)
    with pytest.raises(UserError, match=f"{progress} is damaged; `brainsweep resume`"):
        read_progress(progress.parent)
    first, *_, last = run_all(Runner(subjects), assignment)
    assert f"{progress} is damaged" in first["note"]
    assert first["epochs"] == 2
    assert last["value"] == run_all(Runner(subjects), whole)[-1]["value"]


@pytest.mark.parametrize("done", [1, None])
def test_files_of_another_configuration_are_never_taken(subjects, settings, tmp_path, done):
    """A study that has lost its end gives the number of a trial to another one: begun (one epoch), or finished."""
    other = merge(settings, {"optimiser.learning_rate": 0.005})
    before = assign(tmp_path / "0007", other, CELLS)
    former = Runner(subjects)(before) if done else run_all(Runner(subjects), before)[-1]
    assignment, alone = (
        assign(tmp_path / "0007", settings, CELLS),
        assign(tmp_path / "alone", settings, CELLS),
    )
    first, *_, last = run_all(Runner(subjects), assignment)
    assert first["epochs"] == 1
    assert "held another configuration" in first["note"]
    expected = run_all(Runner(subjects), alone)[-1]
    assert last["value"] == expected["value"] != former["value"]
    assert (tmp_path / "0007-set-aside" / PROGRESS).exists()
    # Its cells are part of it: so are those of other folds.
    repeated = Runner(subjects)(assign(tmp_path / "0007", settings, CELLS[:1]))
    assert repeated["epochs"] == 1
    assert (tmp_path / "0007-set-aside-2" / PROGRESS).exists()


def test_files_of_an_older_version_are_taken(subjects, settings, tmp_path):
    assignment = assign(tmp_path / "0000", settings, CELLS)
    Runner(subjects)(assignment)
    progress, checkpoint = tmp_path / "0000" / PROGRESS, tmp_path / "0000" / CHECKPOINT
    known = json.loads(progress.read_text())
    progress.write_text(json.dumps({name: value for name, value in known.items() if name != "of"}))
    saved = torch.load(checkpoint, weights_only=True)
    del saved["of"]
    torch.save(saved, checkpoint)
    answer = Runner(subjects)(assignment)
    assert answer["epochs"] == 2
    assert "note" not in answer


@pytest.mark.parametrize("is_0_2", [True, False])
def test_a_trial_that_version_0_2_began_keeps_the_penalties_that_its_cells_chose_alone(
    subjects, settings, tmp_path, is_0_2
):
    """Its checkpoint has no predictions of the finished cells, so later cells choose nothing for them."""
    cells = [{"fold": fold, "seed": 0} for fold in range(3)]
    assignment = assign(tmp_path / "0000", settings, cells)
    runner = Runner(subjects)
    first = [runner(assignment) for _ in range(SMALL["training.epochs"])][-1]
    checkpoint = tmp_path / "0000" / CHECKPOINT
    saved = torch.load(checkpoint, weights_only=True)
    for name in ("of", "judged", "after_cells") if is_0_2 else ("after_cells",):
        del saved[name]
    for cell in saved.get("judged", []):
        del cell["without"]
    torch.save(saved, checkpoint)
    last = run_all(Runner(subjects), assignment)[-1]
    assert last["finished"]
    assert last["cells"][0] == first["cells"][0]
    assert "penalty" not in last
    values = [cell["mae"] for cell in last["cells"]]
    assert last["after_cells"] == [values[:1], values[:2], values]


@pytest.fixture(scope="module")
def model(subjects, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "winner"
    run_all(Runner(subjects), assign(folder, settings, [{"fold": HOLDOUT, "seed": 0}], keep_model=True))
    return folder / "model-0"


@pytest.mark.parametrize("kind", planted_files(Path("nowhere")))
@pytest.mark.parametrize("name", ["model.safetensors", "probe.json", "input.json", "settings.json"])
def test_a_planted_file_of_a_model_is_refused_and_nothing_of_it_runs(model, tmp_path, name, kind):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_predictor(tmp_path)
    (tmp_path / name).write_bytes(planted_files(tmp_path / "witness")[kind])
    with pytest.raises(UserError, match="cannot be read"):
        load_predictor(tmp_path)
    assert not (tmp_path / "witness").exists()


def test_storage_that_fails_is_told_from_a_trial_that_fails(subjects, settings, tmp_path):
    (tmp_path / "file").write_text("")
    answer = Runner(subjects)(assign(tmp_path / "file" / "0000", settings, CELLS))
    assert answer["storage"]
    diverging = resolve(
        merge(published("brain_age"), SMALL | {"optimiser.name": "sgd", "optimiser.learning_rate": 1e30})
    )
    answers = run_all(Runner(subjects), assign(tmp_path / "0001", diverging.model_dump(mode="json"), CELLS))
    assert "storage" not in answers[-1]
