"""The members of the pairwise family: what can be set for each, and the parts that make it.

A field exists only where it can act, so a run configuration refuses, say, a kernel for SimCLR. Defaults are
the published ones. `reference` restores what a released code does where it departs from its formula:
`dynlocrep` (CoderJacques/BrainAge_DynLocRep) and `barbano` (EIDOSLAB/contrastive-brain-age-prediction) both
multiply the loss by temperature/0.07 and differ in how they normalise; `rnc` pins Rank-N-Contrast to its
publication.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from core.lookup import look_up
from core.losses.kernels import (
    KERNELS,
    PUBLISHED_KERNELS,
    PUBLISHED_RANKING_KERNELS,
    equal,
    everyone,
)
from core.losses.neighbourhood import Neighbours
from core.losses.pairwise import (
    PairwiseLoss,
    Parts,
    at_least_as_far_repel,
    farther_repel,
    rank_counts_repel,
)
from core.losses.regression import RegressionLoss
from core.schedules import Constant, Schedule, with_epochs

KernelName = Literal["equal", "rbf", "gaussian", "cauchy", "laplace", "epanechnikov"]
Normalise = Literal["anchor", "total"]
Reference = Literal["dynlocrep", "barbano", "rnc"]

# Fields that some members have.
BrainAgeReference = Annotated[
    Literal["dynlocrep", "barbano"] | None,
    Field(description="a released code to reproduce; None: the formula"),
]
OptionalNormalise = Annotated[
    Normalise | None,
    Field(
        description="mean over anchors, or over the total weight; None: anchor, or what the reference does"
    ),
]


class LossSettings(BaseModel, ABC):
    """What the settings of every loss share: immutable, and only fields that can act."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str

    @abstractmethod
    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module; `epochs` fills in schedules that count epochs and were not told how many."""


class SharedParts(TypedDict):
    """The parts that every pairwise loss takes from its settings as they are."""

    temperature: Schedule
    neighbours: Neighbours | None
    chunk_rows: int | None


class PairwiseSettings(LossSettings):
    """What every pairwise loss can be given; a member adds its name, its fields and its parts."""

    temperature: Schedule = Field(Constant(value=0.1), description="divides the similarity; above 0")
    neighbours: Neighbours | None = Field(
        None, description="contrast only with the nearest rows in embedding space; None: with every row"
    )
    chunk_rows: int | None = Field(
        None, ge=1, description="anchors computed at once, to save memory at the cost of time; None: all"
    )

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module; `epochs` fills in schedules that count epochs and were not told how many."""
        settings = self if epochs is None else _with_epochs(self, epochs)
        return PairwiseLoss(self.name, settings.parts())

    @abstractmethod
    def parts(self) -> Parts:
        """The parts that these settings mean."""

    def shared(self) -> SharedParts:
        """The parts that the fields of every pairwise loss mean, by name."""
        return {"temperature": self.temperature, "neighbours": self.neighbours, "chunk_rows": self.chunk_rows}


@dataclass(frozen=True)
class Release:
    """A released code: all that `reference` implies, wherever the code departs from the formula."""

    normalise: Normalise
    offset_self: bool = False
    """Whether each anchor's largest logit is subtracted before it is scaled."""
    base_temperature: float | None = None
    """The loss is multiplied by temperature / this."""
    localises: frozenset[str] = frozenset()
    """The losses that its neighbourhood acts on; in the others it changes nothing."""
    min_batch: int = 1
    """Below this many subjects, every row is eligible."""

    def check(self, settings: PublishedSettings) -> None:
        """Raise ValueError for a setting that cannot act in the released code, or has another value there."""
        if settings.neighbours is not None and settings.name not in self.localises:
            raise ValueError(
                f"neighbours cannot act on {settings.name} with reference '{settings.reference}'; "
                "leave one out"
            )
        pinned = {"normalise": self.normalise, "logit_offset": "self" if self.offset_self else "none"}
        for setting, value in pinned.items():
            # A loss has only the settings that can act on it.
            given = getattr(settings, setting, None)
            if given not in (None, value):
                raise ValueError(f"reference '{settings.reference}' means {setting} '{value}', got '{given}'")

    def restore(self, formula: Parts) -> Parts:
        """The parts of the released code, from those of the formula."""
        neighbours = formula.neighbours
        if neighbours is not None and neighbours.min_batch is None:
            neighbours = neighbours.model_copy(update={"min_batch": self.min_batch})
        return replace(
            formula,
            neighbours=neighbours,
            normalise=self.normalise,
            offset_self=self.offset_self,
            base_temperature=self.base_temperature,
        )


RELEASES: dict[Reference, Release] = {
    "dynlocrep": Release(
        "total",
        offset_self=True,
        base_temperature=0.07,
        localises=frozenset({"exponential"}),
        min_batch=32,
    ),
    "barbano": Release("anchor", offset_self=True, base_temperature=0.07),
    "rnc": Release("total"),
}


class PublishedSettings(PairwiseSettings):
    """A loss with a released code; a member says which codes have it, and gives the parts of its formula."""

    reference: Reference | None = None

    @model_validator(mode="after")
    def _reference_allows(self) -> PublishedSettings:
        if self.reference is not None:
            RELEASES[self.reference].check(self)
        return self

    def parts(self) -> Parts:
        """The parts of the formula, or what the released code makes of them."""
        formula = self.formula()
        return formula if self.reference is None else RELEASES[self.reference].restore(formula)

    @abstractmethod
    def formula(self) -> Parts:
        """The parts that the fields of this loss mean, before `Release.restore` changes what all losses share."""


