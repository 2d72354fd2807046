"""Mutated NIfTI files against the reader, each case a pure function of its number.

A child process with little address space reads them and writes one line per case; the parent ends a child
that hangs, notes one that dies, and goes on with the next case. The default suite runs the first few hundred
cases. A campaign: `OMP_NUM_THREADS=1 nice python tests/fuzz_nifti.py --stop 40000` (see --help).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gzip
import json
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SHAPE = (6, 7, 8)
ROOM = 768 * 2**20
"""Bytes of address space that a child may use beyond what its imports took."""
EXTREMES = {
    "f": [0, -0.0, 1, -1, np.nan, np.inf, -np.inf, 1e-45, 1e-38, 3e38, -3e38, 352, 1e9, 0.5],
    "i": [
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        127,
        -128,
        255,
        256,
        4096,
        32767,
        -32768,
        2**31 - 1,
        -(2**31),
        2**62,
        -(2**63),
    ],
    "S": [b"", b"\0", b"n+1\0", b"ni1\0", b"n+2\0", b"\xff\xfe\xfd", b"\n\n\n", b"n+1\n"],
}
NAMES = [
    "a.nii",
    "a.nii.gz",
    "a.nii",
    "a.nii.gz",
    "a.NII",
    "a.nii.GZ",
    "a.hdr",
    "a.img",
    "a.nii.bz2",
    "a.mgz",
    "a",
]


# --- what is mutated -----------------------------------------------------------------------------------------


def intact(rng: np.random.Generator) -> bytes:
    """An uncompressed file: either version, byte order and any type, geometry and extensions of several kinds."""
    kind = (nib.Nifti1Image, nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image)[rng.integers(4)]
    dtype = np.dtype(str(rng.choice(["u1", "i1", "i2", "u2", "i4", "i8", "f4", "f8"])))
    header = kind.header_class(endianness=str(rng.choice(["<", ">"])))
    header.set_data_dtype(dtype)
    affine = np.diag([*rng.uniform(0.5, 3, 3), 1]) + np.pad(
        rng.normal(scale=0.1, size=(3, 4)), ((0, 1), (0, 0))
    )
    image = kind(rng.integers(0, 100, SHAPE).astype(dtype), affine, header)
    if rng.random() < 0.5:
        image.set_qform(affine, int(rng.integers(0, 5)), strip_shears=True)
        image.set_sform(affine, int(rng.integers(0, 2)))
    if dtype.kind != "f" and rng.random() < 0.3:
        image.header.set_slope_inter(0.5, 3)
    for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.3 else 0):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * int(rng.integers(1, 90))))
    return image.to_bytes()


@functools.cache
def real_files() -> list[Path]:
    """Scans of ../shared/data, the smaller ones; none where there is no such folder."""
    return sorted(path for path in DATA.rglob("*.nii.gz") if path.stat().st_size < 400_000)[::5]


def with_real_header(rng: np.random.Generator) -> bytes:
    """The header of a real scan with its sides cut to a few voxels, and as many values."""
    files = real_files()
    if not files:
        return intact(rng)
    with gzip.open(files[rng.integers(len(files))]) as stream:
        content = bytearray(stream.read(352))
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    header["dim"][1:4] = SHAPE
    values = rng.integers(0, 100, SHAPE).astype(header.get_data_dtype())
    offset = int(header["vox_offset"])
    return header.binaryblock + bytes(content[348:352]) + bytes(max(0, offset - 352)) + values.tobytes()


def template_of(content: bytes) -> tuple[np.dtype[Any], str]:
    """The fields of a file's header, and its byte order."""
    order = "<" if content[0] in (92, 28) else ">"  # 348 or 540
    header = nib.Nifti1Header if 92 in content[:4] else nib.Nifti2Header
    return header.template_dtype.newbyteorder(order), order


# --- how ----------------------------------------------------------------------------------------------------


