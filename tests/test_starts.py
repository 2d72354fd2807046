"""Starting from weights: what is frozen, thawed and continued; whom a start knows; and what a user is told."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from process_helpers import run
from rich.console import Console
from safetensors.torch import save
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.starts import Start, data_set_of, keep_start, read_kept, read_start, scans_of, seen_of
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.sweeps.starts import tell_what_matches
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import published

CHOSEN = SMALL | {"training.epochs": 6, "objective.neighbours": None}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def training_of(cohort, starts=None, **begin):
    settings = resolve(
        merge(published("brain_age"), CHOSEN | {f"begin.{name}": value for name, value in begin.items()})
    )
    subjects = Subjects.of(cohort, make_splits(cohort.manifest, 3), InMemory.of(cohort), starts=starts)
    return CellTraining(settings, subjects, Cell(0, 0), Place())


@pytest.fixture(scope="module")
def start(cohort):
    torch.manual_seed(5)
    trained = training_of(cohort)
    trained.run_epoch()
    weights = {name: value.numpy().copy() for name, value in trained.model.state_dict().items()}
    trained.close()
    return Start("earlier#00000000", weights, trained.trained_on)


def values(training, part):
    return torch.cat(
        [value.detach().flatten().clone() for value in getattr(training.model, part).parameters()]
    )


def test_an_encoder_begins_with_the_weights_of_the_start_and_a_head_with_its_own(cohort, start):
    begun = training_of(cohort, {start.name: start}, weights=start.name)
    fresh = training_of(cohort)
    for name, value in begun.model.encoder.state_dict().items():
        assert torch.equal(value, torch.from_numpy(start.weights[f"encoder.{name}"])), name
    assert torch.equal(values(begun, "head"), values(fresh, "head"))
    whole = training_of(cohort, {start.name: start}, weights=start.name, take="all")
    assert torch.equal(values(whole, "head"), torch.cat([
        torch.from_numpy(start.weights[f"head.{name}"]).flatten() for name, _ in whole.model.head.named_parameters()
    ]))  # fmt: skip
    with pytest.raises(UserError, match="unknown start of this run 'other#1'"):
        training_of(cohort, {start.name: start}, weights="other#1")


@pytest.mark.parametrize("interrupted_after", [None, 2, 3, 4])
def test_frozen_parts_train_from_the_thaw_on_also_after_an_interruption(cohort, start, interrupted_after):
    """Progress is 3/6 after the third epoch, and the parts train from the fourth on."""
    options = {"weights": start.name, "freeze": "encoder", "thaw": 0.5, "rate": 0.5}
    training, courses = training_of(cohort, {start.name: start}, **options), []
    for epoch in range(1, 7):
        training.run_epoch()
        courses.append((values(training, "encoder"), values(training, "head")))
        if epoch == interrupted_after:
            state = training.state_dict()
            training.close()
            training = training_of(cohort, {start.name: start}, **options)
            training.load_state_dict(state)
    training.close()
    encoders, heads = zip(*courses, strict=True)
    assert all(torch.equal(encoders[0], each) for each in encoders[1:3])
    assert not torch.equal(encoders[2], encoders[3])
    assert not torch.equal(heads[0], heads[1])
    whole = training_of(cohort, {start.name: start}, **options)
    for _ in range(6):
        whole.run_epoch()
    whole.close()
    assert torch.equal(values(whole, "encoder"), encoders[-1])


def test_statistics_of_a_frozen_encoder_stay_and_its_optimiser_keeps_nothing(cohort, start):
    training = training_of(cohort, {start.name: start}, weights=start.name, freeze="all_but_head")
    before = {name: value.clone() for name, value in training.model.encoder.state_dict().items()}
    training.run_epoch()
    training.close()
    assert all(
        torch.equal(value, before[name]) for name, value in training.model.encoder.state_dict().items()
    )
    assert len(training.optimiser.state) == len(list(training.model.head.parameters()))


def test_the_encoder_has_its_own_rate_in_every_epoch(cohort, start):
    training = training_of(cohort, {start.name: start}, weights=start.name, rate=0.1, layer_decay=0.5)
    training.run_epoch()
    training.close()
    name_of = {id(value): name for name, value in training.model.named_parameters()}
    rates = {
        name_of[id(value)]: group["lr"]
        for group in training.optimiser.param_groups
        for value in group["params"]
    }
    assert rates["head.layers.0.weight"] == pytest.approx(1e-4)
    assert rates["encoder.layer4.1.conv2.weight"] == pytest.approx(1e-5)
    assert rates["encoder.layer3.0.conv1.weight"] == pytest.approx(0.5e-5)
    assert rates["encoder.conv1.weight"] == rates["encoder.bn1.bias"] == pytest.approx(1e-5 / 16)


def test_whom_the_weights_know_is_passed_on(cohort, start):
    begun = training_of(cohort, {start.name: start}, weights=start.name)
    mine = scans_of(cohort.manifest, begun.training_rows, "test")
    known = pd.concat([start.trained_on, mine]).drop_duplicates()
    assert set(begun.trained_on["subject"]) == set(known["subject"])
    of_another = Start(start.name, start.weights, pd.DataFrame(
        {"subject": ["old"], "data_set": ["elsewhere"], "source_hash": ["ab"]}
    ))  # fmt: skip
    assert "old" in set(
        training_of(cohort, {start.name: of_another}, weights=start.name).trained_on["subject"]
    )


def test_what_nobody_knows_of_a_start_nobody_knows_of_what_it_began(tmp_path, cohort, start):
    unknown = Start(start.name, start.weights, None)
    begun = training_of(cohort, {start.name: unknown}, weights=start.name)
    assert begun.trained_on is None
    begun.run_epoch()
    begun.write_model(begun.judge(), tmp_path / "model")
    begun.close()
    assert not (tmp_path / "model" / "trained_on.csv").exists()
    assert read_start(str(tmp_path / "model")).trained_on is None


def test_whoever_a_first_stage_has_seen_is_known_too(cohort):
    settings = {"pretraining": {"task": "brain_age", "objective": {"name": "simclr"}}}
    chosen = resolve(merge(published("brain_age") | settings, CHOSEN | {"data.labelled": 4}))
    splits = make_splits(cohort.manifest, 3)
    subjects = Subjects.of(cohort, splits, InMemory.of(cohort))
    training = CellTraining(chosen, subjects, Cell(0, 0), Place())
    assert len(training.training_rows) == 4
    everyone = cohort.manifest["subject"].iloc[splits.training(0)]
    assert set(training.trained_on["subject"]) == set(everyone)


def test_half_precision_weights_are_kept_and_read_again(tmp_path, start):
    halved = {name: torch.tensor(value).bfloat16() for name, value in start.weights.items()}
    torch.save(halved, tmp_path / "half.pt")
    found = read_start(str(tmp_path / "half.pt"))
    keep_start(found, tmp_path / "starts")
    assert list(read_kept(tmp_path / "starts")) == [found.name]


def test_a_start_is_kept_with_a_checksum_in_its_name(tmp_path, cohort, start):
    torch.save(
        {"state_dict": {name: torch.tensor(value) for name, value in start.weights.items()}},
        tmp_path / "a b.pt",
    )
    found = read_start(str(tmp_path / "a b.pt"))
    assert found.name.startswith("a-b#")
    assert found.trained_on is None
    keep_start(found, tmp_path / "starts")
    [kept] = read_kept(tmp_path / "starts").values()
    assert kept.name == found.name
    assert all(np.array_equal(values, start.weights[name]) for name, values in kept.weights.items())
    file = tmp_path / "starts" / found.name / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_kept(tmp_path / "starts")
    with pytest.raises(UserError, match=r"begin\.weights=nowhere is not there"):
        read_start("nowhere")


def seen(start_scans, manifest, data_set="here"):
    known = pd.DataFrame(start_scans, columns=["subject", "data_set", "source_hash"])
    return seen_of(Start("s#1", {}, known), manifest, np.arange(len(manifest)), data_set)


def test_seen_is_an_equal_image_or_an_equal_id_of_the_same_data_set():
    manifest = pd.DataFrame({"subject": ["01", "02", "03"], "source_hash": ["a1", "b2", ""]})
    assert seen([("x", "elsewhere", "b2")], manifest).rows.tolist() == [1]
    assert seen([("03", "here", "zz")], manifest).rows.tolist() == [2]
    alike = seen([("03", "elsewhere", ""), ("01", "elsewhere", "zz")], manifest)
    assert (alike.rows.tolist(), alike.alike) == ([], 2)
    assert seen([("x", "here", "")], manifest.drop(columns="source_hash")).rows.tolist() == []
    assert seen_of(Start("s#1", {}, None), manifest, np.arange(3), "here") is None


ASKED = ("--folds", 2, *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_people_who_were_pre_trained_on_under_other_names_and_at_another_spacing_are_refused_by_name(
    tmp_path,
):
    made = run(
        "phantom", "scans", "--nifti", "--subjects", 18, "--spacing", 4, "--channels", "t1w", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    first = tmp_path / "scans"
    # Ten of them, under other names, in another folder.
    table = pd.read_csv(first / "participants.tsv", sep="\t")
    (tmp_path / "others").mkdir()
    for number, subject in enumerate(table["participant_id"][:10]):
        shutil.copytree(first / subject, tmp_path / "others" / f"sub-x{number}")
        for path in (tmp_path / "others" / f"sub-x{number}").rglob("*.nii.gz"):
            path.rename(path.with_name(path.name.replace(subject, f"sub-x{number}")))
    table[:10].assign(participant_id=[f"sub-x{number}" for number in range(10)]).to_csv(
        tmp_path / "others" / "participants.tsv", sep="\t", index=False
    )
    (tmp_path / "others" / "dataset_description.json").write_text(
        json.dumps({"Name": "others", "BIDSVersion": "1.9"})
    )
    channel = "T1w"
    for folder, spacing in (("scans", 8), ("others", 12)):
        done = run(
            "ingest",
            folder,
            f"c-{folder}",
            "--channels",
            channel,
            "--spacing",
            spacing,
            "--intensity",
            "raw",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    trained = run("train", "c-others", *ASKED, "--out", "earlier", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    known = pd.read_csv(tmp_path / "earlier" / "best" / "trained_on.csv")
    numbers = sorted(int(name.removeprefix("sub-x")) for name in known["subject"])
    names = sorted(Cohort.open(tmp_path / "c-scans").manifest["subject"])
    expected = [names[number] for number in numbers]

    sweep = ("sweep", "c-scans", *ASKED, "--trials", 2, "--slots", 1, "--scheduler", "none", "--out", "run")
    refused = run(*sweep, "--start", "none", "--start", "earlier", cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "run").exists()
    assert (
        f"was trained on {len(expected)} subjects that it would be judged on ({', '.join(expected)})"
        in refused.stderr
    )
    assert refused.stderr.count("\n") == 1
    allowed = run(*sweep, "--start", "none", "--start", "earlier", "--allow-seen-subjects", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert "and here it reads" not in allowed.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        f"was trained on {len(expected)} of the 18 people whom it is judged on: its results are too good"
        in page
    )
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert trials["begin.weights"].isna().tolist() == [True, False]
    assert trials["begin.weights"].iloc[1].startswith("earlier#")
    holdout = pd.read_csv(tmp_path / "run" / "holdout.csv")
    # One of them is the winner itself, and named in both ways.
    of = {
        method: table.drop(columns="method").reset_index(drop=True)
        for method, table in holdout.groupby("method")
    }
    both = [of["best from scratch"], of["best from earlier"]]
    assert sum(each.equals(of["search winner"]) for each in both) == 1
    again = run("resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    # Its own model knows all development subjects: it can start no fold of the same cohort.
    own = run("train", "c-scans", *ASKED, "--set", "begin.weights=run", "--out", "other", cwd=tmp_path)
    assert own.returncode == 2
    assert "`pretraining:`" in own.stderr


@pytest.mark.slow
def test_two_cohorts_that_share_ids_and_nothing_else_are_allowed_with_a_note(tmp_path):
    for seed in (1, 2):
        write_small_cohort(tmp_path / str(seed), seed=seed)
        description = json.loads((tmp_path / str(seed) / "cohort.json").read_text())
        assert data_set_of(Cohort.open(tmp_path / str(seed)).description) == description["source"] == "test"
    # Both say that they come from the same source: then equal ids are the same people.
    assert run("train", "1", *ASKED, "--out", "r1", cwd=tmp_path).returncode == 0
    refused = run("train", "2", *ASKED, "--set", "begin.weights=r1", "--fold", 1, "--out", "r2", cwd=tmp_path)
    assert refused.returncode == 2
    known = pd.read_csv(tmp_path / "r1" / "best" / "trained_on.csv", dtype=str)
    known.assign(data_set="elsewhere").to_csv(tmp_path / "r1" / "best" / "trained_on.csv", index=False)
    allowed = run("train", "2", *ASKED, "--set", "begin.weights=r1", "--fold", 1, "--out", "r2", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    splits = pd.read_csv(tmp_path / "r2" / "splits.csv", dtype=str).set_index("role")
    judged = set(splits.loc["fold 1", "subject"])
    alike = len(judged & set(known["subject"]))
    assert alike > 0
    words = " ".join(allowed.stdout.split())
    said = (
        f"was trained on none of the {len(judged)} people whom it is judged on. {alike} of them have the id"
    )
    assert said in words
    leak = json.loads((tmp_path / "r2" / "run.json").read_text())["leaks"][0]
    assert (leak["seen"], leak["alike"], leak["judged"]) == ([], alike, len(judged))
    (tmp_path / "r1" / "best" / "trained_on.csv").unlink()
    unknown = run("train", "2", *ASKED, "--set", "begin.weights=r1", "--fold", 1, "--out", "r3", cwd=tmp_path)
    assert "trained on is unknown" in " ".join(unknown.stdout.split())


def test_a_start_that_saw_another_contrast_is_noted(tmp_path, cohort, start):
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(start.tensors))
    (folder / "input.json").write_text('{"channels": ["T1w"]}')
    found, said = read_start(str(tmp_path / "run")), Console(file=io.StringIO(), width=200)
    assert found.channels == ("T1w",)
    settings = resolve(merge(published("brain_age"), CHOSEN))
    tell_what_matches(settings, {found.name: found}, cohort, np.arange(12), said)
    assert f"{found.name} was trained on T1w, and here it reads stiffness" in said.file.getvalue()
    (folder / "input.json").write_text('{"channels": ["Stiffness"]}')
    alike, said = read_start(str(tmp_path / "run")), Console(file=io.StringIO(), width=200)
    tell_what_matches(settings, {alike.name: alike}, cohort, np.arange(12), said)
    assert "here it reads" not in said.file.getvalue()
