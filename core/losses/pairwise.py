"""Every pairwise contrastive loss of the project, from one expression with interchangeable parts.

    S = similarity(z) / temperature        cosine, or negative distance
    W = kernel(labels)                     who attracts, and how much
    Q = exponent scale                     1, or 1 − W
    G = eligibility                        all, the nearest neighbours, or sets by label distance
    L = reduce( −W · (S − logsumexp_j(S·Q + log G)) )

An anchor is never paired with itself. Pairs with an empty denominator and anchors with no pair left are
dropped and counted, and the mean is over what remains; if nothing remains the loss is a zero that still
hangs on the graph. core/losses/members.py names the members of the family.

Shape suffixes: V views of the anchor, C anchor subjects (a chunk of the batch), U views of the contrasted
row (as many as V), B subjects of the batch, D embedding. A suffix 1 broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core.errors import UserError
from core.losses.gather import gather_batch
from core.losses.kernels import Kernel, equal, label_distance, without_dust
from core.losses.neighbourhood import Neighbours, farness, kth_largest
from core.schedules import Constant, Shape

# Stands for −inf beside logits: exp of it is exactly 0, yet differences of it stay finite, so that neither
# logsumexp nor its gradient meets inf − inf in an empty row.
NOTHING = -1e30

UNIT = Constant(value=1.0)

# Metrics whose nearest rows are those of largest similarity: on the sphere, cosine and Euclidean agree.
SAME_ORDER = {"cosine": ("cosine", "euclidean"), "distance": ("euclidean",)}

Weigh = Callable[[Tensor], Tensor]
"""A kernel with its width filled in: label distances to weights."""

Repulsion = Callable[[Tensor, Tensor, Tensor, Weigh], Tensor]
"""(logits_vcub, labels_c, labels_b, weigh) -> log denominator, (V, C, 1) or per subject of the positive
(V, C, B); near NOTHING where nothing is eligible. Logits that may not repel come in as NOTHING."""


@dataclass(frozen=True)
class Parts:
    """What makes one pairwise loss: S, W, Q, G and reduce."""

    temperature: Shape
    similarity: Literal["cosine", "distance"] = "cosine"
    kernel: Kernel = equal
    width: Shape = UNIT
    labels: Literal["ignored", "optional", "required"] = "required"  # without labels, views identify subjects
    bin_width: float | None = None
    spare_positives: bool = False  # Q = 1 − W instead of 1
    repulsion: Repulsion | None = None  # None: everyone
    neighbours: Neighbours | None = None
    normalise: Literal["anchor", "total"] = "anchor"
    offset_self: bool = False  # as published: subtract each anchor's largest logit before Q scales it
    base_temperature: float | None = None  # as published: multiply the loss by temperature / this
    chunk_rows: int | None = None


# --- S: similarity ---------------------------------------------------------------------------------------


def cosine_similarity(z_vcd: Tensor, z_ubd: Tensor, scale: float) -> Tensor:
    """(V, C, U, B) dot products of unit rows, times `scale`."""
    s_nm = (z_vcd * scale).flatten(0, 1) @ z_ubd.flatten(0, 1).T
    return s_nm.view(*z_vcd.shape[:2], *z_ubd.shape[:2])


def negative_distance(z_vcd: Tensor, z_ubd: Tensor, scale: float) -> Tensor:
    """(V, C, U, B) negative Euclidean distances, times `scale`; the gradient at distance 0 is 0."""
    # The matrix-product form is the fast one, but in float32 it loses half the digits where rows nearly
    # coincide, as two views of a subject often do. In float64 it keeps float32 accuracy there.
    distance_nm = torch.cdist(
        z_vcd.flatten(0, 1).double(), z_ubd.flatten(0, 1).double(), compute_mode="use_mm_for_euclid_dist"
    ).to(z_vcd.dtype)
    return distance_nm.view(*z_vcd.shape[:2], *z_ubd.shape[:2]) * -scale


class _LogSumExp(torch.autograd.Function):
    """logsumexp over one dimension, as a softmax that the backward pass uses again.

    torch.logsumexp takes exp of every logit twice, by a path ten times slower for results that underflow,
    and with neighbours most of them do.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, dim: int) -> Tensor:
        share = logits.softmax(dim)
        context.save_for_backward(share)
        context.dim = dim
        # The largest logit has a share of at least 1/N, so its logarithm is exact.
        return logits.amax(dim) - share.amax(dim).log()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (share,) = context.saved_tensors
        return gradient.unsqueeze(context.dim) * share, None


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """log Σ exp(logits) over `dim`; a row of NOTHING stays near NOTHING. Differentiable once."""
    apply: Callable[[Tensor, int], Tensor] = _LogSumExp.apply
    return apply(logits, dim)