def set_fields(content: bytearray, rng: np.random.Generator) -> None:
    """One to three fields, or one of their elements, become extreme."""
    fields, _ = template_of(content)
    header = np.frombuffer(content, fields, 1).copy()
    for name in rng.choice(fields.names, int(rng.integers(1, 4)), replace=False):
        extremes = EXTREMES[fields[name].base.kind if fields[name].base.kind != "u" else "i"]
        value = extremes[rng.integers(len(extremes))]
        element = header[name][0]
        with np.errstate(all="ignore"):
            if fields[name].base.kind in "iu":
                low, high = np.iinfo(fields[name].base).min, np.iinfo(fields[name].base).max
                value = min(max(int(value), low), high)
            if np.ndim(element) and rng.random() < 0.8:
                header[name][0][rng.integers(len(element))] = value
            else:
                header[name][0] = value
    content[: header.nbytes] = header.tobytes()


def forge_shape(content: bytearray, rng: np.random.Generator) -> None:
    """Sides are huge, negative or nothing, and there are more or fewer of them."""
    fields, _ = template_of(content)
    header = np.frombuffer(content, fields, 1).copy()
    limit = np.iinfo(fields["dim"].base).max
    sides = [
        0,
        1,
        2,
        -1,
        -limit - 1,
        limit,
        limit // 2,
        1000,
        4096,
        30_000,
        46_341,
        65_536,
        2**21,
        2**31,
        2**40,
    ]
    header["dim"][0] = [
        int(rng.integers(-2, 10)) if rng.random() < 0.5 else 3,
        *(min(int(side), limit) for side in rng.choice(sides, 7)),
    ]
    if rng.random() < 0.5:
        header["dim"][0][4:] = 1
    content[: header.nbytes] = header.tobytes()


def forge_type(content: bytearray, rng: np.random.Generator) -> None:
    """Any datatype code from 0 to 2304, with its own number of bits or not."""
    fields, _ = template_of(content)
    header = np.frombuffer(content, fields, 1).copy()
    known = [0, 1, 2, 4, 8, 16, 32, 64, 128, 255, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304]
    header["datatype"] = rng.integers(0, 2305) if rng.random() < 0.5 else rng.choice(known)
    if rng.random() < 0.5:
        header["bitpix"] = rng.choice([0, 1, 8, 16, 24, 32, 64, 96, 128, 192, 256, -8])
    content[: header.nbytes] = header.tobytes()


def forge_geometry(content: bytearray, rng: np.random.Generator) -> None:
    """Garbage in the quaternion, the matrix, the voxel sizes and which of them count."""
    fields, _ = template_of(content)
    header = np.frombuffer(content, fields, 1).copy()
    header["qform_code"], header["sform_code"] = rng.integers(-1, 6), rng.integers(-1, 6)
    names = ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "pixdim"]
    with np.errstate(all="ignore"):
        for name in rng.choice(names, int(rng.integers(1, 5)), replace=False):
            values = header[name].reshape(-1)
            values[rng.integers(values.size)] = rng.choice(
                [*EXTREMES["f"], rng.normal(), rng.normal() * 1e20]
            )
    content[: header.nbytes] = header.tobytes()


def forge_offset(content: bytearray, rng: np.random.Generator) -> None:
    """The voxels begin before the file, inside the header, beyond the end, or nowhere."""
    fields, _ = template_of(content)
    header = np.frombuffer(content, fields, 1).copy()
    offsets = [
        0,
        1,
        16,
        347,
        348,
        351,
        352,
        353,
        360,
        540,
        544,
        1000,
        -1,
        -352,
        2**24 + 1,
        2**31,
        2**53,
        2**62,
    ]
    if fields["vox_offset"].kind == "f":
        offsets += [np.nan, np.inf, -np.inf, 352.5, 1e30, -1e30]
    header["vox_offset"] = np.array(offsets)[rng.integers(len(offsets))].astype(fields["vox_offset"])
    header["magic"] = rng.choice([header["magic"][0], b"n+1\0", b"ni1\0", b"n+2\0"])
    content[: header.nbytes] = header.tobytes()


