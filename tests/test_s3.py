from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from s3_server import KEYS, s3_server

from core.errors import UserError
from core.volumes.cohort.describe import describe
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.verify import verify
from core.volumes.cohort.writer import CohortWriter

SHAPE = (5, 6, 4)
KINDS = [("hdf5", "none"), ("parquet", "none"), ("hdf5", "blosc"), ("parquet", "zstd")]


@pytest.fixture(scope="module")
def address():
    """Addresses in the bucket "brains" of an S3 server."""
    with pytest.MonkeyPatch.context() as patch, s3_server("brains") as options:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield lambda path: f"s3://{path}?{options}"


def write(folder: Path, storage: str, compression: str) -> Cohort:
    generator = np.random.default_rng(0)
    writer = CohortWriter(
        folder, name="tiny", channels=["T1w"], shape=SHAPE, spacing=4.0, affine=np.eye(4), maps=["label"],
        volumes_per_shard=2, storage=storage, compression=compression,
    )  # fmt: skip
    with writer:
        for number in range(5):
            writer.add(
                generator.normal(size=(1, *SHAPE)), subject=f"sub-{number}", age=30 + number,
                maps={"label": generator.integers(0, 4, SHAPE)},
            )  # fmt: skip
    return Cohort.open(folder)


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_a_cohort_in_a_bucket_reads_as_on_disk(tmp_path, address, storage, compression):
    local = write(tmp_path / "c", storage, compression)
    remote = local.copy_to(address(f"brains/{storage}-{compression}"))
    rows = [4, 0, 3, 3]
    np.testing.assert_array_equal(remote.read(rows), local.read(rows))
    np.testing.assert_array_equal(remote.read_stored(rows), local.read_stored(rows))
    np.testing.assert_array_equal(remote.read_map("label", rows), local.read_map("label", rows))
    assert remote.description == local.description
    assert Cohort.open(remote.address).manifest.equals(local.manifest)
    assert describe(remote)["bytes_on_disk"] == describe(local)["bytes_on_disk"]
    assert verify(remote.address) == []
    with pytest.raises(UserError, match="is not a folder of this machine"):
        _ = remote.folder


def test_damage_in_a_bucket_is_named_without_the_secret(tmp_path, address):
    local = write(tmp_path / "c", "hdf5", "none")
    shard = local.folder / "shards" / "00001.h5"
    content = bytearray(shard.read_bytes())
    content[int(local.manifest["offset"][3])] ^= 1
    shard.write_bytes(content)
    remote = local.copy_to(address("brains/damaged"))
    with pytest.raises(UserError, match=r"shards/00001\.h5, row 3, subject sub-3: its checksum") as caught:
        remote.read([3])
    assert "secret" not in str(caught.value)
    assert [(damage.row, damage.subject) for damage in verify(remote.address)] == [(3, "sub-3")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no-such-bucket/cohort", "there is no bucket 'no-such-bucket'"),
        ("brains/no-such-cohort", r"is not a cohort \(no cohort\.json\)"),
    ],
)
def test_what_is_not_there_is_one_line_without_the_secret(address, path, message):
    with pytest.raises(UserError, match=message) as caught:
        Cohort.open(address(path))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_address_of_no_known_kind():
    with pytest.raises(UserError, match=r"cannot open ftp://host/cohort"):
        Cohort.open("ftp://host/cohort")


def test_a_store_that_refuses(monkeypatch):
    from core.files import places

    monkeypatch.setattr(places, "_connected", lambda url, _: (_Refusing(), "brains/c"))
    with pytest.raises(UserError, match="access denied; set AWS_ACCESS_KEY_ID"):
        Cohort.open("s3://brains/c")


class _Refusing:
    def open_input_file(self, _: str) -> None:
        raise OSError(
            "When reading information for key 'c/cohort.json': AWS Error ACCESS_DENIED during HeadObject"
        )
