"""Studies of MR elastography as NumPy arrays: stiffness, damping ratio and T1, with age, sex, id and coverage.

The layout of the brain-age papers on MRE: a folder for each study with one array for each quantity, such as
stiffness_OA.npy, dr_OA.npy, T1_masked_OA.npy, age_OA.npy, sex_OA.npy, id_OA.npy and MRE_coverage_OA.npy; row
i of each is the same subject.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.arrays import MNI_NOTE, mni_affine, read_header, read_values, volumes_in
from core.volumes.sources.choose import chosen_channels
from core.volumes.sources.files import checked_folder, digest_of, files_below, name_in, stem
from core.volumes.sources.labels import Columns, Wanted, labels_of, plain_id
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

VOLUMES = ("stiffness", "dr", "T1")
ROLES = {
    "stiffness": "stiffness", "dr": "dr", "damping": "dr", "t1": "T1", "t1w": "T1",
    "age": "age", "ages": "age", "sex": "sex", "gender": "sex", "id": "id", "ids": "id",
    "coverage": "coverage",
}  # fmt: skip
"""Words of a file name and the quantity that they stand for."""
QUALIFIERS = {"mre", "ratio", "masked"}
"""Words that say more about the quantity; what is left of the name is the study."""
COVERAGE_COLUMN = "mre_coverage"
COLUMNS = {"coverage": COVERAGE_COLUMN}
"""Quantities with another name in the manifest, whose own "coverage" is that of the grid."""


@dataclass(frozen=True)
class Study:
    """The arrays of one study by quantity."""

    name: str
    folder: Path
    files: dict[str, Path]


def list_mre(source: Path, wanted: Wanted) -> Listing:
    """Scans of one or several studies of MRE arrays; site is the study, and subjects are called STUDY_ID.

    Names are understood word by word, in any case: the quantity (stiffness, dr or damping, T1, age, sex,
    id, coverage), MRE, ratio and masked, and what is left is the study. Where brain-masked and whole T1 lie
    side by side, the masked one is taken. Ids that are missing or occur twice in a study are left out.
    UserError, listing the arrays found, for ambiguous names, missing quantities, arrays of different lengths and
    volumes on no MNI152 grid.
    """
    if wanted.maps or wanted.mask:
        raise UserError(f"{source}: MRE arrays have no maps or masks; leave --maps and --mask out")
    studies = _studies(checked_folder(source, "mre"))
    there = Counter(role for study in studies for role in study.files if role in VOLUMES)
    channels = wanted.channels or chosen_channels(source, there)
    scans: list[Scan] = []
    rejects: list[Reject] = []
    for study in studies:
        is_needed = wanted.is_age_asked and wanted.age_column is not None
        has_ages = wanted.age_column is not None and (is_needed or "age" in study.files)
        more_scans, more_rejects = _read_study(source, study, channels, "age" if has_ages else None)
        scans += more_scans
        rejects += more_rejects
    tables = [path for study in studies for role, path in sorted(study.files.items()) if role not in VOLUMES]
    return Listing(source, "mre", channels, tuple(scans), tuple(rejects), digest_of(tables), (MNI_NOTE,))


def is_mre_array(path: Path) -> bool:
    """Whether the name is that of an array of stiffness or damping ratio."""
    return path.suffix == ".npy" and not {"stiffness", "dr"}.isdisjoint(_quantities(path))


def _read_study(
    source: Path, study: Study, channels: Sequence[str], age_column: str | None
) -> tuple[list[Scan], list[Reject]]:
    """The scans of one study, and the rows whose id or age cannot be used."""
    _check_arrays(study, [*channels, "id", *(["age"] if age_column else [])])
    grids = {role: mni_affine(study.files[role], volumes_in(study.files[role])[1]) for role in channels}
    values = {role: read_values(path) for role, path in study.files.items() if role not in VOLUMES}
    coverage = values.get("coverage", [])
    numeric = {COVERAGE_COLUMN} if all(isinstance(value, (int, float)) for value in coverage) else set()
    keys = [_key(written) for written in values["id"]]
    times = Counter(keys)
    scans, rejects = [], []
    for row, key in enumerate(keys):
        texts = {COLUMNS.get(role, role): _text(column[row]) for role, column in values.items()}
        # studies use the same numbers for different people, so the subject's name begins with the study's
        subject = "" if isinstance(key, UserError) else f"{study.name}_{texts['id'].removeprefix('sub-')}"
        try:
            if isinstance(key, UserError):
                raise UserError(f"row {row}: {key}")
            if times[key] > 1:
                raise UserError(f"{subject} is listed {times[key]} times in {study.files['id'].name}")
            labels = labels_of(
                {**texts, "site": study.name}, columns=Columns("age" if age_column else None), numeric=numeric,
                own=("id", "age"), prefix="mre_",
            )  # fmt: skip
            images = tuple(ImageFile(study.files[role], row, grids[role]) for role in channels)
            scans.append(Scan(subject, images, "", {}, None, *labels))
        except UserError as error:
            rejects.append(Reject(subject, name_in(source, study.files[channels[0]]), str(error)))
    return scans, rejects


def _check_arrays(study: Study, needed: Sequence[str]) -> None:
    """UserError unless the study has the quantities that are needed, and all its arrays have one length."""
    for role in needed:
        if role not in study.files:
            there = ", ".join(path.name for path in sorted(study.folder.glob("*.npy")))
            raise UserError(f"{study.folder} has no array of {role} for the study {study.name}, only {there}")
    counts = {path: read_header(path, kinds="iufUSb").shape[:1] for path in study.files.values()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{path.name} {count[0] if count else 'none'}" for path, count in counts.items())
        raise UserError(f"{study.folder} has arrays of different lengths for one study: {lengths}")


def _key(written: object) -> str | UserError:
    """The id as `plain_id` gives it, or why it cannot be used."""
    try:
        return plain_id(written)
    except UserError as error:
        return error


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()


def _studies(source: Path) -> list[Study]:
    """The studies of all folders below `source`, in order of their names."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files_below(source, (".npy",)):
        folders[path.parent].append(path)
    studies = sorted(
        (study for folder, paths in folders.items() for study in _studies_in(folder, paths)),
        key=lambda study: study.name,
    )
    if not studies:
        there = ", ".join(path.name for path in files_below(source, (".npy",))[:12]) or "no .npy file"
        raise UserError(f"{source} has no arrays such as stiffness_STUDY.npy and age_STUDY.npy, only {there}")
    for one, other in itertools.pairwise(studies):
        if one.name == other.name:
            raise UserError(f"{one.folder} and {other.folder} are both called study {one.name}; rename one")
    return studies