def forge_extensions(content: bytearray, rng: np.random.Generator) -> None:
    """A chain of extensions whose sizes are wrong, huge, nothing, or lead nowhere."""
    fields, order = template_of(content)
    size = fields.itemsize
    sizes = [0, 1, 7, 8, 15, 16, 32, 48, -16, -1, 2**31 - 1, -(2**31), 2**24]
    chain = bytearray(b"\1\0\0\0")
    for _ in range(int(rng.choice([1, 2, 5, 5000]))):
        esize = int(rng.choice(sizes))
        chain += np.array([esize, rng.integers(-3, 60)], f"{order}i4").tobytes()
        chain += bytes(max(0, min(esize - 8, 64)))
    header = np.frombuffer(content, fields, 1).copy()
    if rng.random() < 0.7:
        header["vox_offset"] = -(-(size + len(chain)) // 16) * 16 + int(rng.choice([0, 0, 16, 4096, 2**20]))
    content[: header.nbytes] = header.tobytes()
    content[size : size + 4] = chain


def flip_bytes(content: bytearray, rng: np.random.Generator) -> None:
    """Random bytes of the header, or of all."""
    end = len(content) if rng.random() < 0.2 else min(len(content), 360)
    for position in rng.integers(0, end, int(rng.integers(1, 12))):
        content[position] = rng.integers(256)


def flip_bits(content: bytearray, rng: np.random.Generator) -> None:
    """A few bits of the header."""
    for position in rng.integers(0, min(len(content), 360), int(rng.integers(1, 4))):
        content[position] ^= 1 << int(rng.integers(8))


def swap_order(content: bytearray, rng: np.random.Generator) -> None:
    """Some fields have the other byte order, so that the header contradicts itself."""
    fields, _ = template_of(content)
    for name in rng.choice(fields.names, int(rng.integers(1, len(fields.names))), replace=False):
        field, start = fields[name], fields.fields[name][1]  # type: ignore[index]
        values = np.frombuffer(content, field.base, int(np.prod(field.shape, dtype=int)), start)
        if field.base.kind in "iuf":
            content[start : start + field.itemsize] = values.byteswap().tobytes()


def cut(content: bytearray, rng: np.random.Generator) -> None:
    """The file ends early, or goes on."""
    if rng.random() < 0.7:
        del content[int(rng.integers(len(content) + 1)) :]
    else:
        content += rng.bytes(int(rng.choice([1, 16, 1000, 100_000])))


def nonsense(content: bytearray, rng: np.random.Generator) -> None:
    """Nothing of a NIfTI file."""
    size = int(rng.choice([0, 1, 4, 347, 348, 352, 540, 1000]))
    content[:] = rng.choice(
        [b"", rng.bytes(size), b"\n" * size, b"\0" * size, b"\x5c\1\0\0" + rng.bytes(size)]
    )


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "fields": set_fields, "shape": forge_shape, "type": forge_type, "geometry": forge_geometry,
    "offset": forge_offset, "extensions": forge_extensions, "bytes": flip_bytes, "bits": flip_bits,
    "order": swap_order, "cut": cut, "nonsense": nonsense,
}  # fmt: skip


@functools.cache
def bomb() -> bytes:
    """A small gzip stream of 60 MB."""
    return gzip.compress(bytes(60_000_000), 1, mtime=0)


def damage_stream(packed: bytearray, rng: np.random.Generator) -> str:
    """One thing wrong with a gzip stream, or nothing; returns what."""
    what = str(
        rng.choice(["whole"] * 5 + ["cut", "flipped", "trailing", "members", "flags", "bomb", "length"])
    )
    if what == "cut":
        del packed[int(rng.integers(len(packed))) :]
    elif what == "flipped":
        for position in rng.integers(0, len(packed), int(rng.integers(1, 4))):
            packed[position] ^= 1 << int(rng.integers(8))
    elif what == "trailing":
        packed += rng.choice([b"\0" * 40, rng.bytes(40), b"\x1f\x8b", b"\x1f\x8b\x08\0"])
    elif what == "members":
        packed += gzip.compress(rng.bytes(int(rng.choice([0, 1, 5000]))), mtime=0) * int(
            rng.choice([1, 2000])
        )
    elif what == "flags":
        packed[3] = int(rng.integers(256))
    elif what == "bomb":
        packed += bomb()
    elif what == "length":
        packed[-8:] = rng.bytes(8)
    return what


@dataclass(frozen=True)
class Case:
    """One mutated file."""

    label: str
    files: dict[str, bytes]
    """Name: content; the first is read."""


