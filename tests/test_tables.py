"""Tables of a run: what is written is read back, and a spreadsheet finds nothing in them to execute."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.files.tables import ACTING, read_table, write_table

TRICKY = [
    "NA",
    "null",
    "None",
    "nan",
    "n/a",
    "",
    "007",
    "1e3",
    "True",
    "=1+1",
    "-5",
    "@x",
    "+1",
    "\t=1",
    "'x",
    "''",
    'a,"b"\nc',
]


@pytest.mark.parametrize("column", ["subject", "site", "session", "role", "method"])
def test_a_name_stays_what_it_is(tmp_path, column):
    table = pd.DataFrame({column: TRICKY, "age": np.arange(len(TRICKY)) - 3.5})
    write_table(table, tmp_path / "t.csv")
    again = read_table(tmp_path / "t.csv")
    assert list(again[column]) == TRICKY
    assert list(again["age"]) == list(table["age"])


def test_an_absent_reason_is_absent_and_none_is_a_word(tmp_path):
    table = pd.DataFrame(
        {"subject": ["a", "b", "c"], "reason": [None, "None", "NA"], "value": [np.nan, 1, -2]}
    )
    write_table(table, tmp_path / "t.csv")
    again = read_table(tmp_path / "t.csv")
    assert list(again["reason"].isna()) == [True, False, False]
    assert list(again["reason"][1:]) == ["None", "NA"]
    assert np.isnan(again["value"][0])
    assert list(again["value"][1:]) == [1, -2]


@given(
    names=st.lists(
        st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6), min_size=1
    )
)
def test_every_text_comes_back_and_no_cell_of_it_acts(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("any") / "t.csv"
    write_table(pd.DataFrame({"subject": names, "=x": names}), path)
    assert list(read_table(path)["subject"]) == names
    assert list(read_table(path, ("subject", "=x"))["=x"]) == names
    # Read as a spreadsheet reads it.
    cells = [cell for row in csv.reader(io.StringIO(path.read_text(), newline="")) for cell in row]
    assert not [cell for cell in cells if cell.startswith(ACTING)]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff\xfe\x00", "is not text"),
        (b"subject,role\na,b,c,d\n1,2,3,4,5\n", "is damaged"),
        (b'subject,"ro', "is damaged"),
        (b"subject\na\n", "has no column 'role'"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, content, what):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as refused:
        read_table(path, ("subject", "role"))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")


def test_a_table_replaces_another_in_one_step(tmp_path):
    write_table(pd.DataFrame({"a": [1]}), tmp_path / "t.csv")
    before = (tmp_path / "t.csv").open()
    write_table(pd.DataFrame({"a": [2]}), tmp_path / "t.csv")
    assert before.read() == "a\n1\n"  # a reader of the old file is not disturbed
    before.close()
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
