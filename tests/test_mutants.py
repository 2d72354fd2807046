"""The list of mutants is current: what each one changes is there, once, and so is the test that must notice."""

import ast
import re

import pytest

from benchmarks.mutants import MUTANTS, TREE, Mutant, mutated
from core.errors import UserError


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_what_is_there_and_its_tests_exist(mutant):
    text = mutated(mutant)
    assert text != (TREE / mutant.file).read_text()
    ast.parse(text)
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (TREE / file).read_text(), flags=re.MULTILINE), test


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) == 31


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("twice", 2)])
def test_a_text_that_is_not_there_once_is_named(tmp_path, old, times):
    (tmp_path / "code.py").write_text("twice = 'twice'\n")
    mutant = Mutant("stale", "code.py", old, "new", ("tests/test_mutants.py",))
    with pytest.raises(
        UserError, match=f"'stale': code.py holds the text '{old}' {times} times, and it must be once"
    ):
        mutated(mutant, tmp_path)
