"""The campaign of features: each has a command that the command line takes, and a check that counts."""

import itertools
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.feature_checks import Check, NotShownError, holds
from benchmarks.feature_rows import ROWS, row
from benchmarks.feature_sources import PREPARED, Prepared, write_text
from benchmarks.features import campaign
from core.config import check_settings, merge, parse_changes, read_settings, resolve
from distributed.commands.app import app
from distributed.sweeps.request import SweepRequest, TrainRequest
from distributed.sweeps.resolve import choices_of, chosen_task, with_first_stage
from search_spaces import load_space

REQUIRED = {
    "A": """
        MRE loader: stiffness, dr, T1, metadata
        OpenBHB loader joined on id
        train-fitted global or per-volume non-zero z-score
        seeded k-fold; stratified/grouped options
        trial × fold runner with aggregation
        V-view wrapper
        random/centre crop + pad to input shape
        cutout
        Gaussian noise
        3-D ResNet-18/34/50/101
        MLP or linear projection head
        encoder/projection read-out
        supcon with age bins; SimCLR fallback
        y-aware
        threshold (intended + reference)
        expw (offset switch)
        rbf, gaussian, cauchy kernels
        anchor/pooled normaliser
        neighbour mask: cosine, L1, L2, L∞
        dynamic k schedule
        Rank-N-Contrast; L1/MSE baselines
        Adam/SGD; step/cosine/warm-up
        AMP, clipping, checkpoint, resume
        initialise from pre-training
        ridge probe, MAE
        site BAcc and L_c
        YAML launcher with overrides
        stand-alone evaluator; optional tracking""",
    "B": """
        NIfTI I/O, mask z-score
        centre-preserving resample by spacing and size
        slice viewer, cohort plots
        anisotropic 3-D ResUNet
        3-D ResNeXt-50–200, shortcut A/B
        cross-entropy segmentation trainer
        per-class Dice, box plots
        save predictions with geometry
        absolute/relative tissue volumes
        linear, Bayesian, polynomial regressors
        direct CNN regression
        CV + hold-out report, six metrics, scatter""",
    "C": """
        fold JSON reader with leak check
        midline alignment hook
        mirrored crop sampler (patch/whole, labels)
        modality intensity presets
        quarter-turn rotation task
        patch drop/swap inpainting task
        NT-Xent task
        symmetry losses: BCE, siamese, group, margin
        task weights/switches
        3-D Swin, gradient checkpointing
        SACA block
        plain and SACA classifiers
        SwinUNETR and SACA-UNETR
        reconstruction decoders: vae, deconv, large kernel
        weighted CE, macro AUC
        soft/squared Dice, BraTS regions
        mirror-aware sliding window, label export
        per-case JSON; embedding/zero-shot export
        warm-up cosine by epoch/step; poly
        partial state loading
        multi-GPU, caching datasets""",
    "D": """
        multi-contrast loading, stretch, crop
        PCA–TV–k-means constraint maps
        HDF5 writer/reader
        patch-majority targets, foreground anchors
        2-D GroupNorm U-Net
        partial/full decoder, dense and global heads
        warm start, named transfer, encoder freeze
        CCL pairwise and set-wise
        SimCLR; anatomical negatives; partition sampler
        plateau schedule, CSV log, config dump
        Tversky fine-tuning
        paired affine augmentation
        label-budget curves""",
    "all": """
        conditional hyper-parameter search""",
}
"""Section F of the specification."""
COMMANDS = {str(row.made): row.command for row in ROWS} | {
    place: prepared.make for place, prepared in PREPARED.items() if isinstance(prepared.make, str)
}
"""By what they make."""


@pytest.fixture
def campaign_folder(tmp_path, monkeypatch):
    """The folder of a campaign with the files that its user wrote."""
    monkeypatch.chdir(tmp_path)
    for place, prepared in PREPARED.items():
        if place.startswith("files/") and not prepared.needs:
            prepared.make(Path(place))
    return tmp_path


def options_of(command):
    """What the command line understands, by the names of the parameters; it raises for an unknown option."""
    name, *words = shlex.split(command)
    return typer.main.get_command(app).commands[name].make_context(name, words).params


def test_the_rows_are_the_required_features_in_their_order():
    named = [(row.system, row.feature) for row in ROWS]
    assert named == [
        (system, line.strip()) for system, text in REQUIRED.items() for line in text.strip().splitlines()
    ]
    assert len(named) == 75


def test_what_rows_make_is_made_once():
    assert len({row.made for row in ROWS} | set(map(Path, PREPARED))) == len(ROWS) + len(PREPARED)


