"""What a hostile cohort, run, store or space could still do: nothing leaves its folder, and one line says why."""

import io
import json
import re

import h5py
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from small_cohort import write_small_cohort

from core.errors import UserError
from core.files.places import check_keyless, shown
from core.files.tables import read_table, write_table
from core.run_names import CHECKPOINT, RUN_JSON
from core.volumes.cohort.description import CohortDescription
from core.volumes.cohort.hdf5 import unpack
from core.volumes.cohort.reader import Cohort
from distributed.commands.evaluating import evaluation_table
from distributed.commands.options import console
from distributed.run.assignment import read_progress
from distributed.run.folder import create_run
from distributed.run.working_copy import SCRATCH, place_of_run, refuse_taken
from distributed.search.population import read_members
from distributed.sweeps.nested import NestedSearch
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.sweep import Shared
from search_spaces.points import RefusedPointError, propose

QUIET = Console(file=io.StringIO())


@pytest.mark.parametrize("name", ["/etc/cron.d/x", "../../x", ".", "a\0b", "x" * 400])
def test_the_name_of_a_cohort_does_not_lead_out_of_the_run(tmp_path, name):
    table = evaluation_table(tmp_path, name, "../../ff")
    assert table.parent == tmp_path / "evaluations"
    assert re.fullmatch(r"[\w-][\w.-]*\.csv", table.name)
    table.parent.mkdir()
    table.write_text("")


def test_a_population_uses_no_path_that_its_file_names(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / CHECKPOINT).write_text("precious")
    assignment = {"name": "../x", "folder": str(victim), "begin": str(victim / "checkpoint-4.pt")}
    member = {"assignment": assignment, "changed": {}}
    state = tmp_path / "population.json"
    for damaged in ("{", "[]", '{"boundary": 1}', '{"boundary": 0, "members": {"0000": {}}}'):
        state.write_text(damaged)
        with pytest.raises(UserError, match=r"population\.json is damaged"):
            read_members(state, {"0000"}, lambda name: tmp_path / "trials" / name)
    state.write_text(json.dumps({"boundary": 0, "members": {"0000": member}}))
    (made,) = read_members(state, {"0000"}, lambda name: tmp_path / "trials" / name)[0].values()
    assert made.assignment["folder"] == str(tmp_path / "trials" / "0000")
    assert made.assignment["begin"] == str(tmp_path / "trials" / "victim" / "checkpoint-4.pt")
    assert (victim / CHECKPOINT).read_text() == "precious"


def test_a_sweep_of_a_nested_search_that_names_another_space_is_not_continued(tmp_path):
    """Whoever trusts the space that was typed does not trust what a file in a folder below names."""
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    request = SweepRequest(outer=2)
    parent = create_run(tmp_path / "run", "nested", request.model_dump(mode="json"), {}, cohort)
    hostile = request.model_copy(update={"space": f"{tmp_path}/evil.py:space", "outer_fold": 0})
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    create_run(parent.path / "outer-1", "sweep", hostile.model_dump(mode="json"), {}, cohort)
    search = NestedSearch(parent, request, cohort, QUIET, trusts_space=True)
    with pytest.raises(UserError, match=r"outer-1/run\.json names the space .*evil\.py"):
        search._run(search.parts[0], None, None, Shared(None, {}, {}, 1))


def test_a_working_copy_of_a_run_that_was_never_sent_is_begun_again(tmp_path, monkeypatch):
    """Killed between its first local file and the first one at the address."""
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    (tmp_path / "store").mkdir()
    run = place_of_run(f"file://{tmp_path}/store/run")
    create_run(run, "sweep", {}, {}, write_small_cohort(tmp_path / "cohort", 6))
    refuse_taken(run)
    assert run.is_dir()
    assert not (run / RUN_JSON).exists()


def test_a_folder_that_is_only_called_like_a_working_copy_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    mine = place_of_run("s3://bucket/run")
    assert place_of_run(str(mine)) == mine
    with pytest.raises(UserError, match="has the name of a working copy of s3://bucket/run"):
        place_of_run(str(tmp_path / "unpacked" / mine.name))


@pytest.mark.parametrize("column", ["link", "soft", "external", "virtual"])
def test_a_shard_reads_no_other_file(tmp_path, column):
    """Each of them shows the secret to h5py, and nothing to us."""
    secret = np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2)
    (tmp_path / "secret.bin").write_bytes(secret.tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["voxels"] = secret
    with h5py.File(tmp_path / "shard.h5", "w") as file:
        file["own"] = secret
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "voxels")
        file["soft"] = h5py.SoftLink("/own")
        file.create_dataset(
            "external", secret.shape, secret.dtype, external=[(str(tmp_path / "secret.bin"), 0, 16)]
        )
        layout = h5py.VirtualLayout(secret.shape, secret.dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "voxels", secret.shape)
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "shard.h5") as file:
        assert (file[column][:] == secret).all()
    assert (next(unpack((tmp_path / "shard.h5").open("rb"), "own", [0])) == secret[0]).all()
    with pytest.raises(OSError, match="is not stored in the file itself"):
        next(unpack((tmp_path / "shard.h5").open("rb"), column, [0]))


