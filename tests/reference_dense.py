"""Constrained contrast, anatomical contrast and the symmetry losses as loops, from spec.md C.3 and D.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def constrained_contrast(
    features: Tensor,
    clusters: Tensor,
    anchors: list[list[int]],
    temperature: float,
    nearest: int,
    form: str,
    published: bool,
    kinship: list[list[list[float]]] | None = None,
) -> Tensor:
    """features (B, D, H, W), clusters (B, H, W), anchors as flat indices; the mean over anchors with a positive.

    A pair attracts by the kinship of its clusters, and repels by the rest; without kinship, by their equality.
    """
    terms = []
    for image in range(features.shape[0]):
        bank = features[image].flatten(1).T
        cluster = clusters[image].flatten().tolist()
        for anchor in anchors[image]:
            s = [cosine(bank[anchor], bank[j]) / temperature for j in range(len(bank))]
            candidates = [j for j in range(len(bank)) if published or j != anchor]
            top = sorted(candidates, key=lambda j: -float(s[j].detach()))[: nearest - (not published)]
            known = kinship[image] if kinship else [[float(a == b) for a in range(99)] for b in range(99)]
            w = {j: known[cluster[anchor]][cluster[j]] for j in top}
            negative = sum((1 - w[j]) * s[j].exp() for j in top)
            epsilon = 1e-7 if published else 0.0
            if not sum(w.values()):
                continue
            if form == "pairwise":
                each = sum(-w[j] * torch.log(s[j].exp() / (s[j].exp() + negative) + epsilon) for j in top)
                terms.append(each / sum(w.values()))
            else:
                positive = sum(w[j] * s[j].exp() for j in top)
                terms.append(-torch.log(positive / (positive + negative) + epsilon))
    return sum(terms) / len(terms)


def kinship_of(image: Tensor, clusters: Tensor, bandwidth: float) -> list[list[float]]:
    """The Gaussian kernel between the mean intensities of clusters, in SDs of the image (C, H, W)."""
    values = image.flatten(1).double()
    scaled = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True, unbiased=False)
    flat = clusters.flatten()
    centres = [scaled[:, flat == each].mean(1) for each in range(int(clusters.max()) + 1)]
    return [
        [math.exp(-float(((one - other) ** 2).mean()) / (2 * bandwidth**2)) for other in centres]
        for one in centres
    ]


def anatomical(embeddings: Tensor, partitions: list[int], temperature: float) -> Tensor:
    """The mean over ordered pairs of views of −log(e^p / (e^p + Σ e^n)), n from other partitions."""
    subjects, views, _ = embeddings.shape
    terms = []
    for b in range(subjects):
        rows = [(c, u) for c in range(subjects) for u in range(views) if partitions[c] != partitions[b]]
        for v in range(views):
            negatives = [cosine(embeddings[b, v], embeddings[c, u]) / temperature for c, u in rows]
            for u in range(views):
                if u != v and negatives:
                    p = cosine(embeddings[b, v], embeddings[b, u]) / temperature
                    terms.append(-torch.log(p.exp() / (p.exp() + sum(n.exp() for n in negatives))))
    return sum(terms) / len(terms)


def symmetry(embeddings: Tensor, healthy: list[int], form: str, temperature: float, margin: float) -> float:
    """The four symmetry losses of a batch of (brain, mirror) pairs."""
    embeddings = embeddings.detach()
    c = [float(cosine(pair[0], pair[1])) for pair in embeddings]
    if form == "group":
        exp = [math.exp(value / temperature) for value in c]
        return -math.log(sum(e for e, h in zip(exp, healthy, strict=True) if h)) + math.log(sum(exp))
    terms = []
    for pair, value, h in zip(embeddings, c, healthy, strict=True):
        apart = float((pair[0] - pair[1]).norm())
        sigmoid = 1 / (1 + math.exp(-value))
        terms.append(
            {
                "cosine_nce": -math.log(sigmoid if h else 1 - sigmoid),
                "siamese": 1 - value if h else value,
                "margin": apart**2 if h else max(0.0, margin - apart) ** 2,
            }[form]
        )
    return sum(terms) / len(terms)
