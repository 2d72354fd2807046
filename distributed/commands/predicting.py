"""The models of a run on new scans: single NIfTI files, or a BIDS tree that becomes a tree of derivatives."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from core.errors import UserError
from core.evaluation import Floats
from core.files.tables import write_table
from core.files.writing import replacing, write_text, writing_to
from core.inference import Predictor, mean_answer, scan_of
from core.own_grid import OwnGrid, Placed, image_like, nearest_on, place
from core.run_description import CohortOfRun
from core.run_names import RUN_JSON
from core.tasks import find_task
from core.tasks.task import Prediction
from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.sources import Scan, list_scans
from distributed.commands.known_scans import KnownScans, Standing
from distributed.commands.models import Models, single_run
from distributed.commands.options import Ensemble
from distributed.run.folder import RunFolder

DESCRIBED = "brainsweep"
"""The entity `desc` of what is written into a tree of derivatives."""
OnProgress = Callable[[int, int], None]
"""Called with (scans done, scans in all)."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside the table."""

    folder: Path | None = None
    """Where maps of classes are written."""
    probabilities: bool = False
    """Whether to write those of the classes, too."""
    ensemble: Ensemble = "best"
    embeddings: Path | None = None
    """A Parquet file for what the encoder says of every scan."""


@dataclass(frozen=True)
class OneScan:
    """What is said of one scan."""

    table: pd.DataFrame
    """One row; see `Task.predictions`."""
    maps: dict[str, npt.NDArray[np.int16]]
    """Maps of classes on the scan's own voxels, by name, of a task that gives no probabilities."""
    placed: dict[str, Placed]
    """The segmentations on the scan's own voxels, by name."""
    standing: Standing
    unfamiliar: str | None
    embedding: Floats | None = None
    """(E,) of one model."""

    @property
    def milliliters(self) -> dict[str, float]:
        """The volume of every class, by the name of its column."""
        return {f"ml_{name}": ml for each in self.placed.values() for name, ml in each.milliliters.items()}

    @property
    def note(self) -> str:
        """Why the prediction may be wrong or too good; empty if nothing is known against it."""
        return "; ".join(note for note in (self.unfamiliar, self.standing.note) if note)


class ScanPredictor:
    """The models of a run, ready for single scans, which are prepared like the cohort of the run.

    Raises:
        UserError: there is no model.
    """

    def __init__(self, run: Path, ensemble: Ensemble, console: Console | None, is_trusted: bool) -> None:
        folder = single_run(run)
        models = Models.of(folder, console, is_trusted)
        self.models = [model.predictor for model in models.of_kind(ensemble)]
        self.first: Predictor = models.best.predictor
        """Says how predictions are presented: only it has a calibration."""
        self.task = find_task(self.first.settings.task)
        self.known = KnownScans.of(folder, self.first.channels[0])
        self.preprocessing = preprocessing_of(folder)

    def __call__(self, given: Scan) -> OneScan:
        """Predict one scan, whose first image is a NIfTI file; UserError names what cannot be used."""
        file, scan = given.images[0].path, prepare_scan(given, self.preprocessing)
        said, own = mean_answer(self.models, scan.voxels[None]), OwnGrid.of_file(file)
        return OneScan(
            said.table,
            {name: nearest_on(own, several[0], scan.affine) for name, several in said.maps.items()},
            {name: place(each, scan.affine, own) for name, each in said.probabilities.items()},
            self.known.standing(file, scan),
            self.first.unfamiliar(scan.voxels[None]),
            None if said.embeddings is None else said.embeddings[0],
        )