@pytest.mark.parametrize("shape", [[10**6] * 3, [-1, 2, 2], [0, 2, 2]])
def test_a_cohort_of_an_impossible_size_is_refused_by_its_description(tmp_path, shape):
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    about = cohort.description.model_dump(mode="json") | {"shape": shape}
    with pytest.raises(ValueError, match="shape"):
        CohortDescription.model_validate(about)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("position", "0", "'position' does not hold whole numbers"),
        ("position", 0.5, "'position' does not hold whole numbers"),
        ("age", "old", "'age' does not hold numbers"),
        ("subject", 7, "'subject' does not hold text"),
        ("shard", None, "'shard' does not hold text"),
    ],
)
def test_a_manifest_of_other_types_is_damaged(tmp_path, column, value, said):
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    cohort.manifest.assign(**{column: value}).to_parquet(tmp_path / "cohort" / "manifest.parquet")
    with pytest.raises(UserError, match=said):
        Cohort.open(tmp_path / "cohort")


def test_what_is_nested_without_end_is_damaged(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", 6)
    deep = "[" * 100_000
    (cohort.folder / "cohort.json").write_text(deep)
    with pytest.raises(UserError, match=r"cohort\.json is damaged"):
        Cohort.open(cohort.folder)
    (tmp_path / "progress.json").write_text(deep)
    with pytest.raises(UserError, match=r"progress\.json is damaged"):
        read_progress(tmp_path)
    (tmp_path / "population.json").write_text(deep)
    with pytest.raises(UserError, match=r"population\.json is damaged"):
        read_members(tmp_path / "population.json", set(), lambda name: tmp_path / name)


def test_a_table_that_lost_its_end_is_damaged(tmp_path):
    """Whatever the last byte of what is left is, except the end of a line."""
    write_table(pd.DataFrame({"subject": ["a", "b"], "predicted": [21.5, 73.25]}), tmp_path / "t.csv")
    content = (tmp_path / "t.csv").read_bytes()
    for length in range(1, len(content)):
        if content[:length].endswith(b"\n"):
            continue
        (tmp_path / "t.csv").write_bytes(content[:length])
        with pytest.raises(UserError, match="its end is missing"):
            read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["a\rb", "\rx", "x\r=1+1", "\r\n", "a\r\nb", '"\r"'])
def test_a_return_in_a_name_stays_in_it(tmp_path, name):
    table = pd.DataFrame({"subject": [name, "b"], "predicted": [21.5, 73.25]})
    write_table(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table, check_dtype=False)


def test_names_with_brackets_are_printed_as_they_are():
    with console.capture() as captured:
        console.print("left out [/b]evil and [old]", highlight=False)
    assert captured.get() == "left out [/b]evil and [old]\n"


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError


def raising(error):
    def space(trial):
        raise error

    return space


@pytest.mark.parametrize(
    "space",
    [raising(UserError("no")), raising(SystemExit(3)), raising(Speechless()), lambda trial: {1: 2}],
)
def test_whatever_the_function_of_a_space_does_is_a_refused_point(space):
    with pytest.raises(RefusedPointError, match="the space"):
        propose(space, None)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        '{"history": 5, "cells": [], "answer": null}',
        '{"history": [], "cells": null, "answer": 3}',
        '{"history": [1], "cells": [], "answer": null}',
        '{"history": [], "cells": ["a"], "answer": null}',
    ],
)
def test_a_progress_of_another_shape_is_damaged(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_progress(tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA%3ASECRET@bucket/c",
        "s3://AKIA@bucket/c",
        "s3://bucket/c?pwd=SECRET",
        "s3://bucket/c?sas=SECRET",
        "s3://bucket/c?auth=SECRET",
        "s3://bucket/c?s%65cret_k%65y=SECRET",
        "s3://bucket/c?endpoint_override=AKIA:SECRET@host",
        "s3://bucket/c#secret_key=SECRET",
        "s3://AKIA:SE?CRET@bucket/c",
    ],
)
def test_keys_in_disguise_are_keys(address):
    with pytest.raises(UserError, match="must not contain keys"):
        check_keyless(address)
    assert "CRET" not in shown(address)
    assert shown(address) in ("s3://bucket/c", "s3://host")


@pytest.mark.parametrize(
    "address", ["abfs://container@account/x?credential_kind=default", "abfs://c@a/x?blob_storage_authority=h"]
)
def test_options_that_only_sound_like_keys_are_options(address):
    check_keyless(address)
