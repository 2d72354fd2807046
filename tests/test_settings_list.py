"""The list of settings: complete, as the types have it, and found by the names that people use."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.config import flatten, known_names, resolve
from core.errors import UserError
from core.settings_list import SYNONYMS, list_settings, similar_settings
from core.tasks import TASKS
from distributed.commands.settings import as_page, in_words, searched_by, settings_about
from search_spaces import SPACES, published

ROOT = Path(__file__).parents[1]


def test_every_setting_of_every_published_configuration_is_listed():
    listed = {setting.name for setting in list_settings()}
    for space in SPACES:
        given = published(space) | ({"data": {"target": "group"}} if "classif" in space else {})
        for name in flatten(resolve(given).model_dump(mode="json")):
            # A block that is off is listed by what chooses it, and a schedule without the fields of its shapes.
            known = {name, f"{name}.name", f"{name}.shape"} & listed
            assert name == "task" or known or any(name.startswith(f"{each}.") for each in listed), name
    assert listed - {"pretraining"} <= known_names(None)


def test_defaults_ranges_and_choices_are_those_of_the_types():
    found = {(setting.name, setting.choices[:1]): setting for setting in list_settings()}
    alpha = found["objective.alpha", ("tversky",)]
    assert (alpha.default, alpha.values) == ("0.3", "number above 0 and below 1")
    assert found["training.keep", ()].values == "last, best"
    assert found["views.crop_size", ()].values == "whole number or list at least 1 and at most 1024, none"
    assert found["optimiser.decay", ()].values == "number, a schedule"
    assert found["optimiser.momentum", ("sgd",)].default == "0.9"
    assert found["optimiser.plateau", ()].default == "none"
    assert found["training.epochs", ()].tasks == tuple(TASKS)
    assert all(setting.meaning and setting.default and setting.values for setting in found.values())


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("lr", "optimiser.learning_rate"), ("optimiser.lr", "optimiser.learning_rate"),
        ("training.lr", "optimiser.learning_rate"), ("optimizer.lr", "optimiser.learning_rate"),
        ("learning_rat", "optimiser.learning_rate"), ("tau", "objective.temperature"), ("loss", "objective.name"),
        ("training.epoch", "training.epochs"), ("views.rotation", "views.rotate"),
        ("pretraining.objective.tau", "pretraining.objective.temperature"),
    ],
)  # fmt: skip
def test_the_usual_name_leads_to_ours(typed, first):
    similar = similar_settings(typed, known_names(None))
    assert similar[0] == first
    assert len(similar) <= 5


def test_every_synonym_leads_to_a_setting():
    unknown = [word for word in SYNONYMS if not similar_settings(word, known_names(None))]
    assert unknown == []


def test_spaces_are_those_that_search():
    spaces = searched_by()
    assert {"brain_age", "contrast_segmentation"} <= set(spaces["optimiser.learning_rate"])
    assert "contrast_segmentation" in spaces["objective.alpha"]
    lines = list(in_words(settings_about("objective.alpha")))
    assert any("searched by" in line and "contrast_segmentation" in line for line in lines)


def test_the_page_is_that_of_the_code():
    page = ROOT / "docs" / "settings.md"
    if not page.exists():
        pytest.skip("the manual is not installed")
    assert page.read_text() == as_page(), "run: python docs/make_settings.py"


def test_the_command_finds_by_word_and_by_the_usual_name():
    def asked(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distributed", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )

    done = asked("settings", "lr")
    assert done.returncode == 0
    assert done.stdout.startswith("optimiser.learning_rate = 0.0001")
    refused = asked("settings", "zzz")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no setting has 'zzz'" in refused.stderr
    typed = asked("train", "nowhere", "--set", "lr=1e-3")
    assert typed.returncode == 2
    assert "did you mean 'optimiser.learning_rate'?" in typed.stderr
    with pytest.raises(UserError):
        settings_about("zzz")
