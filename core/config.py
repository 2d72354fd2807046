"""The settings of one training run, and how people change them.

`RunSettings` is what a trial *is*: frozen, validated, without unknown keys. Every setting has one dotted name
(`optimiser.learning_rate`), the same in `--set`, in a search space, in a YAML file and in every table.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.errors import UserError
from core.lookup import did_you_mean
from core.losses.members import Exponential
from core.losses.settings import ObjectiveSettings
from core.models.settings import ModelSettings, ResNetSettings
from core.schedules import ByKind, Number, Pieces, Piecewise, Schedule, Step
from core.volumes.views import ViewSettings

# Nested to any depth; `resolve` gives the validated form, whose fields have types.
Settings = dict[str, object]
DISCRIMINATORS = ("name", "shape")
"""The keys that choose which other keys stand beside them."""


class Frozen(BaseModel):
    """A settings block: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Frozen):
    """What is taken from the cohort, and how its intensities are brought to one scale."""

    channels: tuple[str, ...] | None = Field(None, description="channels of the cohort to use; all if absent")
    normalise: Literal["training", "per_volume", "none"] = Field(
        "training",
        description="z-score of non-zero voxels: statistics of the training subjects, of each volume, or none",
    )


def _all_above(bound: float, *, itself: bool) -> AfterValidator:
    """A check that every value of a piecewise schedule is above `bound`, or equal to it if `itself` is true."""

    def check(schedule: Piecewise) -> Piecewise:
        if min(schedule.values) < bound or (not itself and bound in schedule.values):
            raise ValueError(f"values must be {'at least' if itself else 'above'} {bound:g}")
        return schedule

    return AfterValidator(check)


PositiveNumber = Annotated[float, Field(gt=0), Number]
PositivePieces = Annotated[Piecewise, _all_above(0, itself=False), Pieces]
NonNegativeNumber = Annotated[float, Field(ge=0), Number]
NonNegativePieces = Annotated[Piecewise, _all_above(0, itself=True), Pieces]


class _EveryOptimiser(Frozen):
    """What every optimiser can be given."""

    name: str
    learning_rate: Annotated[PositiveNumber | PositivePieces, ByKind] = Field(
        1e-4,
        description="before decay and warm-up; piecewise where a population changed it during the training",
    )
    weight_decay: Annotated[NonNegativeNumber | NonNegativePieces, ByKind] = Field(
        5e-5, description="a number, or piecewise as above"
    )
    decay: Schedule = Field(
        Step(start=1.0, rate=0.9, step=10), description="factor on the learning rate over progress, from 1"
    )
    warmup: float = Field(
        0.0, ge=0, lt=1, description="share of the epochs in which the learning rate rises from 1 % of itself"
    )


class AdamSettings(_EveryOptimiser):
    """Adam with decoupled weight decay off, as the references use it."""

    name: Literal["adam"] = "adam"


class SgdSettings(_EveryOptimiser):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)


OptimiserSettings = Annotated[AdamSettings | SgdSettings, Field(discriminator="name")]


class TrainingSettings(Frozen):
    """The length of a run and the arithmetic of its steps."""

    epochs: int = Field(50, ge=1)
    batch_size: int = Field(32, ge=2, description="subjects per step, over all workers")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs that have it, else float32"
    )
    drop_last: bool = Field(False, description="leave out the last batch of an epoch if it is smaller")
    gradient_clip: float | None = Field(None, gt=0, description="largest gradient norm; none if absent")


class RunSettings(Frozen):
    """One configuration: what a trial trains, on any fold and seed."""

    task: Literal["brain_age"] = "brain_age"
    data: DataSettings = DataSettings()
    views: ViewSettings = ViewSettings()
    model: ModelSettings = ResNetSettings()
    objective: ObjectiveSettings = Exponential()
    optimiser: OptimiserSettings = AdamSettings()
    training: TrainingSettings = TrainingSettings()


def resolve(settings: Mapping[str, object]) -> RunSettings:
    """Validate nested `settings`; the first mistake becomes a UserError that names the setting and the value."""
    try:
        return RunSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def merge(base: Mapping[str, object], changes: Mapping[str, object]) -> Settings:
    """`base` with dotted `changes` applied.

    A change of a `name` or `shape` (another objective, another schedule) drops the settings that stood
    beside the old one: they belong to it. The new one starts from its own defaults. No `shape` at all
    (None) removes the block: `objective.neighbours.shape=None` is `objective.neighbours=None`.
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
    beneath = {name: None for name in known_names() if any(name.startswith(f"{given}.") for given in flat)}
    return beneath | dict(flat)


def parse_changes(assignments: list[str]) -> Settings:
    """`["optimiser.learning_rate=1e-3", …]` (the command line's `--set`) as {dotted name: value}.

    Raises:
        UserError: an assignment without `=`, or a name no setting has.
    """
    changes: Settings = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} has no '='; write --set optimiser.learning_rate=1e-3")
        path = path.strip()
        if path not in known_names():
            raise UserError(f"unknown setting '{path}'; {did_you_mean(path, known_names())}")
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
def known_names() -> frozenset[str]:
    """The dotted name of every setting that some configuration has."""
    return frozenset(_names_of(RunSettings))


def _names_of(annotation: object, prefix: str = "") -> Iterator[str]:
    """Dotted names under a type: models are walked, unions give the names of all their members."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for member in get_args(annotation):
            yield from _names_of(member, prefix)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from _names_of(field.annotation, f"{prefix}{name}.")


def _outer_choices_first(path: str) -> tuple[bool, int, str]:
    """Sort key: what chooses comes before what it chooses, an outer choice before an inner one."""
    return path.rsplit(".", 1)[-1] not in DISCRIMINATORS, path.count("."), path


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


def _explain(error: ValidationError) -> str:
    """The first validation mistake in one line for people."""
    first = error.errors()[0]
    # The location of a discriminated union holds the chosen tag, and that of a plain union the type tried.
    path = _setting_name([str(part) for part in first["loc"]])
    if first["type"] == "extra_forbidden":
        if path in known_names():
            return f"setting '{path}' cannot act here (it belongs to another choice beside it); remove it"
        return f"unknown setting '{path}'; {did_you_mean(path, known_names())}"
    if first["type"] == "union_tag_invalid":
        key = str(first["ctx"]["discriminator"]).strip("'")
        choices = [tag.strip(" '") for tag in str(first["ctx"]["expected_tags"]).split(",")]
        return f"setting '{path}.{key}': unknown '{first['ctx']['tag']}'; {did_you_mean(first['ctx']['tag'], choices)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"setting '{path}': {message[:1].lower()}{message[1:]}, got {first['input']!r}"


def _setting_name(location: list[str]) -> str:
    """The longest dotted name that the location spells when tags are left out."""
    path = ""
    for part in location[:-1]:
        candidate = f"{path}.{part}" if path else part
        if candidate in known_names():
            path = candidate
    last = f"{path}.{location[-1]}" if path else location[-1]
    is_tag = (
        path
        and last not in known_names()
        and location[-1]
        in ("float", "int", "str", "constrained-float", "constrained-int", "number", "piecewise")
    )
    return path if is_tag else last
