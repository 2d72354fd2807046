"""A value over the progress of training: one type for learning rates, temperatures, kernel widths,
neighbour counts and loss weights.

Progress is a number in [0, 1]. Epoch e of E (e = 1 … E) has progress e/E, and 0 is the state before
training. A schedule is a plain callable, so it can be printed, plotted and compared:

    temperature = as_schedule({"shape": "linear", "start": 0.2, "end": 0.05})
    temperature(0.5)  # 0.125

The shapes that count epochs (`step`, `staircase`) need to know how many there are. A configuration may
leave `epochs` out, and `with_epochs` fills it in when the length of the run is known.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapSerializer,
    field_validator,
)

from core.errors import UserError


class _Shape(BaseModel):
    """What the shapes share: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Constant(_Shape):
    """The same value throughout."""

    shape: Literal["constant"] = "constant"
    value: float = Field(description="the value, in the unit of what is scheduled")

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        _check(progress)
        return self.value


class Linear(_Shape):
    """A straight line from `start` at progress 0 to `end` at progress 1."""

    shape: Literal["linear"] = "linear"
    start: float = Field(description="value at progress 0")
    end: float = Field(description="value at progress 1")

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        progress = _check(progress)
        return (1 - progress) * self.start + progress * self.end


class Cosine(_Shape):
    """Half a cosine from `start` to `end`, flat at both ends: end + (start − end)(1 + cos πp)/2."""

    shape: Literal["cosine"] = "cosine"
    start: float = Field(description="value at progress 0")
    end: float = Field(description="value at progress 1")

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        progress = _check(progress)
        share = (1 + math.cos(math.pi * progress)) / 2
        return share * self.start + (1 - share) * self.end


class Exponential(_Shape):
    """A constant ratio per unit of progress: start · (end/start)^p. Both ends are above 0."""

    shape: Literal["exponential"] = "exponential"
    start: float = Field(gt=0, description="value at progress 0, above 0")
    end: float = Field(gt=0, description="value at progress 1, above 0")

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        progress = _check(progress)
        value: float = self.start ** (1 - progress) * self.end**progress
        return value


class Polynomial(_Shape):
    """A power of what is left: end + (start − end)(1 − p)^power; 0.9 is that of nnU-Net (Isensee et al. 2021)."""

    shape: Literal["polynomial"] = "polynomial"
    start: float = Field(description="value at progress 0")
    end: float = Field(0.0, description="value at progress 1")
    power: float = Field(0.9, gt=0, description="above 0; 1 is a straight line")

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        progress = _check(progress)
        left: float = (1 - progress) ** self.power
        return self.end + (self.start - self.end) * left


