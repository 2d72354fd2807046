"""One batch from many ranks: every rank sees all rows, and gradients come out right under DDP.

Each rank computes the same loss on the same gathered rows, so the gradient of its own rows is complete
without any communication in the backward pass. DDP then averages parameter gradients over the R ranks,
each of which holds only the part through its own rows; multiplying by R makes that average the sum, which
is the gradient of one process that holds the whole batch. Ranks may bring different numbers of subjects
(the uneven last batch), none included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError

_SIZE_GROUPS: dict[dist.ProcessGroup | None, dist.ProcessGroup | None] = {}


def world_size() -> int:
    """The number of ranks that share a batch; 1 when torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_batch(embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B_r, …) and labels (B_r,) of every rank, joined in rank order; alone, the arguments.

    Every rank must call it, with the same shape behind the first dimension; otherwise UserError.
    """
    if world_size() == 1:
        return embeddings, labels
    sizes = _exchange_sizes(embeddings, labels)
    gather_rows: Callable[[Tensor, list[int]], Tensor] = _GatherRows.apply
    gathered = gather_rows(embeddings, sizes)
    return gathered, None if labels is None else _all_rows(labels, sizes)


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """`total` summed over ranks, over `count` summed over ranks, for losses whose samples stand alone.

    What a rank returns is its own share times the number of ranks: DDP's average of the gradients, and the
    average of the values, are then those of one process. With nothing to count, a zero on the graph.
    """
    ranks = world_size()
    if ranks > 1:
        count = count.detach().clone()
        dist.all_reduce(count)
    return total * ranks / count.clamp(min=1)


def _exchange_sizes(embeddings: Tensor, labels: Tensor | None) -> list[int]:
    """B_r of every rank, exchanged between the hosts so that no accelerator has to wait for it."""
    mine = torch.tensor([*embeddings.shape, -1 if labels is None else labels.numel()])
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine, group=_size_group())
    shapes = [tuple(theirs.tolist()) for theirs in everyone]
    for rank, (subjects, *rest, label_count) in enumerate(shapes):
        if tuple(rest) != tuple(embeddings.shape[1:]) or (label_count < 0) != (labels is None):
            raise UserError(
                f"every rank must bring embeddings of the same shape (B, V, D) and labels or none; "
                f"rank {rank} brings {(subjects, *rest)}, rank {dist.get_rank()} {tuple(embeddings.shape)}"
            )
    return [shape[0] for shape in shapes]


def _size_group() -> dist.ProcessGroup | None:
    """A group whose tensors live on the host: the default one where it is gloo, else made once per run."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _SIZE_GROUPS:
        # Groups of an earlier initialisation are dead.
        _SIZE_GROUPS.clear()
        _SIZE_GROUPS[world] = dist.new_group(backend="gloo")
    return _SIZE_GROUPS[world]


def _all_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows of every rank; collectives want equal shapes, so shorter ranks are padded and cut again."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([theirs[:size] for theirs, size in zip(everyone, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    """All rows forward; backward, the gradient of this rank's rows times the number of ranks."""

    @staticmethod
    def forward(context: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        rank = dist.get_rank()
        context.first, context.count, context.ranks = sum(sizes[:rank]), sizes[rank], len(sizes)
        return _all_rows(rows.detach(), sizes)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(0, context.first, context.count) * context.ranks, None
