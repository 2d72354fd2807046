from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.verify import Damage, verify
from core.volumes.cohort.writer import CohortWriter

SHAPE = (5, 6, 4)


def write(folder: Path, count: int = 5, **settings) -> Path:
    generator = np.random.default_rng(0)
    writer = CohortWriter(
        folder, name="tiny", channels=["T1w"], shape=SHAPE, spacing=4.0, affine=np.eye(4), maps=["label"],
        volumes_per_shard=3, **settings,
    )  # fmt: skip
    with writer:
        for number in range(count):
            writer.add(
                generator.normal(size=(1, *SHAPE)), subject=f"sub-{number}", age=30, site="A",
                maps={"label": generator.integers(0, 4, SHAPE)},
            )  # fmt: skip
    return folder


KINDS = [
    {"storage": "hdf5"},
    {"storage": "parquet"},
    {"storage": "hdf5", "compression": "blosc"},
    {"storage": "parquet", "compression": "zstd"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_every_flipped_byte_is_found(tmp_path, kind):
    folder = write(tmp_path / "c", **kind)
    assert verify(folder) == []
    generator = np.random.default_rng(1)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        places = {0, len(content) - 1, *generator.integers(0, len(content), 25).tolist()}
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(generator.integers(0, 8))
            path.write_bytes(flipped)
            try:
                found = {damage.file for damage in verify(folder)}
            except UserError as error:  # a flipped digit of the format's number makes it another version
                assert "has format" in str(error)  # noqa: PT017
                found = {name}
            assert name in found, (name, place)
        path.write_bytes(content[:-1])
        assert [damage.file for damage in verify(folder)][:1] == [name]
        path.write_bytes(content)
    assert verify(folder) == []


@pytest.mark.parametrize("what", ["volumes", "labels"])
def test_the_subject_of_a_damaged_volume_is_named(tmp_path, what):
    folder = write(tmp_path / "c")
    manifest = Cohort.open(folder).manifest
    offset = int(manifest["offset" if what == "volumes" else "map_label_offset"][4])
    path = folder / "shards" / "00001.h5"
    content = bytearray(path.read_bytes())
    content[offset + 7] ^= 4
    path.write_bytes(content)
    (damage,) = verify(folder)
    assert (damage.file, damage.row, damage.subject) == ("shards/00001.h5", 4, "sub-4")
    assert "checksum" in damage.reason


def test_damage_outside_any_volume_is_the_shards_own(tmp_path):
    folder = write(tmp_path / "c")
    path = folder / "shards" / "00000.h5"
    path.write_bytes(path.read_bytes() + b"x")
    assert verify(folder) == [Damage("shards/00000.h5", None, "", "it does not match its sha256")]


def test_what_is_missing_or_not_of_the_cohort(tmp_path):
    folder = write(tmp_path / "c")
    (folder / "quality.html").write_text("a page about it")
    assert verify(folder) == []
    (folder / "shards" / "00001.h5").unlink()
    assert [(damage.row, damage.subject) for damage in verify(folder)] == [(3, "sub-3"), (4, "sub-4")]
    assert all("the file is missing" in damage.reason for damage in verify(folder))
    (folder / "manifest.parquet").unlink()
    assert {damage.file for damage in verify(folder)} == {"manifest.parquet", "shards/00001.h5"}
    (folder / "cohort.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        verify(folder)


def test_an_edited_description_is_found(tmp_path):
    folder = write(tmp_path / "c")
    path = folder / "cohort.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "synthetic": True}, indent=2) + "\n")
    assert [damage.file for damage in verify(folder)] == ["cohort.json"]


def test_progress_counts_files(tmp_path):
    steps = []
    verify(write(tmp_path / "c"), on_progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