@pytest.mark.parametrize("made", COMMANDS)
def test_the_command_line_takes_every_command(campaign_folder, made):
    command = COMMANDS[made]
    given = options_of(command)
    if command.split()[0] not in ("train", "sweep"):
        return
    changes = parse_changes(given["changes"] or [])
    if command.startswith("train"):
        request = TrainRequest(
            **{name: given[name] for name in ("task", "space", "settings")}, changes=changes
        )
        choices, file = {}, request.settings
    else:
        choose = tuple(given["choose"] or ())
        request = SweepRequest(task=given["task"], space=given["space"], choose=choose, changes=changes)
        choices, file = choices_of(request), None
    published = load_space(request.space_name)[1] if file is None else read_settings(file)
    for values in itertools.product(*choices.values()):
        asked = chosen_task(request.task) | changes | dict(zip(choices, values, strict=True))
        check_settings(resolve(merge(with_first_stage(published, asked), asked)))


def has_words(made):
    """The file holds words."""
    return made.read_text()


@pytest.fixture
def two_rows(tmp_path, monkeypatch):
    """Two rows, of which the second one needs what the first one makes, and the checks that ran."""
    monkeypatch.chdir(tmp_path)
    return (
        row("A", "first", "train cohort --out runs/first", holds(has_words)),
        row(
            "B",
            "second",
            "predict runs/first scan --out second",
            holds(has_words, "runs/first"),
            lacks="a GPU",
        ),
    )


def writer(text, commands):
    """A command line that writes `text` into what it makes."""

    def run(command, log):
        commands.append(command)
        made = Path(command.split()[-1])
        made.parent.mkdir(exist_ok=True)
        made.write_text(text)

    return run


def test_rows_that_pass_are_not_run_again(two_rows, capsys):
    commands = []
    assert campaign(two_rows, writer("words", commands)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "A    1/2  first  ok", "B    2/2  second  ok", "           a GPU", "2 of 2",
    ]  # fmt: skip
    assert campaign(two_rows, writer("", commands)) == 0
    assert commands == [row.command for row in two_rows]
    Path("second").write_text("")
    assert campaign(two_rows, writer("words", commands)) == 0
    assert commands[2:] == [two_rows[1].command]


def test_one_row_makes_what_it_needs(two_rows, capsys):
    commands = []
    assert campaign(two_rows, writer("words", commands), only="second") == 0
    assert commands == [row.command for row in two_rows]
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1"


def test_what_is_prepared_is_made_once_and_anew_if_it_was_stopped_on_the_way(two_rows, monkeypatch):
    words = "train cohort --out runs/shared"
    monkeypatch.setattr("benchmarks.features.PREPARED", {"runs/shared": Prepared(words)})
    rows = [
        row("A", name, f"predict runs/shared scan --out {name}", holds(has_words)) for name in ("one", "two")
    ]
    # It has no log, which is written at the end.
    Path("runs/shared").mkdir(parents=True)
    commands = []

    def run(command, log):
        writer("words", commands)(command, log)
        write_text(log, "")

    assert campaign(rows, run) == 0
    assert commands == [words, *(row.command for row in rows)]


def test_a_check_that_fails_is_counted_and_named(two_rows, capsys):
    commands = []
    Path("second").write_text("words")
    assert campaign(two_rows, writer("", commands)) == 1
    assert capsys.readouterr().out.splitlines() == [
        "A    1/2  first  FAILED: it is not so that: The file holds words.",
        "B    2/2  second  ok", "           a GPU", "1 of 2", "    not shown: first",
    ]  # fmt: skip


def test_a_command_that_fails_and_a_check_that_breaks_are_counted(two_rows, capsys):
    def run(command, log):
        raise NotShownError("error: no such cohort")

    assert campaign(two_rows, run) == 1
    assert capsys.readouterr().out.splitlines() == [
        "A    1/2  first  FAILED: error: no such cohort",
        "B    2/2  second  FAILED: runs/first, which it needs, was not made: FAILED: error: no such cohort",
        "           a GPU", "0 of 2", "    not shown: first", "    not shown: second",
    ]  # fmt: skip

    def breaks(made):
        raise KeyError("mae")

    Path("broken").write_text("")
    rows = (row("A", "broken", "train cohort --out broken", Check(breaks)),)
    assert campaign(rows, writer("", [])) == 1
    assert "A    1/1  broken  FAILED: KeyError: 'mae'" in capsys.readouterr().out


def test_a_fact_says_what_it_is_about(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(NotShownError, match="it is not so that: The file holds words"):
        holds(has_words).test(tmp_path / "empty")
