"""A request that cannot work is refused before anything is started, in one line that says why."""

import dataclasses
import errno
import os

import numpy as np
import pytest
from ray.tune import TuneError
from rich.console import Console
from small_cohort import write_small_cohort

from core.errors import UserError
from distributed.sweeps.interruption import resumable
from distributed.sweeps.request import ResumeRequest, SweepRequest, TrainRequest
from distributed.sweeps.resolve import resolve_search
from distributed.sweeps.resume import _combined, _what_changed
from distributed.sweeps.sweep import Launch, run_sweep
from distributed.sweeps.train_one import train_one

SPACE = """
def finite(trial):
    trial.suggest_categorical("views.noise", [0.0, 0.1])
    trial.suggest_categorical("model.readout", ["projection", "encoder"])
    return dict(trial.params)

def continuous(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2)
    return finite(trial)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    write_small_cohort(folder / "cohort", subjects=12)
    (folder / "mine.py").write_text(SPACE)
    return folder


@pytest.fixture
def cohort(place):
    from core.volumes.cohort.reader import Cohort

    return Cohort.open(place / "cohort")


def request(place, function="continuous", **asked):
    return SweepRequest(**{"space": f"{place}/mine.py:{function}", "folds": 2} | asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"objectives": ("mae", "maee")}, "unknown objective 'maee'; did you mean 'mae'"),
        ({"objectives": ("mae", "openbhb_score"), "sampler": "cmaes"}, "'cmaes' knows one objective and 2"),
        ({"sampler": "cmaes"}, "needs two numeric settings"),
        ({"grid_points": 3}, "--grid-points 3 acts with --sampler grid only, not tpe"),
        ({"scheduler": "hyperbannd"}, "did you mean 'hyperband'"),
        ({"pruner": "wilcoxon"}, "could never stop a trial: after 1 of 2 cells no p-value is below 0.5"),
        ({"stop_when": "regret", "objectives": ("mae", "accelerator_seconds")}, "defined for one objective"),
    ],
)
def test_what_cannot_work_is_refused(place, cohort, asked, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_search(request(place, **asked), cohort)
    assert "\n" not in str(caught.value)


def test_sites_are_needed_by_what_measures_them(place, cohort):
    cohort.manifest["site"] = "only"
    with pytest.raises(UserError, match="two sites or more; this cohort has 1"):
        resolve_search(request(place, objectives=("site_balanced_accuracy",)), cohort)


def test_a_grid_is_run_whole_or_not_at_all(place, tmp_path):
    def sweep(**asked):
        run_sweep(
            Launch(place / "cohort", request(place, **asked), tmp_path / "run", None, Console(quiet=True))
        )

    with pytest.raises(UserError, match=r"is a number from 0.0001 to 0.01; give it a step"):
        sweep(sampler="grid")
    with pytest.raises(UserError, match=r"12 points, 12 trials with those before it, and --trials is 5"):
        sweep(sampler="grid", grid_points=3, trials=5)
    assert not (tmp_path / "run").exists()  # refused before anything was written


def test_cells_of_the_search_its_confirmation_and_the_refits_share_no_seed():
    asked = SweepRequest(folds=3, seeds=2, confirm_seeds=2, refit_seeds=3)
    seeds = {
        name: {cell["seed"] for cell in getattr(asked, name)}
        for name in ("cells", "confirm_cells", "refit_cells")
    }
    assert seeds["cells"] == {0, 1}
    assert not seeds["cells"] & (seeds["confirm_cells"] | seeds["refit_cells"])
    assert [len(getattr(asked, name)) for name in ("cells", "confirm_cells", "refit_cells")] == [6, 6, 3]
    folds = [cell["fold"] for cell in asked.confirm_cells]
    assert np.bincount(folds).tolist() == [2, 2, 2]


def test_whatever_changes_the_search_is_named_and_budgets_do_not(place, cohort):
    recorded = request(place)
    searched = resolve_search(recorded, cohort).profile.as_json()

    def changed(**asked):
        now = _combined(recorded, ResumeRequest(**asked))
        return _what_changed(recorded, now, searched, resolve_search(now, cohort).profile.as_json())

    assert changed() == []
    assert changed(time_budget=5.0, accelerator_hours=2.0) == []
    assert changed(trials=30) == ["20 trials become 30"]
    assert changed(changes={"views.noise": 0.1}) == [
        "views.noise is fixed at 0.1",
        "searched differently or no longer: views.noise",
    ]
    (place / "mine.py").write_text(SPACE.replace("1e-2", "1e-1"))  # the file was edited meanwhile
    try:
        assert changed() == ["searched differently or no longer: optimiser.learning_rate"]
    finally:
        (place / "mine.py").write_text(SPACE)


def test_a_disk_that_is_full_for_a_callback_of_tune_stops_the_sweep_in_one_line(tmp_path):
    def fail(number):
        try:
            raise OSError(number, os.strerror(number))  # in TensorBoard's writer, say
        except OSError:
            raise TuneError("Traceback ...")  # noqa: B904 - as Tune does it, from nothing

    with (
        pytest.raises(UserError, match=r"stopped: No space left on device\. .* brainsweep resume"),
        resumable(tmp_path),
    ):
        fail(errno.ENOSPC)
    with pytest.raises(TuneError), resumable(tmp_path):
        fail(errno.EACCES)


@pytest.mark.parametrize(
    ("subjects", "ages", "message"),
    [
        (5, None, r"^2 folds leave 2 of 5 subjects to train on, and at least 3 are needed; use more --folds"),
        (12, 30.0, r"^all 12 subjects are 30 years old: nothing about age can be learnt from them$"),
    ],
)
def test_a_cohort_that_can_teach_nothing_is_refused_at_start(place, tmp_path, subjects, ages, message):
    cohort = write_small_cohort(tmp_path / "cohort", subjects=subjects)
    if ages is not None:
        cohort.manifest["age"] = ages
        cohort = dataclasses.replace(cohort, manifest=cohort.manifest)
    opened = pytest.MonkeyPatch()
    opened.setattr("core.volumes.cohort.reader.Cohort.open", lambda location: cohort)
    try:
        for start in (
            lambda: run_sweep(
                Launch(cohort.location, request(place), tmp_path / "run", None, Console(quiet=True))
            ),
            lambda: train_one(
                cohort.location, TrainRequest(folds=2), tmp_path / "run", None, Console(quiet=True)
            ),
        ):
            with pytest.raises(UserError, match=message):
                start()
    finally:
        opened.undo()
    # Refused before anything was written.
    assert not (tmp_path / "run").exists()


def test_a_setting_may_be_chosen_among_values_that_the_user_names():
    """A space that has the setting takes the chosen value, and does not offer its own."""
    from core.config import resolve
    from distributed.sweeps.resolve import choices_of, maps_of
    from search_spaces import published

    request = SweepRequest(
        space="contrast_pretraining", choose=("data.constraint=a-10,a-20", "features.levels=2,3")
    )
    assert choices_of(request) == {"data.constraint": ["a-10", "a-20"], "features.levels": [2, 3]}
    base = resolve(published("contrast_pretraining")).model_dump(mode="json")
    assert maps_of(request, base) == ("a-10", "a-20")
    for wrong, words in (
        ("data.constraint=a", "two values"),
        ("nothing=1,2", "unknown setting"),
        ("x", "two values"),
    ):
        with pytest.raises(UserError, match=words):
            choices_of(SweepRequest(choose=(wrong,)))
    twice = SweepRequest(choose=("features.levels=1,2",), changes={"features.levels": 3})
    with pytest.raises(UserError, match="given twice"):
        choices_of(twice)


def test_what_is_chosen_is_searched_and_begins_with_the_first_value(tmp_path):
    cohort = write_small_cohort(tmp_path / "small")
    request = SweepRequest(folds=2, choose=("model.readout=encoder,projection", "training.batch_size=8,12"))
    search = resolve_search(request, cohort)
    assert search.settings.model.readout == "encoder"
    assert search.settings.training.batch_size == 8
    assert {"model.readout", "training.batch_size"} <= set(search.profile.settings)
    drawn = {tuple(search.space(drawn_trial(search, seed))[name] for name in ("model.readout", "training.batch_size"))
             for seed in range(12)}  # fmt: skip
    assert drawn <= {(one, other) for one in ("encoder", "projection") for other in (8, 12)}
    assert len(drawn) == 4


def drawn_trial(search, seed):
    """A trial that draws at random."""
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return study.ask()