def case_of(number: int) -> Case:
    """The mutation of this number: the same in every process."""
    rng = np.random.default_rng((20_26, number))
    name = str(NAMES[rng.integers(len(NAMES))] if rng.random() < 0.3 else NAMES[rng.integers(2)])
    if rng.random() < 0.02 and (files := real_files()):  # whole real scans are slow: fewer of them
        packed = bytearray(files[rng.integers(len(files))].read_bytes())
        return Case(f"real scan, {damage_stream(packed, rng)}", {"a.nii.gz": bytes(packed)})
    content = bytearray(intact(rng) if rng.random() < 0.6 else with_real_header(rng))
    kinds = [str(kind) for kind in rng.choice(list(MUTATIONS), 1 if rng.random() < 0.7 else 2, replace=False)]
    for kind in sorted(kinds, key=["nonsense", "cut"].count):  # others need a whole header
        MUTATIONS[kind](content, rng)
    packed = bytearray(gzip.compress(bytes(content), 1, mtime=0))
    stream = ""
    is_packed = name.lower().endswith("gz") != (rng.random() < 0.03)
    if is_packed:
        stream = damage_stream(packed, rng)
    files = {name: bytes(packed if is_packed else content)}
    if name in ("a.hdr", "a.img"):
        files["a.img" if name == "a.hdr" else "a.hdr"] = bytes(
            content[352:] if name == "a.hdr" else content[:348]
        )
    return Case(" + ".join([*kinds, stream] if stream else kinds), files)


# --- the child ------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    """This process may take ROOM bytes more of address space, and no core files."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def outcome_of(case: Case, folder: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """What reading the case gave; "fault" says what is wrong with that, if anything."""
    from core.errors import UserError

    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    path = folder / next(iter(case.files))
    try:
        read(path)
    except UserError as error:
        message = str(error)
        fault = ""
        if "\n" in message or len(message) > 600 or not message.isprintable():
            fault = "message is not one line for people"
        elif str(path) not in message:
            fault = "message does not name the file"
        elif isinstance(error.__cause__, MemoryError):
            fault = "ran out of memory"
        return {
            "refused": re.sub(r"\d+|'.*'", "#", message.replace(str(folder), ""))[:90],
            "fault": fault,
            "message": message,
        }
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"[:300]}
    finally:
        for name in case.files:
            (folder / name).unlink()
    return {"fault": ""}


def read_both(path: Path) -> None:
    """`read_volume` and `read_geometry`, and whether they give a volume, and nibabel the same one if it can."""
    from core.errors import UserError
    from core.volumes.images.nifti import read_geometry, read_volume

    try:
        shape, _ = read_geometry(path)
    except UserError as error:
        with contextlib.suppress(UserError):
            read_volume(path)
            raise AssertionError(f"a volume whose geometry is refused: {error}") from None
        raise
    voxels, affine = read_volume(path)
    check_volume(voxels, affine)
    if sorted(shape) != sorted(voxels.shape):
        raise AssertionError(f"shape {shape} became {voxels.shape}")
    try:
        image = nib.load(path, mmap=False)
        if not isinstance(image, nib.Nifti1Image):  # a name that makes it look for a pair
            return
        image = nib.as_closest_canonical(image)
        theirs = image.get_fdata(dtype=np.float32).reshape(voxels.shape)
    except Exception:  # nibabel goes by names, and by extensions of headers
        return
    if not (np.array_equal(voxels, theirs) and np.array_equal(affine, image.affine)):
        raise AssertionError("other voxels or another affine than nibabel's")


def check_volume(voxels: np.ndarray, affine: np.ndarray) -> None:
    """Raise AssertionError unless this is one usable volume."""
    if not (voxels.ndim == 3 and voxels.dtype == np.float32 and np.isfinite(voxels).all()):
        raise AssertionError(f"not a volume: {voxels.dtype} {voxels.shape}")
    if voxels.min() == voxels.max() or not np.isfinite(np.linalg.inv(affine)).all():
        raise AssertionError("constant, or without a place")


def prepare(path: Path, **settings: Any) -> None:
    """`prepare_scan` of the file as an image, then as its label map too, and whether it keeps its promises."""
    from core.volumes.images.preprocess import Preprocessing
    from core.volumes.ingest.prepare import prepare_scan
    from core.volumes.sources.listing import ImageFile, Scan

    chosen = settings or {"spacing": 2, "shape": (12, 12, 12), "centre": "brain"}
    pipeline = Preprocessing.model_validate(chosen)
    file = ImageFile(path)
    for scan in (Scan("sub-1", (file,)), Scan("sub-1", (file, file), maps={"label": file})):
        prepared = prepare_scan(scan, pipeline)
        if not np.isfinite(prepared.voxels).all() or not prepared.voxels.any():
            raise AssertionError("prepared voxels are not finite, or all 0")


