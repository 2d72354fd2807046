"""A cohort of phantom brains: real average anatomy, aged by published laws, with known truth.

Age, sex and site of the participants are drawn here; subject.py makes one brain, anatomy.py the average brain
that it starts from, ageing.py holds the published numbers. Subject i has the same brain in a cohort of any size,
in any process.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.files.writing import writing_to
from core.volumes.cohort.description import DESCRIPTION
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from core.volumes.images.intensity import foreground, parse_intensity, scale
from core.volumes.phantom.contrasts import with_contrasts
from core.volumes.phantom.lesions import Diseased, with_disease
from core.volumes.phantom.settings import SPACINGS, PhantomSettings
from core.volumes.phantom.subject import PERSON, Person, PhantomBrain, make_brain, random_stream
from core.volumes.phantom.templates import Floats
from core.volumes.phantom.tomography import head_with_bleeding

YOUNGEST, OLDEST = 18.0, 90.0  # years
BIDS_FOLDER = {"stiffness": "mre", "ct": "ct"}
"""The others are in anat."""
BIDS_SUFFIX = {
    "stiffness": "stiffness", "t1w": "T1w", "t1gd": "T1Gd", "t2w": "T2w", "flair": "FLAIR", "ct": "ct",
    "lesion": "lesion", "dseg": "dseg",
}  # fmt: skip
MAPS = {"ageing": (), "tissue": ("dseg",), "lesions": ("lesion",), "ct": ("lesion",), "contrasts": ("dseg",)}
"""The maps of every kind; in `dseg` of tissues CSF is 1, grey matter 2, white matter 3; of tumours necrosis is 1,
oedema 2, enhancing tissue 4."""

OnProgress = Callable[[int, int], None]
"""Called as on_progress(done, total) after each subject."""


class Participant(TypedDict):
    """Who is in the cohort: one row of its table."""

    subject: str
    """Such as "sub-0001"."""
    age: float
    """Years."""
    sex: str
    """"F" or "M"."""
    site: str
    """Such as "site-1"."""


def phantom_participants(settings: PhantomSettings) -> pd.DataFrame:
    """One row per subject; columns as in `Participant`."""
    return pd.DataFrame([_participant(settings, index) for index in range(settings.subjects)])


def _participant(settings: PhantomSettings, index: int) -> Participant:
    draws = random_stream(settings.seed, PERSON, index)
    age = _draw_clustered_age(draws) if settings.ages == "clusters" else draws.uniform(YOUNGEST, OLDEST)
    sex = "F" if draws.random() < 0.5 else "M"
    site = draws.choice(settings.sites, p=_site_shares(age, settings.sites))
    subject = f"sub-{index + 1:04d}"
    return {"subject": subject, "age": round(float(age), 2), "sex": sex, "site": f"site-{site + 1}"}


def _draw_clustered_age(draws: np.random.Generator) -> float:
    """45 % young adults (18-48 y), 43 % old (54-90 y), 12 % anything."""
    kind = draws.random()
    if kind < 0.45:
        return YOUNGEST + 30 * draws.beta(2, 3)
    if kind < 0.88:
        return OLDEST - 36 * draws.beta(2.5, 2.5)
    return draws.uniform(YOUNGEST, OLDEST)


def _site_shares(age: float, sites: int) -> npt.NDArray[np.float64]:
    """(sites,) probability of each site: young people are mostly scanned at the first, old people at the last."""
    oldness = (age - YOUNGEST) / (OLDEST - YOUNGEST)
    liked_by_young = np.linspace(0.9, 0.1, sites)
    shares = (1 - oldness) * liked_by_young + oldness * liked_by_young[::-1]
    return np.asarray(shares / shares.sum())


def phantom_brain(settings: PhantomSettings, index: int) -> PhantomBrain:
    """The healthy brain of subject `index` (from 0, so 0 is "sub-0001"); the first call makes the anatomy (2 s)."""
    # What other channels show is made of the tissues.
    is_made = settings.kind in ("ct", "contrasts")
    own = [] if is_made else settings.channels
    return make_brain(_person(settings, index), settings.spacing, own)


def phantom_disease(settings: PhantomSettings, index: int) -> Diseased:
    """What subject `index` has, of kinds lesions and ct: half of the subjects have nothing."""
    person, brain = _person(settings, index), phantom_brain(settings, index)
    make = head_with_bleeding if settings.kind == "ct" else with_disease
    return make(person, brain, settings.spacing, settings.rung or 1)


class Drawn(NamedTuple):
    """What is drawn of one participant."""

    brain: PhantomBrain
    maps: dict[str, npt.NDArray[np.uint8]]
    columns: dict[str, str | float]
    """Of the participants' table."""


def phantom_subject(settings: PhantomSettings, index: int) -> Drawn:
    """All that there is of subject `index`."""
    if settings.kind in ("lesions", "ct"):
        disease = phantom_disease(settings, index)
        return Drawn(disease.brain, {"lesion": disease.lesion}, disease.columns)
    brain = phantom_brain(settings, index)
    if settings.kind == "contrasts":
        seen = with_contrasts(_person(settings, index), brain, settings.spacing, settings.channels)
        return Drawn(seen.brain, {"dseg": seen.tumour} if seen.is_labelled else {}, seen.columns)
    return Drawn(brain, {"dseg": brain.tissue} if settings.kind == "tissue" else {}, {})


