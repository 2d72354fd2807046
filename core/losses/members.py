"""The members of the pairwise family: what can be set for each, and the parts that make it.

A field exists only where it can act, so a run configuration refuses, say, a kernel for SimCLR. Defaults are
the published ones. `reference` restores what a released code does where it departs from its formula:
`dynlocrep` (CoderJacques/BrainAge_DynLocRep) and `barbano` (EIDOSLAB/contrastive-brain-age-prediction) both
multiply the loss by temperature/0.07 and differ in how they normalise; `rnc` pins Rank-N-Contrast to its
publication.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from core.lookup import look_up
from core.losses.kernels import (
    KERNELS,
    PUBLISHED_KERNELS,
    PUBLISHED_RANKING_KERNELS,
    Kernel,
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
Reference = Literal["dynlocrep", "barbano"]

PUBLISHED_NORMALISE: dict[str, Normalise] = {"dynlocrep": "total", "barbano": "anchor"}
PUBLISHED_BASE_TEMPERATURE = 0.07
PUBLISHED_MIN_BATCH = 32


class LossSettings(BaseModel):
    """What the settings of every loss share: immutable, and only fields that can act."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module; `epochs` fills in schedules that count epochs and were not told how many."""
        raise NotImplementedError


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

    def parts(self) -> Parts:
        """The parts that these settings mean."""
        raise NotImplementedError

    def shared(self) -> dict[str, Any]:
        """The parts that these fields mean, by name."""
        return {"temperature": self.temperature, "neighbours": self.neighbours, "chunk_rows": self.chunk_rows}


class PublishedSettings(PairwiseSettings):
    """A loss that the two brain-age codes released in their own variant."""

    reference: Reference | None = Field(None, description="a released code to reproduce; None: the formula")

    @model_validator(mode="after")
    def _neighbours_act(self) -> PublishedSettings:
        # The released neighbourhood changes the exponential loss only, silently.
        released = self.reference == "dynlocrep" and self.name == "exponential"
        if self.neighbours is not None and self.reference is not None and not released:
            raise ValueError(
                f"neighbours cannot act on {self.name} with reference '{self.reference}'; leave one out"
            )
        return self

    def shared(self) -> dict[str, Any]:
        """The parts that these fields mean, by name."""
        shared = super().shared()
        if self.reference is None:
            return shared
        neighbours = self.neighbours
        if neighbours is not None and neighbours.min_batch is None:
            neighbours = neighbours.model_copy(update={"min_batch": PUBLISHED_MIN_BATCH})
        return shared | {
            "neighbours": neighbours,
            "normalise": PUBLISHED_NORMALISE[self.reference],
            "base_temperature": PUBLISHED_BASE_TEMPERATURE,
            "offset_self": True,
        }


class NormalisedSettings(PublishedSettings):
    """A loss whose anchors may weigh differently."""

    normalise: Normalise | None = Field(
        None,
        description="mean over anchors, or over the total weight; None: anchor, or what the reference does",
    )

    @model_validator(mode="after")
    def _normalise_acts(self) -> NormalisedSettings:
        pinned = PUBLISHED_NORMALISE.get(self.reference or "")
        if pinned and self.normalise not in (None, pinned):
            raise ValueError(
                f"reference '{self.reference}' means normalise '{pinned}', got '{self.normalise}'"
            )
        return self

    def shared(self) -> dict[str, Any]:
        """The parts that these fields mean, by name."""
        return {"normalise": self.normalise or "anchor"} | super().shared()


class KernelSettings(NormalisedSettings):
    """A loss whose attraction falls with the distance between labels."""

    kernel: KernelName = Field("rbf", description="how attraction falls with label distance")
    width: Schedule | None = Field(
        None, description="kernel width in the unit of the label (years), above 0; None: 2, as published"
    )

    @model_validator(mode="after")
    def _width_acts(self) -> KernelSettings:
        if self.kernel == "equal" and self.width is not None:
            raise ValueError(f"width cannot act with kernel 'equal', got {self.width!r}; leave one out")
        return self

    def shared(self) -> dict[str, Any]:
        """The parts that these fields mean, by name."""
        table: dict[str, Kernel] = PUBLISHED_KERNELS if self.reference else KERNELS
        width = Constant(value=2.0) if self.width is None else self.width
        return super().shared() | {"kernel": look_up(table, self.kernel, "kernel"), "width": width}