def _studies_in(folder: Path, paths: Sequence[Path]) -> list[Study]:
    """One study where no quantity occurs twice; otherwise one for each name that files have beside the quantity."""
    understood = [(path, *_understood(path)) for path in paths]
    known = [(path, role, study) for path, role, study in understood if role]
    masked = {study for path, role, study in known if role == "T1" and _is_masked(path)}
    known = [
        (path, role, study)
        for path, role, study in known
        if role != "T1" or study not in masked or _is_masked(path)
    ]
    roles = Counter(role for _, role, _ in known)
    if not known:
        return []
    if max(roles.values()) == 1:
        files = {role: path for path, role, _ in known}
        named = next((study for _, role, study in known if role == "age"), "")
        return [Study(named or folder.resolve().name, folder, files)]
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    for path, role, study in known:
        if role in groups[study]:
            raise UserError(
                f"{folder} has two arrays of {role}: {groups[study][role].name} and {path.name}; one is needed "
                f"for each study"
            )
        groups[study][role] = path
    return [Study(study or folder.resolve().name, folder, files) for study, files in groups.items()]


def _understood(path: Path) -> tuple[str, str]:
    """Quantity ("" for none) and study that a file's name says; UserError if it says two quantities."""
    quantities = _quantities(path)
    if len(quantities) > 1:
        raise UserError(f"{path} names several quantities ({', '.join(quantities)}); rename it to name one")
    left = [word for word in _words(path) if word.lower() not in {*ROLES, *QUALIFIERS}]
    return next(iter(quantities), ""), "_".join(left)


def _quantities(path: Path) -> list[str]:
    return sorted({ROLES[word.lower()] for word in _words(path) if word.lower() in ROLES})


def _is_masked(path: Path) -> bool:
    return "masked" in {word.lower() for word in _words(path)}


def _words(path: Path) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", stem(path)) if word]
