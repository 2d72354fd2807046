from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest
from fuzz_nifti import MUTATIONS, case_of, outcome_of, outcomes, prepare, read_both
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import UserError

CASES = 250


def test_mutated_files_are_volumes_or_are_refused_in_one_line():
    """In a child with little memory; tests/fuzz_nifti.py runs longer campaigns of the same cases."""
    found = list(outcomes(0, CASES))
    assert [outcome["case"] for outcome in found] == list(range(CASES))
    assert [outcome for outcome in found if outcome["fault"]] == []
    refused = sum("refused" in outcome for outcome in found)
    assert CASES / 10 < refused < 9 * CASES / 10  # both ways were taken
    tried = collections.Counter(kind for outcome in found for kind in outcome["label"].split(" + "))
    assert min(tried[kind] for kind in MUTATIONS) > 10


def test_a_reader_that_hangs_dies_or_raises_would_be_found(tmp_path):
    def broken(path):
        raise KeyError(path.name)

    def wordy(path):
        raise UserError(f"{path}\nis odd")

    case = case_of(3)
    assert "KeyError" in outcome_of(case, tmp_path, broken)["fault"]
    assert "one line" in outcome_of(case, tmp_path, wordy)["fault"]
    assert [outcome["fault"] for outcome in outcomes(0, 1, "die")] == ["ends the process with -6"]
    assert [outcome["fault"] for outcome in outcomes(0, 1, "hang", patience=0.2)] == ["hangs"]


def test_mutated_files_are_prepared_or_refused(tmp_path):
    faults = [outcome_of(case_of(number), tmp_path, prepare)["fault"] for number in range(1000, 1020)]
    assert not any(faults)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    number=st.integers(0, 10_000),
    changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=4),
    length=st.none() | st.integers(0, 700),
)
@pytest.mark.filterwarnings("ignore:Extension size")  # nibabel's own reading, beside ours
def test_files_that_hypothesis_makes_up(tmp_path, number, changes, length):
    content = bytearray(next(iter(case_of(number).files.values())))
    for start, new in changes:
        content[start : start + len(new)] = new
    path = tmp_path / "a.nii"
    path.write_bytes(content[:length])
    message = refusal(path)
    assert message is None or re.fullmatch(r"[^\n]*a\.nii[^\n]+", message)


def refusal(path: Path) -> str | None:
    """What the reader says against a file."""
    try:
        read_both(path)
    except UserError as error:
        return str(error)
    return None
