"""Which rows may repel an anchor: the nearest in embedding space, whose number follows a schedule.

Dynamic Localised Repulsion (arXiv 2408.00527) starts with the whole batch and ends with the nearest few.

Shape suffixes: N anchor rows, M rows they are contrasted with, K neighbours, D embedding.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.spatial.distance import squareform
from torch import Tensor

from core.schedules import ByKind, Number, Pieces, Piecewise, Shape, as_schedule, at

Metric = Literal["cosine", "euclidean", "manhattan", "chebyshev"]

MINKOWSKI_ORDER: dict[str, float] = {"euclidean": 2.0, "manhattan": 1.0, "chebyshev": math.inf}


class Neighbours(BaseModel):
    """How many of the nearest subjects an anchor is contrasted with, over the progress of training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int | float | None = Field(
        None,
        description="subjects at the start: a whole count, a fraction of the batch in (0, 1], or None: all",
    )
    end: Annotated[Annotated[int | float, Number] | Annotated[Piecewise, Pieces], ByKind] = Field(
        description="subjects at the end: a whole count, or a fraction of the batch in (0, 1]; in a "
        "schedule that a population found, each part of the training may have its own end (piecewise)"
    )
    shape: Literal["staircase", "linear", "cosine", "exponential"] = Field(
        "staircase", description="how the count goes from start to end"
    )
    metric: Metric = Field("cosine", description="what nearest means, between embeddings")
    step: int | None = Field(None, ge=1, description="epochs per stage of a staircase")
    epochs: int | None = Field(
        None, ge=1, description="epochs of the whole run, for a staircase; None: filled in by the run"
    )
    min_batch: int | None = Field(
        None,
        ge=1,
        description="below this many subjects every row is eligible; None: 1, the released code 32",
    )

    @model_validator(mode="after")
    def _can_act(self) -> Neighbours:
        ends = self.end.values if isinstance(self.end, Piecewise) else (self.end,)
        for field, value in (("start", self.start), *(("end", end) for end in ends)):
            if (
                value is not None
                and not _is_count(value)
                and not (isinstance(value, float) and 0 < value <= 1)
            ):
                raise ValueError(
                    f"{field} must be a whole count, or a fraction of the batch in (0, 1], got {value}"
                )
        if self.shape == "staircase" and self.step is None:
            raise ValueError("a staircase needs step, the epochs per stage")
        if self.shape != "staircase" and (self.step is not None or self.epochs is not None):
            raise ValueError(f"step and epochs act only with shape 'staircase', got shape '{self.shape}'")
        return self

    def with_epochs(self, epochs: int) -> Neighbours:
        """A copy with the length of the run filled in, where a staircase lacks it."""
        if self.shape != "staircase" or self.epochs is not None:
            return self
        return self.model_copy(update={"epochs": epochs})

    def count(self, subjects: int, progress: float) -> int:
        """Subjects to contrast with (the anchor's own included) in a batch of `subjects`."""
        if subjects < (self.min_batch or 1):
            return subjects
        # A billionth more, because a cosine can arrive at 22.999999999 where 23 is meant.
        count = math.floor(self._schedule(subjects, progress)(progress) + 1e-9)
        return min(max(count, 1), subjects)

    def _schedule(self, subjects: int, progress: float) -> Shape:
        """The course of the count that is followed at `progress`."""
        start = subjects if self.start is None else _as_count(self.start, subjects)
        ends: dict[str, object] = {
            "shape": self.shape,
            "start": start,
            "end": _as_count(at(self.end, progress), subjects),
        }
        if self.shape == "staircase":
            ends |= {"step": self.step, "epochs": self.epochs}
        return as_schedule(ends, "neighbours")


def _is_count(value: float) -> bool:
    """An integer, or a float above 1 that is whole: 1.0 is the fraction "all", 1 is one subject."""
    return (isinstance(value, int) and value >= 1) or (value > 1 and float(value).is_integer())


def _as_count(value: float, subjects: int) -> int:
    return int(value) if _is_count(value) else max(1, round(value * subjects))


def farness(z_nd: Tensor, z_md: Tensor, metric: Metric) -> Tensor:
    """(N, M), larger for rows farther apart; the order is that of the metric, the values need not be."""
    if metric == "cosine":
        return -F.normalize(z_nd, dim=1) @ F.normalize(z_md, dim=1).T
    order = MINKOWSKI_ORDER[metric]
    if z_nd.device.type == "cpu" and z_nd.shape == z_md.shape and metric != "euclidean":
        # Every anchor at once: half the pairs suffice, and torch computes those several times faster.
        return torch.from_numpy(squareform(F.pdist(z_nd, p=order).numpy(), checks=False))
    return torch.cdist(z_nd, z_md, p=order)


def kth_largest(values_nm: Tensor, count: int) -> Tensor:
    """(N, 1): the `count`-th largest value of each row; with ties, more than `count` values reach it."""
    if values_nm.device.type != "cpu":
        return values_nm.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    # numpy selects several times faster than torch, and shares memory.
    place = values_nm.shape[1] - count
    return torch.from_numpy(np.partition(values_nm.numpy(), place, axis=1)[:, place : place + 1])