def predict_files(
    run: Path,
    files: Sequence[Path],
    masks: Sequence[Path] | None = None,
    truth: Sequence[str] | None = None,
    *,
    wanted: Wanted | None = None,
    console: Console | None = None,
    is_trusted: bool = False,
    on_progress: OnProgress | None = None,
) -> Prediction:
    """Predict what the task of the run says of NIfTI files, which are prepared like the cohort of the run.

    Args:
        run: folder of the run.
        files: one NIfTI file per subject.
        masks: the brain mask of each file, in their order; needed if the cohort was made with masks.
        truth: the truth about each file, in their order and as it was typed.
        wanted: what to write beside it, and which models to ask.
        console: where to say that the file of a task is executed.
        is_trusted: whether the user trusts this file as it is.
        on_progress: hears of every file.

    Returns:
        A table with the columns file; those of the task; trained_on (yes, no, perhaps or unknown; see `Standing`);
        and note (empty, or why the prediction may be wrong or too good).

    Raises:
        UserError: no model, a file that cannot be read, another number of masks or truths than files, a truth that the
            task does not understand, or a model of several channels.
    """
    if truth is not None and len(truth) != len(files):
        raise UserError(f"{len(files)} volumes need as many --truth, got {len(truth)}")
    if masks is not None and len(masks) != len(files):
        raise UserError(f"{len(files)} volumes need as many brain masks, got {len(masks)}")
    wanted = wanted or Wanted()
    predictor = ScanPredictor(run, wanted.ensemble, console, is_trusted)
    if len(predictor.first.channels) > 1:
        raise UserError(
            f"the model needs channels {', '.join(predictor.first.channels)} of each subject; give a BIDS tree, or "
            "ingest them into a cohort and use `brainsweep evaluate`"
        )
    stems = [_stem(file) for file in files]
    if wanted.folder is not None:
        twice = next((file for file, stem in zip(files, stems, strict=True) if stems.count(stem) > 1), None)
        if twice is not None:
            raise UserError(f"--out {wanted.folder}: the maps of two files would have one name ({twice.name}); predict "
                            "them into two folders")  # fmt: skip
        own = next((file for file in files if file.resolve().parent == wanted.folder.resolve()), None)
        if own is not None:
            raise UserError(f"--out {wanted.folder} is the folder of {own.name}, whose maps would be overwritten; give "
                            "another one")  # fmt: skip
    known_truth = None if truth is None else predictor.task.read_truth(truth, predictor.first.facts)
    found = []
    for number, (file, mask) in enumerate(
        zip(files, [None] * len(files) if masks is None else masks, strict=True), start=1
    ):
        said = predictor(scan_of(file, mask))
        if wanted.probabilities and not said.placed:
            raise UserError(
                f"--probabilities cannot act: the task {predictor.task.about.name} has none of voxels"
            )
        if wanted.folder is not None:
            _write(_images(said, file, wanted, _stem(file)), wanted.folder)
        # What was written is not needed again, and a hundred segmentations would not fit into memory.
        found.append(replace(said, maps=dict.fromkeys(said.maps, np.empty(0, np.int16)), placed=_small(said)))
        if on_progress is not None:
            on_progress(number, len(files))
    _write_embeddings(found, files, wanted)
    predictions = pd.concat([each.table for each in found], ignore_index=True)
    presented = predictor.first.present(predictions, known_truth)
    names = [*found[0].maps, *found[0].placed]
    if names and wanted.folder is None:
        lacks = (*presented.lacks, f"the {', '.join(names)} maps are not written: give --out FOLDER")
        presented = replace(presented, lacks=lacks)
    return _with_volumes(presented, files, found)