class SimCLR(PublishedSettings):
    """NT-Xent (arXiv 2002.05709): the other views of a subject attract, everyone else repels."""

    name: Literal["simclr"] = "simclr"

    def parts(self) -> Parts:
        """Without labels every subject is its own class."""
        return Parts(kernel=equal, labels="ignored", **self.shared())


class SupCon(NormalisedSettings):
    """Supervised contrastive (arXiv 2004.11362): equal labels attract; without labels, SimCLR."""

    name: Literal["supcon"] = "supcon"
    bin_width: float | None = Field(
        None,
        gt=0,
        description="years per bin for continuous ages, edges at its multiples; None: exact equality",
    )

    def parts(self) -> Parts:
        """The kernel is equality, of bins where bin_width is given."""
        return Parts(kernel=equal, labels="optional", bin_width=self.bin_width, **self.shared())


class YAware(KernelSettings):
    """y-Aware (arXiv 2106.08808): near labels attract by a kernel, everyone repels."""

    name: Literal["y_aware"] = "y_aware"

    def parts(self) -> Parts:
        """Supcon with a kernel in place of equality; the limit of a kernel width of 0 is supcon."""
        return Parts(**self.shared())


class Threshold(KernelSettings):
    """Threshold (arXiv 2211.08326): k attracts against only those that are farther in label than k."""

    name: Literal["threshold"] = "threshold"

    def parts(self) -> Parts:
        """As published, one denominator per anchor weighs j by how many k are less similar to j."""
        if self.reference is None:
            return Parts(repulsion=farther_repel, **self.shared())
        kernel = PUBLISHED_RANKING_KERNELS[self.kernel]
        return Parts(repulsion=rank_counts_repel, **self.shared() | {"kernel": kernel})


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

    @model_validator(mode="after")
    def _offset_acts(self) -> Exponential:
        if self.reference and self.logit_offset == "none":
            raise ValueError(f"reference '{self.reference}' means logit_offset 'self', got 'none'")
        return self

    def parts(self) -> Parts:
        """The exponent of each pair is scaled by 1 − w."""
        return Parts(**{"offset_self": self.logit_offset == "self", "spare_positives": True} | self.shared())


class RankNContrast(PairwiseSettings):
    """Rank-N-Contrast (arXiv 2210.01189): every pair attracts against all at least as far in label.

    The similarity is the negative Euclidean distance of the embeddings as they are, not normalised.
    """

    name: Literal["rank_n_contrast"] = "rank_n_contrast"
    temperature: Schedule = Field(Constant(value=2.0), description="divides the negative distance; above 0")
    reference: Literal["rnc"] | None = Field(None, description="rnc: as published, which has no neighbours")

    @model_validator(mode="after")
    def _neighbours_act(self) -> RankNContrast:
        if self.reference and self.neighbours is not None:
            raise ValueError("neighbours cannot act with reference 'rnc'; leave one out")
        return self

    def parts(self) -> Parts:
        """The mean over all pairs that have a denominator."""
        return Parts(
            similarity="distance",
            kernel=everyone,
            repulsion=at_least_as_far_repel,
            normalise="total",
            **self.shared(),
        )


class L1(LossSettings):
    """Regression baseline: mean absolute error of predicted labels, embeddings (B, V, 1)."""

    name: Literal["l1"] = "l1"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return RegressionLoss("l1")


class MSE(LossSettings):
    """Regression baseline: mean squared error of predicted labels, embeddings (B, V, 1)."""

    name: Literal["mse"] = "mse"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return RegressionLoss("mse")


def _with_epochs(settings: PairwiseSettings, epochs: int) -> PairwiseSettings:
    """A copy in which every schedule that counts epochs knows how many there are."""
    update: dict[str, Any] = {"temperature": with_epochs(settings.temperature, epochs)}
    if settings.neighbours is not None:
        update["neighbours"] = settings.neighbours.with_epochs(epochs)
    if isinstance(settings, KernelSettings) and settings.width is not None:
        update["width"] = with_epochs(settings.width, epochs)
    return settings.model_copy(update=update)