def _person(settings: PhantomSettings, index: int) -> Person:
    if not 0 <= index < settings.subjects:
        raise UserError(f"there is no phantom subject {index}; they run from 0 to {settings.subjects - 1}")
    participant = _participant(settings, index)
    half = settings.sex_effect / 2
    return Person(
        seed=settings.seed,
        index=index,
        age=participant["age"],
        site=int(participant["site"].removeprefix("site-")),
        relative_stiffness=1 + (half if participant["sex"] == "F" else -half),
    )


def _each_brain(
    settings: PhantomSettings, on_progress: OnProgress | None
) -> Iterator[tuple[Participant, Drawn]]:
    """Every participant with what is drawn of them, reporting each once it has been used."""
    for index in range(settings.subjects):
        yield _participant(settings, index), phantom_subject(settings, index)
        if on_progress:
            on_progress(index + 1, settings.subjects)


def write_phantom_cohort(
    out: str | Path, settings: PhantomSettings, on_progress: OnProgress | None = None
) -> Cohort:
    """Write the cohort to the folder `out`, or reuse the same one already there, and open it.

    The manifest also records the true tissue volumes: csf_ml, gm_ml, wm_ml and ventricle_ml. UserError if
    `out` holds other files.
    """
    out = Path(out)
    if (out / DESCRIPTION).exists():
        return _same_cohort(out, settings)
    writer = CohortWriter(
        out,
        name="phantom",
        channels=settings.channels,
        shape=SPACINGS[settings.spacing],
        spacing=settings.spacing,
        affine=phantom_brain(settings, 0).affine,
        preprocessing=settings.identity(),
        source="phantom",
        synthetic=True,
        maps=MAPS[settings.kind],
        dtype="int16" if settings.kind == "ct" else "float16",
    )
    with writer:
        for participant, drawn in _each_brain(settings, on_progress):
            volume = np.stack([drawn.brain.channels[name] for name in settings.channels])
            if settings.kind == "ct":
                # As `ingest --intensity hu` keeps a head.
                units = parse_intensity("hu")
                volume = np.stack([scale(each, foreground(each, units), units) for each in volume])
            columns: dict[str, Any] = {**participant, **drawn.brain.volumes_ml, **drawn.columns}
            columns["maps"] = {name: each.astype(np.int16) for name, each in drawn.maps.items()}
            writer.add(volume, source="phantom", **columns)
    return Cohort.open(out)


def _same_cohort(out: Path, settings: PhantomSettings) -> Cohort:
    cohort = Cohort.open(out)
    if cohort.description.preprocessing_hash != fingerprint(settings.identity()):
        raise UserError(f"{out} holds a cohort of other settings; choose another folder or delete it")
    return cohort


def write_phantom_bids(
    out: str | Path, settings: PhantomSettings, on_progress: OnProgress | None = None
) -> Path:
    """Write the cohort as a BIDS-like tree of NIfTI files, the same bytes each time; returns `out`.

    sub-0001/mre/sub-0001_stiffness.nii.gz (kPa), sub-0001/anat/sub-0001_T1w.nii.gz, participants.tsv,
    dataset_description.json.
    """
    out = Path(out)
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for participant, drawn in _each_brain(settings, on_progress):
            images: dict[str, Any] = {**drawn.brain.channels, **drawn.maps}
            for name, image in images.items():
                _write_nifti(out, participant["subject"], name, image, drawn.brain.affine)
            rows.append(drawn.columns)
        people = phantom_participants(settings).rename(columns={"subject": "participant_id"})
        table = pd.concat([people, pd.DataFrame(rows, index=people.index)], axis=1)
        table.to_csv(out / "participants.tsv", sep="\t", index=False, lineterminator="\n")
        description = {
            "Name": "brainsweep phantom",
            "BIDSVersion": "1.10.0",
            "DatasetType": "raw",
            "GeneratedBy": [{"Name": "brainsweep phantom", "Settings": settings.identity()}],
        }
        (out / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    return out


def _write_nifti(
    out: Path,
    subject: str,
    channel: str,
    image: Floats | npt.NDArray[np.uint8],
    affine: npt.NDArray[np.float64],
) -> None:
    folder = out / subject / BIDS_FOLDER.get(channel, "anat")
    folder.mkdir(parents=True, exist_ok=True)
    nifti = nib.Nifti1Image(image, affine)
    nifti.header.set_xyzt_units("mm")
    buffer = io.BytesIO()
    # nibabel would write the time into the gzip header
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=4, mtime=0, filename="") as packed:
        packed.write(nifti.to_bytes())
    (folder / f"{subject}_{BIDS_SUFFIX[channel]}.nii.gz").write_bytes(buffer.getvalue())
