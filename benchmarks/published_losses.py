"""The published algorithms in plain form, as a reader of the papers and the released codes would write them.

benchmarks/losses.py compares our losses with them, so they keep the published form of the computation
(the (N, N, N) comparison of threshold, the loop over positives of Rank-N-Contrast, the loop over images
and anchors of constrained contrast). Rows are view-major, N = V·B; D is the embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(z_bvd: Tensor) -> Tensor:
    """Unit rows (N, D); the first views of all subjects come first."""
    return F.normalize(torch.cat(z_bvd.unbind(dim=1)), dim=1)


def rbf_weights(labels_b: Tensor, width: float, views: int) -> Tensor:
    """(N, N) rbf kernel of the labels, repeated over views."""
    difference_bb = labels_b[:, None] - labels_b[None, :]
    return torch.exp(-(difference_bb**2) / (2 * width**2)).repeat(views, views)


def per_anchor_mean(log_prob_nn: Tensor, weight_nn: Tensor) -> Tensor:
    """Mean over anchors of the weighted mean over positives, negated."""
    return -((weight_nn * log_prob_nn).sum(1) / weight_nn.sum(1)).mean()


def threshold(z_bvd: Tensor, labels_b: Tensor, temperature: float = 0.1, width: float = 2.0) -> Tensor:
    """Threshold from its formula with one (N, N, N) comparison of weights; pairs with an empty set left out."""
    z_nd = rows(z_bvd)
    others_nn = 1 - torch.eye(len(z_nd), dtype=z_nd.dtype)
    logits_nn = z_nd @ z_nd.T / temperature
    logits_nn = logits_nn - logits_nn.max(dim=1, keepdim=True).values.detach()
    weight_nn = rbf_weights(labels_b, width, z_bvd.shape[1])
    farther_nkj = (weight_nn[:, None, :] < weight_nn[:, :, None]).to(z_nd.dtype)
    exp_nkj = (logits_nn.exp() * others_nn)[:, None, :] * farther_nkj
    sum_nk = exp_nkj.sum(2)
    weight_nn = weight_nn * others_nn * (sum_nk > 0)
    return per_anchor_mean(logits_nn - sum_nk.clamp(min=1e-38).log(), weight_nn)


def threshold_as_released(
    z_bvd: Tensor, labels_b: Tensor, temperature: float = 0.1, width: float = 2.0
) -> Tensor:
    """Threshold as released: repeated (N, N, N) tensors, one denominator per anchor summed over k as well."""
    z_nd = rows(z_bvd)
    n = len(z_nd)
    others_nn = 1 - torch.eye(n, dtype=z_nd.dtype)
    logits_nn = z_nd @ z_nd.T / temperature
    logits_nn = logits_nn - logits_nn.max(dim=1, keepdim=True).values.detach()
    weight_nn = rbf_weights(labels_b, width, z_bvd.shape[1])
    # w_jk for every i, then w_ij − w_jk
    repeated_ijk = weight_nn[:, :, None].repeat(1, 1, n).permute(2, 0, 1)
    difference_ijk = weight_nn[:, :, None] - repeated_ijk
    less_similar_ijk = (difference_ijk > 0).to(z_nd.dtype)
    exp_ijk = (logits_nn.exp() * others_nn)[:, :, None].repeat(1, 1, n)
    sum_n = (exp_ijk * less_similar_ijk).sum(-1).sum(1, keepdim=True)
    return temperature / 0.07 * per_anchor_mean(logits_nn - sum_n.log(), weight_nn * others_nn)


def exponential_with_neighbours(
    z_bvd: Tensor,
    labels_b: Tensor,
    subjects: int,
    metric: str = "manhattan",
    temperature: float = 0.1,
    width: float = 2.0,
) -> Tensor:
    """Dynamic Localised Repulsion as released: nearest rows by topk, offset logits, pooled normaliser."""
    z_nd = rows(z_bvd)
    views = z_bvd.shape[1]
    weight_nn = rbf_weights(labels_b, width, views)
    others_nn = torch.scatter(torch.ones_like(weight_nn), 1, torch.arange(len(z_nd))[:, None], 0)
    logits_nn = z_nd @ z_nd.T / temperature
    logits_nn = logits_nn - logits_nn.max(dim=1, keepdim=True).values.detach()
    closeness_nn = logits_nn if metric == "cosine" else 1 / torch.cdist(z_nd, z_nd, p=1)
    nearest_nk = torch.topk(closeness_nn, views * subjects, dim=1).indices
    near_nn = torch.zeros_like(logits_nn).scatter_(1, nearest_nk, 1)
    repulsion_nn = torch.exp(logits_nn * (1 - weight_nn)) * near_nn * others_nn
    log_prob_nn = logits_nn - torch.log(repulsion_nn.sum(1, keepdim=True))
    attraction_nn = weight_nn * others_nn
    loss = -(attraction_nn * log_prob_nn).sum(1).sum() / attraction_nn.sum()
    return temperature / 0.07 * loss


def rank_n_contrast(z_bvd: Tensor, labels_b: Tensor, temperature: float = 2.0) -> Tensor:
    """Rank-N-Contrast as released: all differences at once, then a loop over the positives."""
    z_nd = torch.cat(z_bvd.unbind(dim=1))
    n = len(z_nd)
    labels_n = labels_b.repeat(z_bvd.shape[1])
    apart_nn = (labels_n[:, None] - labels_n[None, :]).abs()
    logits_nn = -(z_nd[:, None, :] - z_nd[None, :, :]).norm(2, dim=-1) / temperature
    logits_nn = logits_nn - logits_nn.max(dim=1, keepdim=True).values.detach()
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    logits_nm = logits_nn[off_diagonal].view(n, n - 1)
    exp_nm = logits_nm.exp()
    apart_nm = apart_nn[off_diagonal].view(n, n - 1)
    loss = logits_nm.new_zeros(())
    for positive in range(n - 1):
        eligible_nm = (apart_nm >= apart_nm[:, positive, None]).to(logits_nm.dtype)
        log_prob_n = logits_nm[:, positive] - torch.log((eligible_nm * exp_nm).sum(1))
        loss = loss - (log_prob_n / (n * (n - 1))).sum()
    return loss


def constrained_contrast(
    bank_bpd: Tensor, cluster_bp: Tensor, anchor_ba: Tensor, temperature: float = 0.1, nearest: int = 101
) -> Tensor:
    """Pairwise constrained contrast as released: one anchor of one image at a time.

    P patches per image in the bank, A anchors. The anchor itself is among its nearest, and the whole bank
    is normalised for every anchor, as published.
    """
    per_image = []
    for bank_pd, cluster_p, anchor_a in zip(bank_bpd, cluster_bp, anchor_ba, strict=True):
        total = bank_pd.new_zeros(())
        for anchor in anchor_a:
            cosine_p = F.normalize(bank_pd, dim=1) @ F.normalize(bank_pd[anchor], dim=0)
            p_p = torch.exp(cosine_p / temperature)
            top = torch.topk(p_p, nearest).indices
            same = cluster_p[top] == cluster_p[anchor]
            positive_k, negative_k = p_p[top][same], p_p[top][~same]
            total = total - torch.log(positive_k / (positive_k + negative_k.sum()) + 1e-7).mean()
        per_image.append(total / len(anchor_a))
    return torch.stack(per_image).mean()
