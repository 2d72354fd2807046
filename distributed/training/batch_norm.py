"""Batch norm over several workers: the mean and the variance are those of the whole batch, on every worker.

With batch norm per worker, the statistics of a batch depend on how it is shared, and every worker keeps running
statistics of its own, of which only those of the first worker are saved.

The losses join the batches of all workers (`core.losses.gather`): every worker computes the loss L of the whole batch,
and its rows get W dL/dx, for W workers. Both forms of batch norm here carry such gradients over to the rows of the
other workers, which share the statistics. So the gradients of a worker's parameters are W times the part of dL/dθ
through its own rows, and their mean over the workers, which DistributedDataParallel takes, is dL/dθ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace every batch norm inside `model` by one over all workers, in place.

    Parameters, buffers and the keys of the state stay: a checkpoint of one worker opens with several, and the reverse.
    `torch.nn.SyncBatchNorm` refuses tensors on a CPU, so there `BatchNormOverWorkers` takes its place.

    Args:
        model: holds batch norms, and is none itself.
        device: where it trains.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, BatchNormOverWorkers.in_place_of(child))


class BatchNormOverWorkers(_BatchNorm):
    """Batch norm of (B, C, …) in training mode over the rows of all workers; in evaluation mode, as in one process.

    Workers may have different numbers of rows, none included. All must call it equally often, forward and backward.
    """

    @classmethod
    def in_place_of(cls, norm: _BatchNorm) -> BatchNormOverWorkers:
        """A batch norm with the settings of `norm`, that shares its parameters and buffers."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made._parameters, made._buffers, made.training = norm._parameters, norm._buffers, norm.training
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …) -> (B, C, …); ValueError if all workers together have one value per channel."""
        if not self.training:
            return super().forward(input)
        over = [dim for dim in range(input.ndim) if dim != 1]
        along = [1, -1] + [1] * (input.ndim - 2)
        mine = torch.tensor([input.numel() / self.num_features], dtype=torch.float64, device=input.device)
        sums = _sum_over_workers(torch.cat([input.sum(over, dtype=torch.float64), mine]))
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError(
                f"batch norm needs more than one value per channel, got shape {tuple(input.shape)}"
            )
        mean = sums[:-1] / count
        # The squares of what is left of the mean: the mean of squares less the squared mean would lose digits.
        centred = input - mean.to(input.dtype).view(along)
        variance = _sum_over_workers(centred.square().sum(over, dtype=torch.float64)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt().to(input.dtype)
        if not self.affine:
            return centred * scale.view(along)
        return centred * (scale * self.weight).view(along) + self.bias.view(along)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions, as `torch.nn.SyncBatchNorm`."""

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch; without momentum they are the mean of all batches."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum or 0.0)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum or 0.0)


class _SumOverWorkers(torch.autograd.Function):
    """The sum over workers, on every worker. Each of them uses it, so its gradient is the sum over workers, too.

    `torch.distributed.nn.functional.all_reduce` is this, and deprecated.
    """

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return _SumOverWorkers._sum(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _SumOverWorkers._sum(gradient)

    @staticmethod
    def _sum(values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


_sum_over_workers: Callable[[Tensor], Tensor] = _SumOverWorkers.apply