# --- G: who repels -----------------------------------------------------------------------------------------


def everyone_repels(logits_vcub: Tensor, labels_c: Tensor, labels_b: Tensor, weigh: Weigh) -> Tensor:
    """D_i = Σ_{j≠i} exp(logit_ij): SimCLR, supcon, y-Aware, exponential."""
    return log_sum_exp(logits_vcub.flatten(2), -1).unsqueeze(-1)


def farther_repel(logits_vcub: Tensor, labels_c: Tensor, labels_b: Tensor, weigh: Weigh) -> Tensor:
    """D_ik = Σ_{j: w_ij < w_ik} exp(logit_ij): threshold.

    Kernels fall with label distance wherever they weigh anything, so the set is {|y_i − y_j| > |y_i − y_k|}.
    """
    return _denominator_by_rank(
        logits_vcub, label_distance(labels_c, labels_b, logits_vcub.dtype), ties=False
    )


def at_least_as_far_repel(logits_vcub: Tensor, labels_c: Tensor, labels_b: Tensor, weigh: Weigh) -> Tensor:
    """D_ik = Σ_{j≠i: |y_i − y_j| ≥ |y_i − y_k|} exp(logit_ij): Rank-N-Contrast."""
    return _denominator_by_rank(logits_vcub, label_distance(labels_c, labels_b, logits_vcub.dtype), ties=True)


def _denominator_by_rank(logits_vcub: Tensor, distance_cb: Tensor, ties: bool) -> Tensor:
    """Sort subjects farthest first; every denominator is then a prefix of one cumulative logsumexp."""
    sorted_cb, order_cb = distance_cb.sort(dim=1, descending=True)
    per_subject_vcb = log_sum_exp(logits_vcub, 2)  # the views of a subject share its label
    prefix_vcb = per_subject_vcb.gather(2, order_cb.expand_as(per_subject_vcb)).logcumsumexp(2)
    last_cb = torch.empty_like(order_cb).scatter_(1, order_cb, _last_of_prefix(sorted_cb, ties))
    log_d_vcb = prefix_vcb.gather(2, last_cb.clamp(min=0).expand_as(prefix_vcb))
    return log_d_vcb.masked_fill(last_cb < 0, NOTHING)


def _last_of_prefix(sorted_cb: Tensor, ties: bool) -> Tensor:
    """For each place in sorted rows, the last place with an equal value (`ties`) or before all equal ones."""
    place_cb = torch.arange(sorted_cb.shape[1], device=sorted_cb.device).expand_as(sorted_cb)
    changes_cb = sorted_cb[:, 1:] != sorted_cb[:, :-1]
    if not ties:
        first_cb = F.pad(place_cb[:, 1:] * changes_cb, (1, 0)).cummax(dim=1).values
        return first_cb - 1
    end_cb = F.pad(
        torch.where(changes_cb, place_cb[:, :-1], place_cb.shape[1] - 1), (0, 1), value=place_cb.shape[1] - 1
    )
    return end_cb.flip(1).cummin(dim=1).values.flip(1)


def rank_counts_repel(logits_vcub: Tensor, labels_c: Tensor, labels_b: Tensor, weigh: Weigh) -> Tensor:
    """D_i = Σ_{j≠i} c_ij exp(logit_ij) with c_ij = #{k : w_jk < w_ij}: threshold as published.

    The released code compares similarities seen from j, and sums over k inside the logarithm.
    """
    views, dtype = logits_vcub.shape[2], logits_vcub.dtype
    rows_bb = weigh(label_distance(labels_b, labels_b, dtype)).sort(dim=1).values
    weight_bc = weigh(label_distance(labels_b, labels_c, dtype))
    count_cb = views * torch.searchsorted(rows_bb, weight_bc).T
    log_count_cb = torch.where(count_cb > 0, count_cb.to(dtype).log(), NOTHING)
    return log_sum_exp((logits_vcub + log_count_cb[:, None]).flatten(2), -1).unsqueeze(-1)


# --- L: the expression -------------------------------------------------------------------------------------


