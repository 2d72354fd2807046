"""Every setting with its meaning, default and values, read off the types; and what else people call them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from core import schedules
from core.tasks import TASKS

SYNONYMS = {
    "lr": "learning_rate", "wd": "weight_decay", "l2": "weight_decay", "bs": "batch_size", "batch": "batch_size",
    "num_epochs": "epochs", "max_epochs": "epochs", "n_epochs": "epochs", "iterations": "steps", "max_steps": "steps",
    "optimizer": "optimiser.name", "optim": "optimiser.name", "scheduler": "optimiser.decay",
    "lr_decay": "optimiser.decay", "warmup_epochs": "warmup", "loss": "objective.name",
    "criterion": "objective.name", "tau": "temperature", "temp": "temperature", "sigma": "width", "bandwidth": "width",
    "architecture": "model.name", "arch": "model.name",
    "network": "model.name", "backbone": "model.name", "encoder": "model.name", "label": "target", "y": "target",
    "amp": "precision", "dtype": "precision", "clip": "gradient_clip", "grad_clip": "gradient_clip",
    "accumulation": "accumulate", "grad_accum": "accumulate", "patch_size": "crop_size", "roi_size": "crop_size",
    "rotation": "rotate", "flips": "flip", "pretrained": "begin.weights", "checkpoint": "begin.weights",
    "normalization": "normalise", "normalize": "normalise", "normalisation": "normalise",
}  # fmt: skip
"""What people call settings elsewhere: the last part of our name, or the whole of it."""
MOST = 5
"""Suggestions for a name that no setting has."""
KINDS: dict[object, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
INSIDE = "pretraining"
"""The block of a first stage: settings of any task, which are listed once."""


@dataclass(frozen=True)
class Setting:
    """One setting, as it is listed."""

    name: str
    meaning: str
    default: str
    values: str
    """What it may be: choices, a range, or a type."""
    tasks: tuple[str, ...]
    choices: tuple[str, ...]
    """Names beside it with which it exists, such as `supcon` for a setting of some objectives; () if always."""


def list_settings() -> list[Setting]:
    """All settings of all tasks, by name; one that differs between tasks is listed once for each meaning."""
    found: dict[tuple[str, ...], Setting] = {}
    for task, each in TASKS.items():
        for setting in _settings_in(each.settings, "", task, ()):
            key = (setting.name, setting.meaning, setting.values, setting.default)
            known = found.get(key, setting)
            found[key] = replace(
                known,
                tasks=tuple(dict.fromkeys([*known.tasks, *setting.tasks])),
                choices=tuple(dict.fromkeys([*known.choices, *setting.choices])),
            )
    return sorted(found.values(), key=lambda setting: setting.name)


def similar_settings(name: str, known: Collection[str]) -> list[str]:
    """The settings that are most likely meant by a name that none has, at most five, the likeliest first."""
    *before, last = name.split(".")
    last = SYNONYMS.get(last.lower(), last.lower())
    ordered = sorted(known, key=lambda each: (each.count("."), each))
    same = [each for each in ordered if each == last or each.endswith(f".{last}")]
    # In the block that was named, then in the outermost blocks.
    same.sort(key=lambda each: bool(before) and not each.startswith(f"{before[0]}."))
    if same:
        shallow = [each for each in same if not each.startswith(f"{INSIDE}.") or before[:1] == [INSIDE]]
        return (shallow or same)[:MOST]
    return difflib.get_close_matches(name, ordered, n=MOST, cutoff=0.6)


def _settings_in(
    kind: type[BaseModel], prefix: str, task: str, choices: tuple[str, ...]
) -> Iterator[Setting]:
    """The settings of a block, and of the blocks in it."""
    for name, field in kind.model_fields.items():
        if name in ("task", *(("name", "shape") if choices else ())):
            continue
        path = f"{prefix}{name}"
        members = [each for each in _members(field.annotation) if each is not type(None)]
        blocks = [each for each in members if isinstance(each, type) and issubclass(each, BaseModel)]
        is_schedule = any(each in get_args(schedules.Shape) for each in blocks)
        if name == INSIDE or not blocks or is_schedule:
            yield Setting(
                path, field.description or "", _default(field), _values(field, is_schedule), (task,), choices
            )
            continue
        tags = [_tag(each) for each in blocks]
        meaning, default = field.description or "", field.get_default(call_default_factory=True)
        if all(tags):
            chosen = (
                "none" if default is None else str(getattr(default, "name", getattr(default, "shape", "")))
            )
            key = "name" if "name" in blocks[0].model_fields else "shape"
            names = ", ".join(tag for each in tags for tag in each)
            yield Setting(f"{path}.{key}", meaning or "which of them", chosen, names, (task,), choices)
        elif len(members) < len(_members(field.annotation)):
            yield Setting(path, meaning, "none", "the settings below, none", (task,), choices)
        everywhere = set[str].intersection(*(set(block.model_fields) for block in blocks))
        for block, tag in zip(blocks, tags, strict=True):
            for setting in _settings_in(block, f"{path}.", task, tag if all(tags) else choices):
                own = setting.name.removeprefix(f"{path}.").split(".")[0]
                is_shared = own in everywhere and setting.choices == tag
                yield replace(setting, choices=choices) if is_shared else setting


def _members(annotation: object) -> list[Any]:
    """The types of a union, whatever is around them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for member in get_args(annotation) for each in _members(member)]
    return [annotation]


def _tag(kind: type[BaseModel]) -> tuple[str, ...]:
    """The names by which a block is chosen; () if it is not."""
    for name in ("name", "shape"):
        field = kind.model_fields.get(name)
        if field is not None and get_origin(field.annotation) is Literal:
            return tuple(map(str, get_args(field.annotation)))
    return ()


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, schedules.Constant):
        default = default.value
    if isinstance(default, BaseModel):
        return ", ".join(f"{name} {value}" for name, value in default.model_dump(exclude_none=True).items())
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) if default != "" else '""'


def _values(field: FieldInfo, is_schedule: bool) -> str:
    """The choices, or the range, or the kind of its values."""
    members = _members(field.annotation)
    choices = [str(value) for each in members if get_origin(each) is Literal for value in get_args(each)]
    marks = [_bound(each) for each in [*field.metadata, *_marks(field.annotation)]]
    kinds = [KINDS[each] for each in members if each in KINDS]
    kinds += ["list" for each in members if get_origin(each) in (tuple, list)]
    said = " or ".join(dict.fromkeys(kinds)) or ("number" if is_schedule else "")
    said = " ".join(part for part in (said, " and ".join(dict.fromkeys(filter(None, marks)))) if part)
    shapes = [each for each in members if each in get_args(schedules.Shape)]
    alternatives = [
        *choices,
        *([said] if said else []),
        *(["a schedule"] if len(shapes) > 1 else []),
        *(["none"] if type(None) in members and "none" not in choices else []),
    ]
    return ", ".join(alternatives)


def _marks(annotation: object) -> list[object]:
    """What stands beside the types inside a union."""
    if get_origin(annotation) is Annotated:
        inner, *beside = get_args(annotation)
        own = [each for part in beside for each in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return [*own, *_marks(inner)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for member in get_args(annotation) for each in _marks(member)]
    return []


def _bound(mark: object) -> str:
    words = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
    if type(mark) not in words:
        return ""
    said, bound = words[type(mark)]
    return f"{said} {getattr(mark, bound):g}"
