"""What is trained and how it is judged: one file per task, chosen by name."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from core.errors import UserError
from core.files.python import defined_in, file_of
from core.lookup import look_up
from core.tasks.brain_age import BrainAge
from core.tasks.classification import Classification
from core.tasks.contrast_pretraining import ContrastPretraining
from core.tasks.masked_pretraining import MaskedPretraining
from core.tasks.segmentation import Segmentation
from core.tasks.symmetry_pretraining import SymmetryPretraining
from core.tasks.task import Task
from core.tasks.tissue_age import TissueAge

TASKS: dict[str, Task[Any]] = {
    "brain_age": BrainAge(),
    "classification": Classification(),
    "contrast_pretraining": ContrastPretraining(),
    "masked_pretraining": MaskedPretraining(),
    "segmentation": Segmentation(),
    "symmetry_pretraining": SymmetryPretraining(),
    "tissue_age": TissueAge(),
}
ENTRY_POINTS = "brainsweep.tasks"
"""The group of entry points in which an installed package names its tasks."""


def find_task(name: object) -> Task[Any]:
    """The task of this name: one of ours, FILE.py:NAME, or an entry point of an installed package.

    A file is executed, once in every process.

    Raises:
        UserError: there is none, or it is not a task.
    """
    if not isinstance(name, str):
        raise UserError(f"setting 'task' must be a name, got {name!r}")
    return TASKS[name] if name in TASKS else _of_user(name)


@functools.cache
def _of_user(name: str) -> Task[Any]:
    path = file_of(name)
    if path is not None:
        found = defined_in(path, name.rpartition(":")[2] if ":" in name else "task", "task")
    else:
        installed = {each.name: each for each in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        chosen = look_up({**TASKS, **installed}, name, "task")
        found = chosen.load() if isinstance(chosen, importlib.metadata.EntryPoint) else chosen
    made = found() if isinstance(found, type) and issubclass(found, Task) else found
    if not isinstance(made, Task):
        raise UserError(f"'{name}' is a {type(made).__name__}, and a task is a core.tasks.task.Task")
    return made