def predict_tree(
    run: Path,
    tree: Path,
    out: Path,
    wanted: Wanted,
    *,
    console: Console | None = None,
    is_trusted: bool = False,
    on_progress: OnProgress | None = None,
) -> Prediction:
    """Predict every scan of a BIDS tree into a tree of BIDS derivatives; see `predict_files`.

    `out` gets dataset_description.json, predictions.tsv with one line per scan, skipped.tsv with the scans that cannot
    be used, and, of a task with maps, sub-01/anat/sub-01_desc-brainsweep_dseg.nii.gz (probseg if asked) and the names
    of the classes in desc-brainsweep_dseg.tsv.

    Raises:
        UserError: it is no BIDS tree, none of its scans can be used, or `out` is the tree itself.
    """
    if out.resolve() == tree.resolve():
        raise UserError(
            f"--out {out} is the tree itself; give another folder, such as {tree}/derivatives/NAME"
        )
    predictor = ScanPredictor(run, wanted.ensemble, console, is_trusted)
    masked = predictor.preprocessing.mask is not None
    listing = list_scans(
        tree, kind="bids", channels=predictor.first.channels, mask="mask" if masked else None, age_column=None
    )
    found, files, rows = [], [], []
    skipped = [
        {"subject": each.subject, "file": each.file, "reason": each.reason} for each in listing.rejects
    ]
    for number, scan in enumerate(listing.scans, start=1):
        file = scan.images[0].path
        try:
            said = predictor(scan)
        except UserError as error:
            # One scan that cannot be used costs no other one.
            skipped.append({"subject": scan.subject, "file": str(file), "reason": str(error)})
            continue
        if wanted.probabilities and not said.placed:
            raise UserError(
                f"--probabilities cannot act: the task {predictor.task.about.name} has none of voxels"
            )
        # Also what lies in derivatives of the tree is of sub-01.
        parts = list(file.parts[:-1])
        first = next((place for place, part in enumerate(parts) if part.startswith("sub-")), len(parts))
        stem = re.sub("_desc-[^_]+", "", _stem(file).rpartition("_")[0])
        _write(_images_in_bids(said, file, wanted, stem), out.joinpath(*parts[first:]))
        rows.append({"participant_id": scan.subject, "session": scan.session})
        files.append(file)
        found.append(replace(said, maps={}, placed=_small(said)))
        if on_progress is not None:
            on_progress(number, len(listing.scans))
    if not found:
        raise UserError(
            f"no scan of {tree} can be used; the first: {skipped[0]['file']}: {skipped[0]['reason']}"
        )
    _write_embeddings(found, files, wanted)
    presented = predictor.first.present(pd.concat([each.table for each in found], ignore_index=True), None)
    made = _with_volumes(presented, files, found)
    with writing_to(out):
        _write_tree(out, tree, run, pd.concat([pd.DataFrame(rows), made.table], axis=1), skipped)
        for name, each in found[0].placed.items():
            _write_classes(out, _described(name), each, wanted.probabilities)
    if skipped:
        made = replace(
            made, lacks=(*made.lacks, f"{len(skipped)} scans were skipped: {out}/skipped.tsv says why")
        )
    return made


def preprocessing_of(folder: RunFolder) -> Preprocessing:
    """The preprocessing of the cohort of the run; phantoms are made on the grid, in MNI space, with raw intensities."""
    cohort = cohort_of_run(folder)
    if cohort.synthetic:
        intensity = "hu" if cohort.preprocessing.get("kind") == "ct" else "raw"
        return Preprocessing.model_validate(
            {"spacing": cohort.spacing, "shape": cohort.shape, "intensity": intensity, "centre": "world"}
        )
    return Preprocessing.from_settings(cohort.preprocessing)


def cohort_of_run(folder: RunFolder) -> CohortOfRun:
    """What run.json says of the cohort; UserError if it says nothing."""
    recorded = folder.about.cohort
    if recorded is None:
        raise UserError(f"{folder.path}/{RUN_JSON} does not say which cohort the run was made on")
    return recorded


def _with_volumes(presented: Prediction, files: Sequence[Path], found: Sequence[OneScan]) -> Prediction:
    """The prediction with volumes in mL, files, and what is known of them."""
    of_classes = pd.DataFrame([each.milliliters for each in found])
    shown = presented.shown.assign(
        **{
            f"{str(name).removeprefix('ml_')} (mL)": [f"{ml:.1f}" for ml in column]
            for name, column in of_classes.items()
        }
    )
    table = pd.concat([presented.table.copy(), of_classes], axis=1)
    table.insert(0, "file", [str(file) for file in files])
    table = table.assign(
        trained_on=[each.standing.trained_on for each in found], note=[each.note for each in found]
    )
    return replace(presented, table=table, shown=shown)


