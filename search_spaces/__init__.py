"""What a search may vary, one pair of files per system.

`NAME.yaml` holds the fixed settings, with the published values as defaults; `NAME.py` holds
`space(trial) -> dict`, an ordinary function over an Optuna trial whose parameter names are the dotted names
of the settings they set. A parameter asked for inside an `if` exists only there.

This is a package of brainsweep.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import optuna

from core.config import TASK, Settings, flatten, read_settings, with_absent
from core.files.python import defined_in, file_of
from core.lookup import look_up
from core.tasks import ENTRY_POINTS
from search_spaces import (
    brain_age,
    brain_age_pretraining,
    classification,
    cnn_age,
    contrast_pretraining,
    contrast_segmentation,
    label_budget,
    masked_pretraining,
    points,
    symmetry_classification,
    symmetry_pretraining,
    symmetry_segmentation,
    tissue,
    tissue_age,
)
from search_spaces.points import Space, is_under

SPACES: dict[str, Space] = {
    "brain_age": brain_age.space,
    "brain_age_pretraining": brain_age_pretraining.space,
    "classification": classification.space,
    "cnn_age": cnn_age.space,
    "contrast_pretraining": contrast_pretraining.space,
    "contrast_segmentation": contrast_segmentation.space,
    "label_budget": label_budget.space,
    "masked_pretraining": masked_pretraining.space,
    "symmetry_classification": symmetry_classification.space,
    "symmetry_pretraining": symmetry_pretraining.space,
    "symmetry_segmentation": symmetry_segmentation.space,
    "tissue": tissue.space,
    "tissue_age": tissue_age.space,
}

DEFAULT = "brain_age"


def load_space(name: str) -> tuple[Space, Settings]:
    """The space `NAME` or `path/to/file.py:function`, and the settings it starts from.

    A file's settings are those of a YAML file of the same name beside it, or the default space's.

    Raises:
        UserError: no such space, file or function.
    """
    path = file_of(name)
    if path is None:
        own = None if name in SPACES else _installed(name)
        return (own, {TASK: name}) if own else (look_up(SPACES, name, "space"), published(name))
    function = name.rpartition(":")[2] if ":" in name else "space"
    space = cast(Space, defined_in(path, function, "search space"))
    beside = path.with_suffix(".yaml")
    return space, read_settings(beside) if beside.exists() else published(DEFAULT)


def _installed(task: str) -> Space | None:
    """The function `space` of the module in which an installed package has this task; None if there is none.

    Its settings start from the defaults of the task.
    """
    found = next(iter(importlib.metadata.entry_points(group=ENTRY_POINTS, name=task)), None)
    if found is None:
        return None
    return cast(
        Space, look_up(vars(importlib.import_module(found.module)), "space", f"name in {found.module}")
    )


def pin(space: Space, changes: Mapping[str, object]) -> Space:
    """`space` in which the settings in `changes` are given, not searched: they become no parameters at all.

    A block that is switched off (`objective.neighbours=null`) pins everything in it.
    """
    values = fixed_by(changes)
    # A space says that it takes an `optuna.Trial`; a stand-in passes on all that it does not answer itself.
    return lambda trial: space(points.pinned(trial, values))  # type: ignore[arg-type]


def without(space: Space, blocks: Collection[str], settings: Settings) -> Space:
    """`space` without the settings under `blocks`: they become no parameters, and have no place in a configuration.

    Args:
        space: a define-by-run space.
        blocks: dotted names, such as `objective`.
        settings: nested settings. A space that branches on a setting without a place sees its value there.
    """
    values = with_absent(flatten(settings))

    def rest(trial: optuna.Trial) -> Settings:
        proposed = space(points.without(trial, blocks, values))  # type: ignore[arg-type]
        return {name: value for name, value in proposed.items() if not is_under(name, blocks)}

    return rest


def fixed_by(changes: Mapping[str, object]) -> Settings:
    """Every setting that `changes` give a value, by dotted name: also those of a block that they switch off."""
    return with_absent(flatten(changes)) | dict(changes)


def published(name: str) -> Settings:
    """The settings in `NAME.yaml`: the published configuration."""
    return read_settings(Path(__file__).parent / f"{name}.yaml")
