"""Weights that a training starts from, and whom they were trained on.

A run that starts from weights keeps them in RUN/starts/NAME#HASH/: `model.safetensors`, and `trained_on.csv` if it is
known whom they were trained on. Settings, study and tables hold NAME#HASH and no path. A model folder of a run has
`trained_on.csv`, too; weights of others have none, and then nobody can say whom they know.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from safetensors.torch import load, save

from core.errors import UserError
from core.evaluation.splits import Rows
from core.files.tables import read_table, write_table
from core.files.writing import replacing
from core.models.weights import read_weights
from core.volumes.cohort.description import CohortDescription

MODEL, TRAINED_ON, BEST, INPUT = "model.safetensors", "trained_on.csv", "best", "input.json"
COLUMNS = ("subject", "data_set", "source_hash")
SHOWN = 5
"""Subjects that a message names."""


@dataclass(frozen=True)
class Start:
    """Weights to start from."""

    name: str
    """NAME#HASH: the name of the run or the file, and eight digits of the SHA-256 of the weights."""
    weights: Mapping[str, npt.NDArray[np.generic]]
    """By the names of the file. Arrays, which all workers of a node read in the same memory."""
    trained_on: pd.DataFrame | None
    """The scans (`COLUMNS`) that these weights were trained on; None if it is unknown."""
    channels: tuple[str, ...] = ()
    """What they were trained to see, such as T1w; () if it is unknown."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights, to be copied from."""
        return {name: torch.from_numpy(values) for name, values in self.weights.items()}


@dataclass(frozen=True)
class Seen:
    """Which scans of a cohort a start was trained on."""

    rows: Rows
    """Those with the same source image, or with the same id in the same data set."""
    alike: int
    """How many of the others have an id that the start knows from another data set, as `sub-01` is in many."""


def read_start(given: str) -> Start:
    """The start at a path that a user typed: a RUN, the folder of a model, or a file of weights.

    No code in the file is executed.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(given)
    folder = path / BEST if (path / BEST / MODEL).exists() else path
    file = folder / MODEL if folder.is_dir() else path
    if not file.exists():
        what = "has no trained model (no best/); finish it first" if path.is_dir() else "is not there"
        raise UserError(f"begin.weights={given} {what}")
    # numpy has no bfloat16.
    tensors = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).contiguous().clone()
        for name, value in read_weights(file).items()
    }
    known = folder / TRAINED_ON
    trained_on = read_trained_on(known) if folder.is_dir() and known.exists() else None
    digits = hashlib.sha256(save(tensors)).hexdigest()[:8]
    whole = path.resolve()
    own = (whole.parent.name if whole.name == BEST else whole.name) if path.is_dir() else path.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", own)
    return Start(f"{name}#{digits}", _as_arrays(tensors), trained_on, _channels_of(folder))


def _channels_of(folder: Path) -> tuple[str, ...]:
    """The channels of the model in a folder; () if it is no folder of a model."""
    try:
        return tuple(map(str, json.loads((folder / INPUT).read_text())["channels"]))
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def keep_start(start: Start, folder: Path) -> None:
    """Write a copy of `start` into the folder of starts of a run."""
    place = folder / start.name
    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / MODEL) as temporary:
        temporary.write_bytes(save(start.tensors))
    if start.trained_on is not None:
        write_table(start.trained_on, place / TRAINED_ON)


def read_kept(folder: Path) -> dict[str, Start]:
    """The starts that a run keeps, by name.

    Raises:
        UserError: the weights of one are damaged.
    """
    found = {}
    for place in sorted(path for path in folder.glob("*#*") if path.is_dir()):
        content = (place / MODEL).read_bytes() if (place / MODEL).exists() else b""
        if not place.name.endswith(f"#{hashlib.sha256(content).hexdigest()[:8]}"):
            raise UserError(f"{place}/{MODEL} is damaged; put it back from a backup")
        known = place / TRAINED_ON
        trained_on = read_trained_on(known) if known.exists() else None
        found[place.name] = Start(place.name, _as_arrays(load(content)), trained_on)
    return found


def read_trained_on(path: Path) -> pd.DataFrame:
    """The scans in a file `trained_on.csv`; UserError if it is damaged."""
    return read_table(path, COLUMNS)[list(COLUMNS)]


def scans_of(manifest: pd.DataFrame, rows: Rows, data_set: str) -> pd.DataFrame:
    """The scans (`COLUMNS`) of these rows of a cohort from `data_set`."""
    chosen = manifest.iloc[rows]
    hashes = chosen["source_hash"] if "source_hash" in chosen else pd.Series("", index=chosen.index)
    return pd.DataFrame(
        {
            "subject": chosen["subject"].to_numpy(str),
            "data_set": data_set,
            "source_hash": hashes.fillna("").to_numpy(str),
        }
    )


def data_set_of(description: CohortDescription) -> str:
    """What tells the data set of a cohort from others: its source, and of phantoms the seed of their people."""
    seed = description.preprocessing.get("seed")
    return (
        f"{description.source}, seed {seed}"
        if description.synthetic and seed is not None
        else description.source
    )


def seen_of(start: Start, manifest: pd.DataFrame, rows: Rows, data_set: str) -> Seen | None:
    """Which of these `rows` of a cohort a start was trained on; None if it is unknown."""
    if start.trained_on is None:
        return None
    known, scans = start.trained_on, scans_of(manifest, rows, data_set)
    hashes = set(known["source_hash"]) - {""}
    of_set = set(known.loc[known["data_set"] == data_set, "subject"])
    is_seen = scans["source_hash"].isin(hashes) | scans["subject"].isin(of_set)
    is_alike = scans["subject"].isin(set(known["subject"])) & ~is_seen
    return Seen(rows[is_seen.to_numpy()], int(scans.loc[is_alike, "subject"].nunique()))


def seen_error(start: Start, subjects: Sequence[str], same_cohort: bool) -> UserError:
    """The error for a start that knows people whom it would be judged on."""
    named = ", ".join(subjects[:SHOWN]) + (
        f" and {len(subjects) - SHOWN} more" if len(subjects) > SHOWN else ""
    )
    instead = (
        "pre-train inside every cell with `pretraining:` instead"
        if same_cohort
        else "leave these subjects out of the cohort or of the pre-training"
    )
    return UserError(
        f"{start.name} was trained on {len(subjects)} subjects that it would be judged on ({named}); {instead}, or "
        "give --allow-seen-subjects, which the report says"
    )


def _as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[np.generic]]:
    return {name: value.numpy() for name, value in tensors.items()}