def _write_embeddings(found: Sequence[OneScan], files: Sequence[Path], wanted: Wanted) -> None:
    """Write embedding_0, embedding_1, … of every file, if they are asked for."""
    if wanted.embeddings is None:
        return
    if found[0].placed:
        raise UserError(
            "--embeddings cannot act with a task that segments: it says something of voxels, not of scans"
        )
    known = [each.embedding for each in found if each.embedding is not None]
    if len(known) < len(found):
        raise UserError(
            "--embeddings cannot act with several models (--ensemble folds): their axes differ; use one"
        )
    table = pd.DataFrame(np.stack(known)).add_prefix("embedding_")
    table.insert(0, "file", [str(file) for file in files])
    with writing_to(wanted.embeddings.parent), replacing(wanted.embeddings) as path:
        table.to_parquet(path, index=False)


def _small(said: OneScan) -> dict[str, Placed]:
    """The segmentations without their voxels."""
    return {
        name: each._replace(classes_xyz=np.empty(0, np.int16), probabilities_kxyz=np.empty(0, np.float32))
        for name, each in said.placed.items()
    }


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _images(said: OneScan, file: Path, wanted: Wanted, stem: str) -> Mapping[str, nib.Nifti1Image]:
    """What is written of a scan, by the names of the files without .nii.gz: STEM_NAME, STEM_NAME_probabilities."""
    images = {f"{stem}_{name}": image_like(file, classes) for name, classes in said.maps.items()}
    for name, each in said.placed.items():
        images[f"{stem}_{name}"] = image_like(file, each.classes_xyz)
        if wanted.probabilities:
            images[f"{stem}_{name}_probabilities"] = image_like(file, _several(each))
    return images


def _images_in_bids(said: OneScan, file: Path, wanted: Wanted, stem: str) -> Mapping[str, nib.Nifti1Image]:
    """The same in the words of BIDS: STEM_desc-brainsweep_dseg and _probseg; of another map than dseg its name."""
    images = {
        f"{stem}_desc-{_described(name)}_dseg": image_like(file, each) for name, each in said.maps.items()
    }
    for name, each in said.placed.items():
        images[f"{stem}_desc-{_described(name)}_dseg"] = image_like(file, each.classes_xyz)
        if wanted.probabilities:
            images[f"{stem}_desc-{_described(name)}_probseg"] = image_like(file, _several(each))
    return images


def _described(name: str) -> str:
    """The label of the entity `desc` of a map."""
    return DESCRIBED if name == "dseg" else re.sub("[^A-Za-z0-9]", "", name)


def _several(placed: Placed) -> npt.NDArray[np.float32]:
    """The probabilities (X, Y, Z, K - 1) of all classes but the background."""
    return np.moveaxis(placed.probabilities_kxyz[1:], 0, -1)


def _write(images: Mapping[str, nib.Nifti1Image], folder: Path) -> None:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            with replacing(folder / f"{name}.nii.gz") as path:
                path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _write_tree(
    out: Path, tree: Path, run: Path, table: pd.DataFrame, skipped: Sequence[Mapping[str, str]]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "Name": f"{DESCRIBED} {run.resolve().name}",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": DESCRIBED, "Version": _version()}],
        "SourceDatasets": [{"URL": tree.resolve().as_uri()}],
    }
    write_text(out / "dataset_description.json", json.dumps(about, indent=2))
    write_table(table, out / "predictions.tsv")
    (out / "skipped.tsv").unlink(missing_ok=True)
    if skipped:
        write_table(pd.DataFrame(skipped), out / "skipped.tsv")


def _write_classes(out: Path, label: str, placed: Placed, probabilities: bool) -> None:
    """What the numbers of a map mean, as BIDS asks."""
    table = pd.DataFrame({"index": list(placed.numbers.values()), "name": list(placed.numbers)})
    write_table(table, out / f"desc-{label}_dseg.tsv")
    if probabilities:
        names = {"LabelMap": list(placed.numbers)}
        write_text(out / f"desc-{label}_probseg.json", json.dumps(names, indent=2))


def _version() -> str:
    try:
        return importlib.metadata.version("brainsweep")
    except importlib.metadata.PackageNotFoundError:
        return "0"
