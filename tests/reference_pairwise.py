"""Every pairwise loss as nested loops over rows, written from the formulas of spec.md A.3, D and G.

Slow, obvious, and sharing nothing with core.losses. Rows are view-major: row v·B + b is view v of subject
b. Everything is a scalar tensor, so that autograd gives reference gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kernel(name: str, difference: float, width: float, published: bool = False) -> float:
    """K(y_i, y_j) for Δ = y_i − y_j."""
    if name == "equal":
        return 1.0 if difference == 0 else 0.0
    if name == "gaussian" and published:
        return math.exp(-(difference**2) / (2 * width**2)) / (math.sqrt(2 * math.pi) * width)
    if name in ("rbf", "gaussian"):
        return math.exp(-(difference**2) / (2 * width**2))
    if name == "cauchy":
        return 1 / (1 + width * difference**2) if published else 1 / (1 + (difference / width) ** 2)
    if name == "laplace":
        return math.exp(-abs(difference) / width)
    if name == "epanechnikov":
        return max(0.0, 1 - (difference / width) ** 2)
    raise ValueError(name)


def rows_of(embeddings: Tensor) -> tuple[list[Tensor], list[int]]:
    """The rows and the subject of each."""
    subjects, views, _ = embeddings.shape
    pairs = [(view, subject) for view in range(views) for subject in range(subjects)]
    return [embeddings[subject, view] for view, subject in pairs], [subject for _, subject in pairs]


def distance(a: Tensor, b: Tensor, metric: str) -> float:
    """How far apart two rows are, as a number without gradient."""
    x, y = a.tolist(), b.tolist()
    gaps = [abs(p - q) for p, q in zip(x, y, strict=True)]
    if metric == "cosine":
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return -dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
    return {"euclidean": math.sqrt(sum(g * g for g in gaps)), "manhattan": sum(gaps), "chebyshev": max(gaps)}[
        metric
    ]


def neighbours_of(i: int, z: list[Tensor], others: int, metric: str) -> set[int]:
    """The `others` rows nearest to row i, itself excluded."""
    ranked = sorted((j for j in range(len(z)) if j != i), key=lambda j: distance(z[i], z[j], metric))
    return set(ranked[:others])


def log_sum(terms: list[Tensor]) -> Tensor:
    """log Σ exp, shifted by the largest term."""
    largest = max(float(term.detach()) for term in terms)
    return torch.log(sum(torch.exp(term - largest) for term in terms)) + largest


def denominator_terms(method, i, k, n, s, w, apart, near, views):
    """The exponents summed for anchor i and positive k."""
    terms = []
    for j in range(n):
        if j == i or j not in near:
            continue
        if method == "threshold" and not w[i][j] < w[i][k]:
            continue
        if method == "rank_n_contrast" and not apart[i][j] >= apart[i][k]:
            continue
        if method == "published threshold":
            count = sum(w[j][other] < w[i][j] for other in range(n))
            terms += [s[i][j] + math.log(count)] if count else []
        else:
            terms.append(s[i][j] * (1 - w[i][j]) if "exponential" in method else s[i][j])
    return terms


def reference_loss(
    method: str,
    embeddings: Tensor,
    labels: list[float] | None,
    temperature: float,
    kernel_name: str = "equal",
    width: float = 1.0,
    normalise: str = "anchor",
    others: int | None = None,
    metric: str = "cosine",
    published: bool = False,
) -> Tensor:
    """The loss of embeddings (B, V, D); `others` nearest rows are eligible, None: all.

    method: supcon, y_aware, threshold, exponential, rank_n_contrast (labels None: SimCLR).
    """
    z, subject = rows_of(embeddings)
    n = len(z)
    if method != "rank_n_contrast":
        z = [row / row.norm() for row in z]
    y = [float(subject[i]) if labels is None else float(labels[subject[i]]) for i in range(n)]
    apart = [[abs(y[i] - y[j]) for j in range(n)] for i in range(n)]
    w = [[kernel(kernel_name, apart[i][j], width, published) for j in range(n)] for i in range(n)]
    if method == "rank_n_contrast":
        s = [
            [-((z[i] - z[j]).norm() if i != j else z[i].sum() * 0) / temperature for j in range(n)]
            for i in range(n)
        ]
        w = [[1.0] * n for _ in range(n)]
        normalise = "total"
    else:
        s = [[(z[i] * z[j]).sum() / temperature for j in range(n)] for i in range(n)]
    if published:
        s = [[value - max(float(other.detach()) for other in row) for value in row] for row in s]
        method = "published threshold" if method == "threshold" else method
    anchors, weights = [], []
    for i in range(n):
        near = set(range(n)) if others is None else neighbours_of(i, z, others, metric)
        loss, weight = z[i].sum() * 0, 0.0
        for k in range(n):
            if k == i or w[i][k] == 0:
                continue
            terms = denominator_terms(method, i, k, n, s, w, apart, near, embeddings.shape[1])
            if terms:
                loss = loss - w[i][k] * (s[i][k] - log_sum(terms))
                weight += w[i][k]
        if weight > 0:
            anchors.append(loss)
            weights.append(weight)
    if normalise == "total":
        total = sum(anchors) / sum(weights)
    else:
        total = sum(loss / weight for loss, weight in zip(anchors, weights, strict=True)) / len(anchors)
    return temperature / 0.07 * total if published else total