class KernelSettings(PublishedSettings):
    """A loss whose attraction falls with the distance between labels."""

    reference: BrainAgeReference = None
    normalise: OptionalNormalise = None
    kernel: KernelName = Field("rbf", description="how attraction falls with label distance")
    width: Schedule | None = Field(
        None, description="kernel width in the unit of the label (years), above 0; None: 2, as published"
    )

    @model_validator(mode="after")
    def _width_acts(self) -> KernelSettings:
        if self.kernel == "equal" and self.width is not None:
            raise ValueError(f"width cannot act with kernel 'equal', got {self.width!r}; leave one out")
        if self.kernel == "gaussian" and self.reference is None:
            raise ValueError("kernel 'gaussian' is 'rbf' by another name without a reference; use rbf")
        return self

    def formula(self) -> Parts:
        """Attraction by the kernel; all rows repel."""
        kernels = KERNELS if self.reference is None else PUBLISHED_KERNELS
        return Parts(
            kernel=look_up(kernels, self.kernel, "kernel"),
            width=Constant(value=2.0) if self.width is None else self.width,
            normalise=self.normalise or "anchor",
            **self.shared(),
        )


class SimCLR(PublishedSettings):
    """NT-Xent (arXiv 2002.05709): the other views of a subject attract, all other rows repel."""

    name: Literal["simclr"] = "simclr"
    reference: BrainAgeReference = None

    def formula(self) -> Parts:
        """Without labels every subject is its own class."""
        return Parts(kernel=equal, labels="ignored", **self.shared())


class SupCon(PublishedSettings):
    """Supervised contrastive (arXiv 2004.11362): equal labels attract; without labels, SimCLR."""

    name: Literal["supcon"] = "supcon"
    reference: BrainAgeReference = None
    normalise: OptionalNormalise = None
    bin_width: float | None = Field(
        None,
        gt=0,
        description="years per bin for continuous ages, edges at its multiples; None: exact equality",
    )

    def formula(self) -> Parts:
        """The kernel is equality, of bins where bin_width is given."""
        return Parts(
            kernel=equal,
            labels="optional",
            bin_width=self.bin_width,
            normalise=self.normalise or "anchor",
            **self.shared(),
        )


class YAware(KernelSettings):
    """y-Aware (arXiv 2106.08808): near labels attract by a kernel, all rows repel.

    It is supcon with a kernel in place of equality; the limit of a kernel width of 0 is supcon.
    """

    name: Literal["y_aware"] = "y_aware"


class Threshold(KernelSettings):
    """Threshold (arXiv 2211.08326): k attracts against only those that are farther in label than k."""

    name: Literal["threshold"] = "threshold"

    def formula(self) -> Parts:
        """As published, one denominator per anchor weighs j by how many k are less similar to j."""
        formula = super().formula()
        if self.reference is None:
            return replace(formula, repulsion=farther_repel)
        return replace(formula, repulsion=rank_counts_repel, kernel=PUBLISHED_RANKING_KERNELS[self.kernel])


class Exponential(KernelSettings):
    """Exponential (arXiv 2211.08326): near labels repel less, exp(s(1 − w)).

    With neighbours it is Dynamic Localised Repulsion (arXiv 2408.00527). As published, each anchor's
    largest logit (its own, 1/temperature) is subtracted before 1 − w scales it, which does not cancel.
    """

    name: Literal["exponential"] = "exponential"
    logit_offset: Literal["none", "self"] | None = Field(
        None,
        description="subtract each anchor's own logit before scaling; None: none, or what the reference does",
    )

    def formula(self) -> Parts:
        """The exponent of each pair is scaled by 1 − w."""
        return replace(super().formula(), spare_positives=True, offset_self=self.logit_offset == "self")


class RankNContrast(PublishedSettings):
    """Rank-N-Contrast (arXiv 2210.01189): every pair attracts against all at least as far in label.

    The similarity is the negative Euclidean distance of the embeddings as they are, not normalised.
    """

    name: Literal["rank_n_contrast"] = "rank_n_contrast"
    temperature: Schedule = Field(Constant(value=2.0), description="divides the negative distance; above 0")
    reference: Literal["rnc"] | None = Field(None, description="rnc: as published, which has no neighbours")

    def formula(self) -> Parts:
        """The mean over all pairs that have a denominator."""
        return Parts(
            similarity="distance",
            kernel=everyone,
            repulsion=at_least_as_far_repel,
            normalise="total",
            **self.shared(),
        )


TargetScaling = Annotated[
    Literal["standard", "none"],
    Field(
        description="whether the network predicts (label - mean)/SD of the training subjects, or the label itself, as "
        "published for system B; the error is in the unit of the label in both cases"
    ),
]


class L1(LossSettings):
    """Regression baseline: mean absolute error of predicted labels, embeddings (B, V, 1)."""

    name: Literal["l1"] = "l1"
    target_scaling: TargetScaling = "standard"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return RegressionLoss("l1")


class MSE(LossSettings):
    """Regression baseline: mean squared error of predicted labels, embeddings (B, V, 1)."""

    name: Literal["mse"] = "mse"
    target_scaling: TargetScaling = "standard"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return RegressionLoss("mse")


def _with_epochs(settings: PairwiseSettings, epochs: int) -> PairwiseSettings:
    """A copy in which every schedule that counts epochs knows how many there are."""
    update: dict[str, object] = {"temperature": with_epochs(settings.temperature, epochs)}
    if settings.neighbours is not None:
        update["neighbours"] = settings.neighbours.with_epochs(epochs)
    if isinstance(settings, KernelSettings) and settings.width is not None:
        update["width"] = with_epochs(settings.width, epochs)
    return settings.model_copy(update=update)
