"""The seam is real: a task that lives only in tests/ goes through every command, and distributed/ knows no task."""

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import optuna
import pandas as pd
import pytest
from process_helpers import kill_when, run, start, study_of

from core.errors import UserError
from core.tasks import find_task
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from distributed.run.assignment import read_progress
from search_spaces import load_space

HERE, SIDE = Path(__file__).parent, 12
WORDS = re.compile(r"\b(age|ages|mae|years|probe|probes|ridge)\b", re.IGNORECASE)


def cohort_of_sides(folder, subjects=24):
    """Balls of which one half is brighter, without ages; the last two people have no known side."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid, axis=0) < 0.8
    writer = CohortWriter(
        folder, name="sides", channels=("T1w",), shape=(SIDE,) * 3, spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="test", synthetic=True,
    )  # fmt: skip
    with writer:
        for index in range(subjects):
            side = index % 2
            bright = 1 + 0.3 * (grid[0] > 0 if side else grid[0] < 0)
            volume = ball * (bright + generator.normal(0, 0.05, ball.shape))
            known = float(side) if index < subjects - 2 else float("nan")
            writer.add(
                volume[None].astype(np.float32),
                subject=f"sub-{index:03d}",
                age=float("nan"),
                side=known,
            )
    return Cohort.open(folder)


def lines_with_words_of_a_task(folder: Path):
    """The lines of code, comments and docstrings that name what only one task has; options and helps of users aside."""
    for path in sorted(folder.rglob("*.py")):
        if path.name in ("cohorts.py", "app.py", "using.py", "request.py"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            # The median rule of Ray, and years in a date, are none of brain age.
            if WORDS.search(line.replace("for years", "").replace("--age", "")):
                yield f"{path.relative_to(folder)}:{number}: {line.strip()}"


def test_distributed_names_nothing_of_one_task():
    assert list(lines_with_words_of_a_task(HERE.parent / "distributed")) == []


def test_a_task_is_found_by_its_name_its_file_or_refused(tmp_path):
    own = find_task(f"{HERE / 'own_task.py'}:BrighterSide")
    assert own.about.name == "brighter_side"
    for name, told in (
        ("brain_ages", "did you mean 'brain_age'"),
        (f"{HERE / 'own_task.py'}:BrighterSides", "did you mean 'BrighterSide'"),
        (f"{HERE / 'own_task.py'}:SideSettings", "and a task is a core.tasks.task.Task"),
        (f"{tmp_path}/none.py:Mine", "no file"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            find_task(name)


def test_a_task_of_an_installed_package_is_found_and_trained_by_its_name(tmp_path, monkeypatch, brainsweep):
    """The package is a folder on the path with the metadata that pip writes."""
    (tmp_path / "sides-1.dist-info").mkdir()
    (tmp_path / "sides-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sides\nVersion: 1\n"
    )
    (tmp_path / "sides-1.dist-info" / "entry_points.txt").write_text(
        "[brainsweep.tasks]\nsides = sides_task:BrighterSide\n"
    )
    shutil.copy(HERE / "own_task.py", tmp_path / "sides_task.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_task("sides").about.name == "brighter_side"
    space, base = load_space("sides")
    assert {"network.slope", "optimiser.learning_rate"} == set(space(optuna.trial.FixedTrial(
        {"network.slope": 1.0, "optimiser.learning_rate": 1e-4}
    )))  # fmt: skip
    assert base == {"task": "sides"}
    cohort = cohort_of_sides(tmp_path / "cohort")
    code, out, err = brainsweep(
        "train",
        cohort.folder,
        "--task",
        "sides",
        "--folds",
        2,
        "--out",
        tmp_path / "run",
        "--set",
        "training.epochs=1",
    )
    assert code == 0, err
    assert "accuracy" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_of_a_file_goes_through_sweep_kill_resume_report_evaluate_and_predict(tmp_path):
    cohort = cohort_of_sides(tmp_path / "cohort")
    shutil.copy(HERE / "own_task.py", tmp_path / "own_task.py")
    asked = (
        "sweep", "cohort", "--task", "own_task.py:BrighterSide", "--trials", 4, "--folds", 2, "--slots", 1,
        "--out", "run", "--scheduler", "none", "--set", "training.epochs=6", "--set", "training.batch_size=4",
        "--set", "optimiser.warmup=0.1", "--set", "kind=linear",
    )  # fmt: skip
    mark = "own-task"
    sweep = start(*asked, cwd=tmp_path, mark=mark)
    folder = tmp_path / "run"
    kill_when(lambda: len(read_progress(folder / "trials" / "0001")["history"]) >= 2, sweep, mark)
    first = study_of(folder).get_trials()[0]
    assert first.values is not None

    original = (tmp_path / "own_task.py").read_text()
    (tmp_path / "own_task.py").write_text(original + "\n# changed\n")
    refused = run("resume", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "it has changed since the run began" in refused.stderr
    (tmp_path / "own_task.py").write_text(original)

    done = run("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "high is better" in " ".join(done.stdout.split())
    study = study_of(folder)
    trials = study.get_trials()
    assert (trials[0].values, trials[0].datetime_complete) == (first.values, first.datetime_complete)
    about = json.loads((folder / "run.json").read_text())
    best = max(trial.values[0] for trial in trials if trial.values)
    assert about["best"]["value"] == best
    splits = pd.read_csv(folder / "splits.csv")
    held_out = set(splits.loc[splits["role"] == "holdout", "subject"])
    predicted = pd.read_csv(folder / "predictions.csv")
    known = set(cohort.manifest.loc[cohort.manifest["side"].notna(), "subject"])
    assert set(predicted["subject"]) == held_out & known
    assert set(predicted["method"]) == {"search winner", "published"}

    page = run("report", "run", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    text = (folder / "report.html").read_text()
    assert "Held-out accuracy of the search winner" in text
    assert not re.search(r"\byears\b|brain-age|\bMAE\b", text)

    judged = run("evaluate", "run", "cohort", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert re.search(r"accuracy\s+\d", judged.stdout)

    affine = np.diag([-4.0, 4.0, 8.0, 1.0])
    affine[:3, 3] = (50, -40, -40)
    scan = np.zeros((24, 24, 12), dtype=np.float32)
    scan[4:20, 4:20, 2:10] = 1
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "own.nii.gz")
    made = run("predict", "run", "own.nii.gz", "--out", "maps", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    made = nib.load(tmp_path / "maps" / "own_inside.nii.gz")
    # On the scan's own voxels, which are finer than the grid and run from right to left.
    np.testing.assert_array_equal(made.affine, affine)
    assert made.shape == scan.shape
    classes = np.asarray(made.dataobj)
    assert set(np.unique(classes)) == {0, 1}
    inside = scan[6:18, 6:18, 3:9] > 0
    assert (classes[6:18, 6:18, 3:9] == inside).mean() > 0.95
    assert classes[0].max() == 0
    # The file that the model names is executed by predict, too.
    (tmp_path / "own_task.py").write_text(original + "\n# changed\n")
    refused = run("predict", "run", "own.nii.gz", cwd=tmp_path)
    assert (refused.returncode, "it has changed" in refused.stderr) == (2, True)