def anchor_terms(
    z_ubd: Tensor, labels_b: Tensor, first: int, last: int, progress: float, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Loss and weight of the anchors of subjects first … last − 1, each of shape (V, C).

    The loss is Σ_k w_ik (log D_ik − s_ik), the weight Σ_k w_ik, both over the pairs with a denominator.
    """
    views, subjects, _ = z_ubd.shape
    z_vcd, labels_c = z_ubd[:, first:last], labels_b[first:last]

    def weigh(distance: Tensor) -> Tensor:
        return parts.kernel(distance, parts.width(progress))

    similarity = cosine_similarity if parts.similarity == "cosine" else negative_distance
    s_vcub = similarity(z_vcd, z_ubd, 1 / parts.temperature(progress))
    if parts.offset_self:
        s_vcub = s_vcub - s_vcub.detach().flatten(2).amax(-1)[..., None, None]
    w_cb = without_dust(weigh(label_distance(labels_c, labels_b, s_vcub.dtype)))

    own(s_vcub, first).fill_(0.0)
    barrier_vcub = barrier(s_vcub.detach(), z_vcd, z_ubd, first, progress, parts)
    if parts.spare_positives:
        logits_vcub = torch.addcmul(barrier_vcub, s_vcub, (1 - w_cb)[:, None])
    else:
        logits_vcub = s_vcub + barrier_vcub
    log_d_vcb = (parts.repulsion or everyone_repels)(logits_vcub, labels_c, labels_b, weigh)

    live_vcb = log_d_vcb > NOTHING / 2
    w_vcb = w_cb * live_vcb
    pairs_cb = views - torch.eye(subjects, dtype=w_cb.dtype, device=w_cb.device)[first:last]
    gain_vcb = torch.addcmul(s_vcub.sum(2), pairs_cb, log_d_vcb.masked_fill(~live_vcb, 0.0), value=-1)
    return -(w_vcb * gain_vcb).sum(2), (w_vcb * pairs_cb).sum(2)


def own(x_vcub: Tensor, first: int) -> Tensor:
    """(V, C), a view: where anchor and contrasted row are the same row; the chunk starts at subject `first`."""
    return x_vcub.diagonal(dim1=0, dim2=2).diagonal(offset=first, dim1=0, dim2=1)


@torch.no_grad()
def barrier(
    s_vcub: Tensor, z_vcd: Tensor, z_ubd: Tensor, first: int, progress: float, parts: Parts
) -> Tensor:
    """(V, C, U, B): NOTHING for the anchor's own row and for rows beyond its nearest, otherwise 0.

    Adding it to the logits lets the gradient pass at no cost: what is barred has no share in it.
    """
    views, subjects = z_ubd.shape[:2]
    others = other_rows(views, subjects, progress, parts.neighbours)
    if parts.neighbours is None or others >= views * subjects - 1:
        no_barrier_vcub = torch.zeros_like(s_vcub)
        own(no_barrier_vcub, first).fill_(NOTHING)
        return no_barrier_vcub
    if parts.neighbours.metric in SAME_ORDER[parts.similarity]:
        close_vcub = s_vcub.clone()
    else:
        close_vcub = -farness(z_vcd.flatten(0, 1), z_ubd.flatten(0, 1), parts.neighbours.metric).view_as(
            s_vcub
        )
    own(close_vcub, first).fill_(-math.inf)
    close_nm = close_vcub.flatten(0, 1).flatten(1)
    return close_nm.lt_(kth_largest(close_nm, others)).mul_(NOTHING).view_as(s_vcub)


def other_rows(views: int, subjects: int, progress: float, neighbours: Neighbours | None) -> int:
    """How many rows besides the anchor are eligible: V·k − 1, at least one."""
    count = subjects if neighbours is None else neighbours.count(subjects, progress)
    return max(views * count - 1, 1)


def reduce_anchors(loss_n: Tensor, weight_n: Tensor, normalise: Literal["anchor", "total"]) -> Tensor:
    """`anchor`: the mean over anchors of loss/weight; `total`: the sum of losses over the sum of weights.

    `total` favours anchors in dense label ranges. Anchors of weight 0 are left out of either mean.
    """
    if normalise == "total":
        total = weight_n.sum()
        return loss_n.sum() / torch.where(total > 0, total, 1.0)
    used_n = weight_n > 0
    return (loss_n / torch.where(used_n, weight_n, 1.0)).sum() / used_n.sum().clamp(min=1)


def pairwise_loss(
    z_bvd: Tensor, labels_b: Tensor, progress: float, parts: Parts
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a whole batch, embeddings (B, V, D) and labels (B,), with its diagnostics."""
    subjects, views, _ = z_bvd.shape
    z_vbd = z_bvd.transpose(0, 1)
    if parts.similarity == "cosine":
        z_vbd = F.normalize(z_vbd, dim=-1)
    if subjects * views < 2:
        loss_n, weight_n = 0 * z_vbd.sum(-1).flatten(), z_vbd.new_zeros(subjects * views)
    else:
        loss_n, weight_n = _all_anchor_terms(z_vbd, labels_b, progress, parts)
    loss = reduce_anchors(loss_n, weight_n, parts.normalise)
    temperature = parts.temperature(progress)
    if parts.base_temperature is not None:
        loss = loss * (temperature / parts.base_temperature)
    used = (weight_n > 0).sum()
    others = min(other_rows(views, subjects, progress, parts.neighbours), max(subjects * views - 1, 0))
    return loss, {
        "anchors_used": used,
        "anchors_dropped": weight_n.numel() - used,
        "neighbours": loss_n.new_full((), others),
        "temperature": loss_n.new_full((), temperature),
    }


def _all_anchor_terms(
    z_vbd: Tensor, labels_b: Tensor, progress: float, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Loss and weight of every anchor, (V·B,); in chunks, which are computed again in the backward pass."""
    views, subjects, _ = z_vbd.shape
    if parts.chunk_rows is None or parts.chunk_rows >= views * subjects:
        loss_vb, weight_vb = anchor_terms(z_vbd, labels_b, 0, subjects, progress, parts)
        return loss_vb.flatten(), weight_vb.flatten()
    per_chunk = max(parts.chunk_rows // views, 1)
    chunks = [
        checkpoint(
            anchor_terms, z_vbd, labels_b, first, min(first + per_chunk, subjects), progress, parts,
            use_reentrant=False, preserve_rng_state=False,
        )
        for first in range(0, subjects, per_chunk)
    ]  # fmt: skip
    losses, weights = zip(*chunks, strict=True)
    return torch.cat(losses, dim=1).flatten(), torch.cat(weights, dim=1).flatten()


class PairwiseLoss(nn.Module):
    """One member of the family as a module: loss(embeddings, labels, progress) -> scalar.

    Under torch.distributed the rows of all ranks form one batch (every rank must call), and gradients are
    such that DDP's average equals the gradient of a single process.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        super().__init__()
        self.name = name
        self.parts = parts
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor | None, progress: float) -> Tensor:
        """The loss of embeddings (B, V, D) with labels (B,) or None, at `progress` in [0, 1].

        Computed in float32 (float64 for float64 embeddings), inside autocast too. `diagnostics` then
        holds anchors used and dropped, eligible rows per anchor and the temperature, as detached tensors.
        Raises UserError for wrong shapes, missing labels, or a temperature or width that is not above 0.
        """
        check_batch(self.name, embeddings, labels)
        self._check_settings(progress)
        with without_autocast(embeddings):
            z_bvd = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            z_bvd, labels = gather_batch(z_bvd, self._used_labels(labels))
            if labels is None:
                labels = torch.arange(z_bvd.shape[0], device=z_bvd.device)
            if self.parts.bin_width is not None:
                labels = torch.floor(labels.double() / self.parts.bin_width)
            loss, diagnostics = pairwise_loss(z_bvd, labels.to(z_bvd.device), progress, self.parts)
        self.diagnostics = {key: value.detach() for key, value in diagnostics.items()}
        return loss

    def extra_repr(self) -> str:
        """The name and every part."""
        return f"{self.name}, {self.parts}"

    def _used_labels(self, labels: Tensor | None) -> Tensor | None:
        if labels is None and self.parts.labels == "required":
            raise UserError(f"{self.name} needs a label for every subject, got None; simclr needs none")
        return None if labels is None or self.parts.labels == "ignored" else labels.detach().reshape(-1)

    def _check_settings(self, progress: float) -> None:
        for what, schedule in (("temperature", self.parts.temperature), ("width", self.parts.width)):
            if schedule(progress) <= 0:
                raise UserError(
                    f"{what} of {self.name} must be above 0, got {schedule(progress)} at {progress=}"
                )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does nothing on the device of `tensor`: losses need float32."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def check_batch(name: str, embeddings: Tensor, labels: Tensor | None) -> None:
    """Raise UserError unless embeddings are (B, V, D) and labels, if any, (B,)."""
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise UserError(
            f"{name}: embeddings must be floating-point of shape (B, V, D), "
            f"got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    subjects = embeddings.shape[0]
    if labels is not None and tuple(labels.shape) not in {(subjects,), (subjects, 1)}:
        raise UserError(f"{name}: labels must have shape (B,) = ({subjects},), got {tuple(labels.shape)}")
