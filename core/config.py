"""The settings of one training run, and how people change them.

The settings of a task are what a trial *is*: frozen, validated, without unknown keys. Every setting has one dotted name
(`optimiser.learning_rate`), the same in `--set`, in a search space, in a YAML file and in every table. `task` chooses
which settings there are, as `name` does inside a block.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from core.errors import UserError
from core.lookup import did_you_mean
from core.models.settings import encoder_of
from core.run_settings import BeginSettings, RunSettings
from core.settings_list import similar_settings
from core.task_description import BRAIN_AGE
from core.tasks import TASKS, find_task

# Nested to any depth; `resolve` gives the validated form, whose fields have types.
Settings = dict[str, object]
DISCRIMINATORS = ("name", "shape")
"""The keys that choose which other keys stand beside them."""
FIRST = "pretraining"
"""The block with the settings of a first stage."""
OWN_OF_STAGE = ("head", "readout")
"""What of its model a first stage has for itself; the encoder is that of the trial."""
TASK = "task"
"""The setting that chooses which blocks there are."""
SHARED = tuple(RunSettings.model_fields)
"""The blocks that every task has; another task keeps them, as far as they mean the same."""


def resolve(settings: Mapping[str, object]) -> RunSettings:
    """Validate nested `settings`; the first mistake becomes a UserError that names the setting and the value."""
    name = task_of(settings)
    kind: type[RunSettings] = find_task(name).settings
    given = {**_with_own_defaults(kind, settings), TASK: name}
    if given.get(FIRST) is not None:
        given[FIRST] = _first_stage(given[FIRST])
    try:
        made = kind.model_validate(given)
        return made if made.pretraining is None else _with_encoder(made, made.pretraining)
    except ValidationError as error:
        raise UserError(_explain(error, name)) from None


def check_settings(settings: RunSettings) -> None:
    """Let the task refuse what validation alone cannot refuse, and the task of the first stage, too.

    Raises:
        UserError: naming the setting, and what would be right.
    """
    find_task(settings.task).check(settings)
    if settings.pretraining is not None:
        try:
            find_task(settings.pretraining.task).check(settings.pretraining)
        except UserError as error:
            raise UserError(f"in '{FIRST}': {error}") from None


def needed_maps(settings: RunSettings) -> tuple[str, ...]:
    """The maps of classes that a training reads beside the volumes, with its first stage and its judgement."""
    stages = [settings] if settings.pretraining is None else [settings, settings.pretraining]
    of_training = [name for each in stages for name in find_task(each.task).needed_maps(each)]
    return tuple(dict.fromkeys([*of_training, *find_task(settings.task).maps_to_judge(settings)]))


def _first_stage(settings: object) -> RunSettings:
    """The settings of a first stage; UserError if it is none."""
    if isinstance(settings, RunSettings):
        return settings
    if not isinstance(settings, Mapping) or TASK not in settings:
        raise UserError(
            f"setting '{FIRST}': a first stage has settings of its own, and pretraining.task names its task"
        )
    try:
        stage = resolve(settings)
    except UserError as error:
        raise UserError(f"in '{FIRST}': {error}") from None
    if stage.pretraining is not None or stage.begin != BeginSettings():
        raise UserError(
            f"a first stage has no first stage, and starts where the trial starts: remove {FIRST}.{FIRST} and "
            f"{FIRST}.begin, and set begin.weights"
        )
    evaluation = getattr(stage, "evaluation", None)
    judged = [name for name in ("probes", "target", "disease") if getattr(evaluation, name, None)]
    if stage.training.keep != "last" or stage.data.labelled is not None or judged:
        raise UserError(
            f"a first stage is not judged and has all labels of its cell: remove {FIRST}.training.keep, "
            f"{FIRST}.data.labelled and {FIRST}.evaluation.{judged[0] if judged else 'probes'}"
        )
    return stage


def _with_encoder(settings: RunSettings, stage: RunSettings) -> RunSettings:
    """The settings with a first stage whose encoder is that of the trial."""
    network, own = getattr(settings, "model", None), getattr(stage, "model", None)
    if network is None or own is None:
        return settings
    # What segments has an encoder inside, for a first stage that trains encoders.
    taken = get_args(type(stage).model_fields["model"].annotation)
    encoder = network if type(network) in taken else encoder_of(network)
    if taken and type(encoder) not in taken:
        raise UserError(
            f"{FIRST}.{TASK}={stage.task} cannot come before model.name={getattr(network, 'name', '')}, which has no "
            "encoder of its kind; use another model, such as "
            f"{', '.join(each.model_fields['name'].default for each in taken if 'name' in each.model_fields)}"
        )
    kept = {
        name: getattr(own, name) for name in OWN_OF_STAGE if hasattr(own, name) and hasattr(encoder, name)
    }
    model = encoder.model_copy(update=kept)
    return settings.model_copy(update={FIRST: stage.model_copy(update={"model": model})})


def _with_own_defaults(kind: type[RunSettings], settings: Mapping[str, object]) -> Settings:
    """`settings` in which a block that names no choice, such as {"width": 0.25} of a model, is of the default one."""
    whole = dict(settings)
    for field, about in kind.model_fields.items():
        given, default = settings.get(field), about.get_default(call_default_factory=True)
        if isinstance(given, Mapping) and isinstance(default, BaseModel):
            chosen = default.model_dump(mode="json")
            if any(key in chosen and key not in given for key in DISCRIMINATORS):
                whole[field] = chosen | dict(given)
    return whole


def task_of(settings: Mapping[str, object]) -> str:
    """The task of nested `settings`: brain age if they name none, as those of the first versions."""
    return str(settings.get(TASK) or BRAIN_AGE.name)


def merge(base: Mapping[str, object], changes: Mapping[str, object]) -> Settings:
    """`base` with dotted `changes` applied.

    A change of a `name` or `shape` (another objective, another schedule) drops the settings that stood
    beside the old one: they belong to it. The new one starts from its own defaults. No `shape` at all
    (None) removes the block: `objective.neighbours.shape=None` is `objective.neighbours=None`. Another `task`
    drops all blocks that belong to the old one.
    """
    merged = copy.deepcopy(dict(base))
    for path in sorted(changes, key=_outer_choices_first):
        _assign(merged, path.split("."), changes[path])
    return merged


def flatten(settings: Mapping[str, object], prefix: str = "") -> Settings:
    """Nested settings as {dotted name: value}; lists are values."""
    flat: Settings = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def with_absent(flat: Mapping[str, object]) -> Settings:
    """`flat` settings, with None for every name beneath one of them.

    A block that is None has nothing in it, and a number that could have been a schedule has no shape and no ends.
    """
    beneath = {
        name: None
        for name in known_names(flat.get(TASK))
        if any(name.startswith(f"{given}.") for given in flat)
    }
    return beneath | dict(flat)


def parse_changes(assignments: list[str], task: str | None = None) -> Settings:
    """`["optimiser.learning_rate=1e-3", …]` (the command line's `--set`) as {dotted name: value}.

    Args:
        assignments: as they were typed.
        task: the one whose settings they are; any of ours if None.

    Raises:
        UserError: an assignment without `=`, or a name no setting has.
    """
    known = known_names(task)
    changes: Settings = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} has no '='; write --set optimiser.learning_rate=1e-3")
        path = path.strip()
        if path not in known:
            raise UserError(_unknown(path, known))
        changes[path] = _parse_value(text.strip())
    return changes


def read_settings(path: Path) -> Settings:
    """Nested settings from a YAML file."""
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read settings from {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(
            f"settings in {path} must be a mapping of names to values, got {type(settings).__name__}"
        )
    return settings


@functools.cache
def known_names(task: object = None) -> frozenset[str]:
    """The dotted name of every setting that some configuration has: of a task, or of all of ours."""
    kinds = [each.settings for each in (TASKS.values() if task is None else [find_task(task)])]
    # A first stage has the encoder of the trial.
    stages = [
        f"{FIRST}.{name}"
        for each in TASKS.values()
        for name in _names_of(each.settings)
        if not name.startswith("model.") or name.startswith(tuple(f"model.{own}" for own in OWN_OF_STAGE))
    ]
    return frozenset([*(name for kind in kinds for name in _names_of(kind)), *stages])


def _names_of(annotation: object, prefix: str = "") -> Iterator[str]:
    """Dotted names under a type: models are walked, unions give the names of all their members."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for member in get_args(annotation):
            yield from _names_of(member, prefix)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            if name == FIRST:
                # It holds the settings of any task: see `known_names`.
                continue
            yield from _names_of(field.annotation, f"{prefix}{name}.")


def _outer_choices_first(path: str) -> tuple[bool, int, str]:
    """Sort key: what chooses comes before what it chooses, an outer choice before an inner one."""
    return path.rsplit(".", 1)[-1] not in (TASK, *DISCRIMINATORS), path.count("."), path


def _assign(settings: Settings, path: list[str], value: object) -> None:
    """Set `path` in nested settings, in place; see `merge` for what a discriminator does."""
    *parents, key = path
    if key in DISCRIMINATORS and value is None:
        _assign(settings, parents, None)
        return
    block = settings
    for parent in parents:
        inner = block.get(parent)
        if not isinstance(inner, dict):
            inner = block[parent] = {}
        block = inner
    if key == TASK and task_of(block) != value:
        for of_old_task in block.keys() - SHARED:
            del block[of_old_task]
    if key in DISCRIMINATORS and block.get(key, value) != value:
        block.clear()
    block[key] = value


def _parse_value(text: str) -> object:
    """A value typed by a person: YAML, but `1e-3` is a number (YAML 1.1 reads it as text)."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _explain(error: ValidationError, task: str) -> str:
    """The first validation mistake in the settings of a task, in one line for people."""
    first, known = error.errors()[0], known_names(task)
    # The location of a discriminated union holds the chosen tag, and that of a plain union the type tried.
    path = _setting_name([str(part) for part in first["loc"]], known)
    if first["type"] == "extra_forbidden":
        if path in known:
            return f"setting '{path}' cannot act here (it belongs to another choice beside it); remove it"
        others = [name for name, each in TASKS.items() if path in _names_of(each.settings)]
        if others:
            return f"the task {task} has no setting '{path}' (it belongs to {', '.join(others)}); remove it"
        return _unknown(path, known)
    if first["type"] == "union_tag_invalid":
        key = str(first["ctx"]["discriminator"]).strip("'")
        choices = [tag.strip(" '") for tag in str(first["ctx"]["expected_tags"]).split(",")]
        return f"setting '{path}.{key}': unknown '{first['ctx']['tag']}'; {did_you_mean(first['ctx']['tag'], choices)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"setting '{path}': {message[:1].lower()}{message[1:]}, got {first['input']!r}"


def _unknown(path: str, known: frozenset[str]) -> str:
    """What to say of a name that no setting has."""
    similar = similar_settings(path, known)
    if not similar:
        return f"unknown setting '{path}'; `brainsweep settings WORD` finds what there is"
    return f"unknown setting '{path}'; did you mean {' or '.join(repr(each) for each in similar)}?"


def _setting_name(location: list[str], known: frozenset[str]) -> str:
    """The longest of the `known` dotted names that the location spells when tags are left out."""
    path = ""
    for part in location[:-1]:
        candidate = f"{path}.{part}" if path else part
        if candidate in known:
            path = candidate
    last = f"{path}.{location[-1]}" if path else location[-1]
    is_tag = (
        path
        and last not in known
        and location[-1]
        in ("float", "int", "str", "constrained-float", "constrained-int", "number", "piecewise")
    )
    return path if is_tag else last
