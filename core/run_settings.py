"""The settings that every task has: what is taken from the cohort, the optimiser, and the length of a run.

A task adds its own blocks (`core.tasks`). `core.config` reads settings, changes and checks them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from core.errors import UserError
from core.models.weights import Freeze, Take
from core.schedules import ByKind, Number, Pieces, Piecewise, Schedule, Step
from core.volumes.images.intensity import parse_intensity


class Frozen(BaseModel):
    """A settings block: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Frozen):
    """What is taken from the cohort, and how its intensities are brought to one scale."""

    channels: tuple[str, ...] | None = Field(None, description="channels of the cohort to use; all if absent")
    labelled: Annotated[int, Field(ge=2)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="how many training subjects of a cell keep their label, or which share; all if absent. A smaller "
        "number takes a part of the subjects of a larger one, balanced as the folds are",
    )
    normalise: str = Field(
        "training",
        pattern="^(training|per_volume|none|window:.+)$",
        description="training, per_volume: z-score of non-zero voxels, by statistics of the training subjects or of "
        "each volume; none; window:LOW,HIGH, or window:ct, ct_brain: grey values between both ends become 0 to 1",
    )

    @field_validator("normalise")
    @classmethod
    def _a_window(cls, normalise: str) -> str:
        if normalise.startswith("window:"):
            try:
                parse_intensity(normalise)
            except UserError as error:
                raise ValueError(str(error)) from None
        return normalise


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


class PlateauSettings(Frozen):
    """When the learning rate falls because a loss does not; as `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    A loss of the subjects that a cell is judged on would choose for them: that of an inner split of the training
    subjects takes its place.
    """

    watches: Literal["training", "inner"] = Field(
        "training",
        description="the loss of the training, or that of an inner split (training.inner), drawn alike in every epoch",
    )
    factor: float = Field(0.1, gt=0, lt=1, description="of the learning rate, every time")
    patience: int = Field(10, ge=0, description="epochs without improvement before it falls")
    threshold: float = Field(1e-4, ge=0, description="relative improvement that counts")
    lowest: float = Field(0.0, ge=0, description="factor below which it does not fall")


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
    warmup_steps: int = Field(
        0,
        ge=0,
        description="the same in optimiser steps: it rises with every step, from 1/warmup_steps of itself",
    )
    no_decay: Literal["none", "norms_and_biases"] = Field(
        "none", description="parameters without weight decay: a group of their own"
    )
    plateau: PlateauSettings | None = Field(
        None, description="lower the learning rate when a loss has stopped falling; off if absent"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> _EveryOptimiser:
        if self.warmup and self.warmup_steps:
            raise ValueError("warmup and warmup_steps exclude each other; give one")
        return self


class AdamSettings(_EveryOptimiser):
    """Adam with decoupled weight decay off, as the references use it."""

    name: Literal["adam"] = "adam"


class AdamWSettings(_EveryOptimiser):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"


class SgdSettings(_EveryOptimiser):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that the next one keeps")


OptimiserSettings = Annotated[AdamSettings | AdamWSettings | SgdSettings, Field(discriminator="name")]


class TrainingSettings(Frozen):
    """The length of a run and the arithmetic of its steps."""

    epochs: int = Field(50, ge=1, description="passes over the training subjects of a cell")
    steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps of a run, in place of epochs; judge_every of them count as an epoch",
    )
    judge_every: int | None = Field(
        None, ge=1, description="optimiser steps between two judgements, if the length is given in steps"
    )
    batch_size: int = Field(32, ge=2, description="subjects per batch, over all workers")
    accumulate: int = Field(
        1,
        ge=1,
        description="batches per optimiser step: their gradients are averaged, so a step needs less memory",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 autocast on GPUs that have it, else float32; float16: with a scaled loss, for GPUs "
        "without bfloat16 (T4, V100)",
    )
    drop_last: bool = Field(False, description="leave out the last batch of an epoch if it is smaller")
    gradient_clip: float | None = Field(None, gt=0, description="largest gradient norm; none if absent")
    keep: Literal["last", "best"] = Field(
        "last",
        description="which weights of a cell are judged: those of its last epoch, or of the epoch that was best on an "
        "inner split of its training subjects",
    )
    inner: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the training subjects in the inner split, for keep=best and "
        "optimiser.plateau.watches=inner",
    )

    @model_validator(mode="after")
    def _steps_are_whole(self) -> TrainingSettings:
        if (self.steps is None) != (self.judge_every is None):
            raise ValueError("steps and judge_every belong together; give both, or neither")
        if self.steps is not None and self.judge_every is not None and self.steps % self.judge_every:
            raise ValueError(
                f"steps must be a multiple of judge_every, got {self.steps} and {self.judge_every}"
            )
        return self

    @property
    def rounds(self) -> int:
        """How often a cell is judged: its epochs, or its steps by `judge_every`. Everything counts them as epochs."""
        return (
            self.epochs if self.steps is None or self.judge_every is None else self.steps // self.judge_every
        )


class BeginSettings(Frozen):
    """Which weights a training starts from, what is taken of them, and how that part is trained further."""

    weights: str | None = Field(
        None,
        description="a RUN, a .safetensors or a PyTorch file; random weights if absent. A run keeps a copy under "
        "NAME#HASH",
    )
    take: Take = Field("encoder", description="the parts of the model that start from these weights")
    rename: tuple[Annotated[str, Field(pattern="^[^=]*=[^=]*$")], ...] = Field(
        (), description="THEIRS=OURS: what names in the file begin with, and what they are to begin with here"
    )
    freeze: Freeze = Field(
        "none", description="parts that are not trained; their batch norm keeps its statistics"
    )
    thaw: float | None = Field(
        None, gt=0, lt=1, description="progress after which frozen parts are trained, too; never if absent"
    )
    rate: float = Field(1.0, gt=0, description="factor on the learning rate of the encoder")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on it from each layer of the encoder to the one before"
    )

    @model_validator(mode="after")
    def _acts(self) -> BeginSettings:
        if self.thaw is not None and self.freeze == "none":
            raise ValueError(f"thaw={self.thaw:g} cannot act where nothing is frozen; set freeze, too")
        return self


class RunSettings(Frozen):
    """One configuration: what a trial trains, on any fold and seed. A task adds its blocks, and says its name."""

    task: str
    begin: BeginSettings = BeginSettings()
    pretraining: SerializeAsAny[InstanceOf[RunSettings]] | None = Field(
        None,
        description="settings of another training, with a task of its own, that comes first in every cell; the model "
        "then begins with its weights",
    )
    data: DataSettings = DataSettings()
    optimiser: OptimiserSettings = AdamSettings()
    training: TrainingSettings = TrainingSettings()