class Step(_Shape):
    """Multiplied by `rate` every `step` epochs: start · rate^⌊(e − 1)/step⌋ in epoch e.

    With step 10 the value drops in epochs 11, 21, …, as in the released code of Dynamic Localised
    Repulsion. While an epoch is under way (a fractional e) it has the value of that epoch.
    """

    shape: Literal["step"] = "step"
    start: float = Field(description="value in the first epoch")
    rate: float = Field(gt=0, description="factor applied at each drop, above 0")
    step: int = Field(ge=1, description="epochs between drops")
    epochs: int | None = Field(None, ge=1, description="epochs of the whole run; None: filled in by the run")

    def __call__(self, progress: float) -> float:
        """The value at `progress`; raises UserError while `epochs` is None."""
        epoch = _epoch_under_way(progress, self.epochs, self.shape)
        return self.start * self.rate ** (max(epoch - 1, 0) // self.step)


class Staircase(_Shape):
    """From `start` to `end` in equal stages of `step` epochs.

    In epoch e of E, with q = ⌊e/step⌋ and T = ⌊E/step⌋: start − q (start − end)/(T − 1), never past
    `end`. This is the neighbour staircase of the released code of Dynamic Localised Repulsion
    (arXiv 2408.00527), whose first stage is one epoch short. There T = 1 divides by zero; here a run too
    short for two stages (T < 2) stays at `start`. Where both ends are whole numbers (counts: 32, not
    32.0) every stage is truncated to one, as in that code.
    """

    shape: Literal["staircase"] = "staircase"
    start: int | float = Field(description="value of the first stage")
    end: int | float = Field(description="value of the last stage")
    step: int = Field(ge=1, description="epochs per stage")
    epochs: int | None = Field(None, ge=1, description="epochs of the whole run; None: filled in by the run")

    def __call__(self, progress: float) -> float:
        """The value at `progress`; raises UserError while `epochs` is None."""
        epoch = _epoch_under_way(progress, self.epochs, self.shape)
        stages = (self.epochs or 0) // self.step
        if stages < 2:
            return self.start
        value = self.start - (self.start - self.end) / (stages - 1) * (epoch // self.step)
        if isinstance(self.start, int) and isinstance(self.end, int):
            value = math.trunc(value)
        return max(value, self.end) if self.end <= self.start else min(value, self.end)


class Piecewise(_Shape):
    """One constant after another: `values[i]` up to and including progress `until[i]`, the last one to the end.

    A population that changes settings while it trains writes down such a schedule (see `then`). A change after
    epoch e of E is at progress e/E, so epoch e + 1 is the first that has the new value.
    """

    shape: Literal["piecewise"] = "piecewise"
    values: tuple[float, ...] = Field(description="the values, in order; at least one")
    until: tuple[float, ...] = Field(
        (),
        validate_default=True,
        description="progress at which each value but the last ends: rising, between 0 and 1",
    )

    @field_validator("values", "until", mode="before")
    @classmethod
    def _is_a_list(cls, given: object, about: ValidationInfo) -> object:
        if not isinstance(given, list | tuple):
            example = "[0.1, 0.05]" if about.field_name == "values" else "[0.5]"
            raise ValueError(f"must be a list of numbers, such as {example}")
        if about.field_name == "values" and not given:
            raise ValueError("must hold at least one number")
        return given

    @field_validator("until")
    @classmethod
    def _pieces_follow_each_other(cls, until: tuple[float, ...], about: ValidationInfo) -> tuple[float, ...]:
        values = about.data.get("values")
        # `values` is wrong itself, and its own error is the one that people see.
        if values is None:
            return until
        if len(until) != len(values) - 1:
            raise ValueError(
                f"must hold one number fewer than values, which are {len(values)}: "
                "the progress at which each but the last ends"
            )
        if any(before >= after for before, after in pairwise((0.0, *until, 1.0))):
            raise ValueError("must rise, each number above 0 and below 1 (epoch e of E is e/E)")
        return until

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        # 3/10 of one run and 0.3 of another may differ in the last bit
        return self.values[bisect_left(self.until, _check(progress) - 1e-9)]


def _number_or_pieces(value: object) -> str:
    return "piecewise" if isinstance(value, Mapping | Piecewise) else "number"


Number = Tag("number")
Pieces = Tag("piecewise")
ByKind = Discriminator(_number_or_pieces)
"""`Annotated[Annotated[float, Number] | Annotated[Piecewise, Pieces], ByKind]`: a number or a piecewise schedule.

Of a wrong block, a plain union would say that it is not a number, and not what is wrong in it.
"""

Shape = Constant | Linear | Cosine | Exponential | Polynomial | Step | Staircase | Piecewise


def _number_as_constant(value: object) -> object:
    """A bare number in a configuration stands for a constant."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"shape": "constant", "value": value}
    return value


def _constant_as_number(schedule: Shape, serialise: SerializerFunctionWrapHandler) -> object:
    """A constant is written as a bare number."""
    return schedule.value if isinstance(schedule, Constant) else serialise(schedule)


Schedule = Annotated[
    Shape,
    Field(discriminator="shape"),
    BeforeValidator(_number_as_constant),
    WrapSerializer(_constant_as_number),
]
"""A pydantic field type: any of the shapes, chosen by `shape`; a bare number means a constant."""

_ADAPTER: TypeAdapter[Shape] = TypeAdapter(Schedule)


def as_schedule(value: float | Mapping[str, object] | Shape, name: str = "schedule") -> Shape:
    """A schedule from a number, a mapping with a `shape`, or a schedule.

    Raises UserError naming `name`, the field at fault and its value.
    """
    try:
        return _ADAPTER.validate_python(dict(value) if isinstance(value, Mapping) else value)
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error, value)}") from None


def with_epochs(schedule: Shape, epochs: int) -> Shape:
    """`schedule`, with the length of the run filled in where the shape counts epochs and it is missing."""
    if isinstance(schedule, Step | Staircase) and schedule.epochs is None:
        return schedule.model_copy(update={"epochs": epochs})
    return schedule


def at(value: float | Piecewise, progress: float) -> float:
    """The value at `progress` of a setting that is a number or a piecewise schedule."""
    return value(progress) if isinstance(value, Piecewise) else value


def then(value: float | Mapping[str, object], progress: float, new: float) -> float | dict[str, object]:
    """`value`, a number or a piecewise schedule as settings hold it, up to `progress` in (0, 1), then `new`.

    Raises UserError for another schedule, and for one that changes after `progress` itself.
    """
    if isinstance(value, Mapping):
        if "values" not in value:
            raise UserError(f"only a number or a piecewise schedule can be changed on the way, got {value!r}")
        pieces = Piecewise.model_validate(value)
    else:
        pieces = Piecewise(values=(value,))
    if new == pieces.values[-1]:
        return dict(value) if isinstance(value, Mapping) else value
    changed = Piecewise(values=(*pieces.values, new), until=(*pieces.until, progress))
    return changed.model_dump(mode="json")


def _check(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise UserError(f"progress must lie in [0, 1] (epoch e of E is e/E), got {progress}")
    return progress


def _epoch_under_way(progress: float, epochs: int | None, shape: str) -> int:
    """The epoch e (1-based, 0 before training) that `progress` lies in: (e − 1)/E < progress <= e/E."""
    _check(progress)
    if epochs is None:
        raise UserError(
            f"a {shape} schedule counts epochs, but its epochs is None; give it or use with_epochs"
        )
    # e/E * E can exceed e by rounding, which would start the next epoch.
    return math.ceil(round(progress * epochs, 6))


def _first_problem(error: ValidationError, value: object) -> str:
    problem = error.errors()[0]
    if problem["type"].startswith("union_tag"):
        shapes = ", ".join(member.model_fields["shape"].default for member in get_args(Shape))
        return f"shape must be one of {shapes}, got {value!r}"
    field = ".".join(str(part) for part in problem["loc"][1:])
    if not field:
        return (
            f"must be a number, or a mapping such as {{shape: linear, start: 0.2, end: 0.05}}, got {value!r}"
        )
    return f"{field}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"