def prepare_registered(path: Path) -> None:
    """`prepare` with registration to the template."""
    prepare(path, spacing=8, registration="affine")


def die(path: Path) -> None:
    """A reader that ends its process, to test the parent."""
    if path.exists():
        os.abort()


def hang(path: Path) -> None:
    """A reader that never returns, to test the parent."""
    while path.exists():
        time.sleep(0.1)


READS: dict[str, Callable[[Path], Any]] = {
    "volume": read_both, "prepare": prepare, "register": prepare_registered, "die": die, "hang": hang,
}  # fmt: skip


def work(first: int, stop: int, step: int, reads: str) -> None:
    """Read the cases one by one, and print each outcome as a line."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(Exception):  # whatever is imported late is imported before the limit
        READS[reads](ROOT / "nothing.nii")
    limit_memory()
    print(flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, stop, step):
            case = case_of(number)
            started = time.monotonic()
            outcome = outcome_of(case, Path(folder), READS[reads])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            seconds = time.monotonic() - started
            print(
                json.dumps(
                    {"case": number, "label": case.label, "seconds": seconds, "peak": peak, **outcome}
                ),
                flush=True,
            )


# --- the parent -----------------------------------------------------------------------------------------------


def outcomes(
    first: int, stop: int, reads: str = "volume", step: int = 1, patience: float = 20.0
) -> Iterator[dict[str, Any]]:
    """Every case's outcome; one that hangs for `patience` seconds or ends its process is a fault as well."""
    number = first
    while number < stop:
        command = [
            sys.executable,
            __file__,
            "--work",
            "--first",
            str(number),
            "--stop",
            str(stop),
            "--step",
            str(step),
            "--reads",
            reads,
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        ) as child:  # fmt: skip
            for line in filter(None, _lines(child, patience)):
                yield (outcome := json.loads(line))
                number = outcome["case"] + step
            if number < stop:  # the case after the last line is to blame
                what = "hangs" if child.poll() is None else f"ends the process with {child.returncode}"
                child.kill()
                yield {
                    "case": number,
                    "label": case_of(number).label,
                    "fault": what,
                    "seconds": patience,
                    "peak": 0,
                }
                number += step


def _lines(child: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Lines as they come, until none comes for too long; the first, an empty one, comes after all imports."""
    assert child.stdout is not None
    wait, rest = 120.0, b""
    while select.select([child.stdout], [], [], wait)[0]:
        chunk = os.read(child.stdout.fileno(), 65536)
        if not chunk:
            child.wait()
            return
        *complete, rest = (rest + chunk).split(b"\n")
        wait = patience
        yield from complete


def main() -> None:
    """Run a campaign, and say what was tried and found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stop", type=int, default=20_000)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--reads", choices=READS, default="volume")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds after which a case hangs")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.first, chosen.stop, chosen.step, chosen.reads)
        return
    tried, refused, faults = collections.Counter[str](), collections.Counter[str](), 0
    slowest, peak, valid = {"seconds": 0.0}, 0, 0
    for outcome in outcomes(chosen.first, chosen.stop, chosen.reads, chosen.step, chosen.patience):
        tried.update(outcome["label"].split(" + "))
        slowest = max(slowest, outcome, key=lambda timed: timed["seconds"])
        peak = max(peak, outcome["peak"])
        valid += "refused" not in outcome and not outcome["fault"]
        refused[outcome.get("refused", "")] += 1
        if outcome["fault"]:
            faults += 1
            print(json.dumps(outcome), flush=True)
    print(f"{(chosen.stop - chosen.first) // chosen.step} cases, {faults} faults, {valid} valid volumes")
    print(f"slowest {slowest['seconds']:.2f} s (case {slowest.get('case')}), largest process {peak} MiB")
    for counter in (tried, refused):
        print(*(f"{count:7d} {what}" for what, count in counter.most_common(60) if what), sep="\n")


if __name__ == "__main__":
    main()
