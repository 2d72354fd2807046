"""The optimiser of a training, and its rates in every epoch and step: functions of the settings alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from core.models.weights import rates_by_layer
from core.run_settings import AdamWSettings, PlateauSettings, RunSettings, SgdSettings
from core.schedules import at, with_epochs

UNDECAYED, FACTOR = "undecayed", "factor"
"""The keys of a group of parameters that has no weight decay, and of the factor on its learning rate."""


def build_optimiser(settings: RunSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `settings.optimiser` over all parameters of `model`, also those that are frozen at first."""
    chosen, begin = settings.optimiser, settings.begin
    factors = rates_by_layer(model, begin.rate, begin.layer_decay)
    gathered: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # Vectors and numbers: biases, and the scales and shifts of norms.
        is_flat = chosen.no_decay != "none" and parameter.ndim < 2
        gathered.setdefault((factors.get(name, 1.0), is_flat), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, FACTOR: factor} | ({UNDECAYED: True} if is_flat else {})
        for (factor, is_flat), parameters in sorted(gathered.items(), key=lambda item: item[0][1])
    ]
    if isinstance(chosen, SgdSettings):
        optimiser: torch.optim.Optimizer = torch.optim.SGD(groups)
    else:
        # One pass over the parameters instead of a dozen.
        kind = torch.optim.AdamW if isinstance(chosen, AdamWSettings) else torch.optim.Adam
        optimiser = kind(groups, fused=True)
    set_rates(settings, optimiser, epoch=1)
    return optimiser


def set_rates(
    settings: RunSettings,
    optimiser: torch.optim.Optimizer,
    epoch: float,
    lowered: float = 1.0,
    before: float | None = None,
) -> float:
    """Set the learning rate, the weight decay and the momentum for `epoch` (from 1); returns the learning rate.

    `before`: see `learning_rate`.

    All of them are set in every epoch, because a restored optimiser has its own values: when a member of a population
    continues with the weights of another member, these are the values of another configuration. `lowered` is a further
    factor on the learning rate.
    """
    rate = learning_rate(settings, epoch, before) * lowered
    chosen = settings.optimiser
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
        decays = not group.get(UNDECAYED, False)
        group["weight_decay"] = at(chosen.weight_decay, epoch / settings.training.rounds) if decays else 0.0
        if isinstance(chosen, SgdSettings):
            group["momentum"] = chosen.momentum
    return rate


def plateau_factor(settings: PlateauSettings | None, losses: Sequence[float]) -> float:
    """The factor on the learning rate after the losses that it watches so far; see `PlateauSettings`."""
    if settings is None:
        return 1.0
    factor, best, bad = 1.0, math.inf, 0
    for loss in losses:
        if loss < best * (1 - settings.threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > settings.patience:
            factor, bad = max(factor * settings.factor, settings.lowest), 0
    return factor


def learning_rate(settings: RunSettings, epoch: float, before: float | None = None) -> float:
    """The learning rate in `epoch` (from 1). The warm-up is linear, from 1 % of the rate of the decay schedule.

    In a training by steps it follows every step: then `epoch` has a fraction, and `before` is what it was a step ago.
    """
    chosen, epochs = settings.optimiser, settings.training.rounds
    progress = epoch / epochs
    before = epoch - 1 if before is None else before
    rate = at(chosen.learning_rate, progress) * with_epochs(chosen.decay, epochs)(progress)
    warmup = round(chosen.warmup * epochs)
    if epoch <= warmup:
        rate *= 0.01 + 0.99 * before / warmup
    return rate


def warm_up(settings: RunSettings, optimiser: torch.optim.Optimizer, steps_before: int, rate: float) -> None:
    """Set the learning rate for the next step, if it rises with every step; `steps_before` have been taken."""
    rising = settings.optimiser.warmup_steps
    if steps_before <= rising and rising:
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get(FACTOR, 1.0) * min(1.0, (steps_before + 1) / rising)
