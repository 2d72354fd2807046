"""The settings that every task has: what is taken from the cohort, the optimiser, and the length of a run.

A task adds its own blocks (`core.tasks`). `core.config` reads settings, changes and checks them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from core.schedules import ByKind, Number, Pieces, Piecewise, Schedule, Step


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
    """One configuration: what a trial trains, on any fold and seed. A task adds its blocks, and says its name."""

    task: str
    data: DataSettings = DataSettings()
    optimiser: OptimiserSettings = AdamSettings()
    training: TrainingSettings = TrainingSettings()
