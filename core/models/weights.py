"""Starting from trained weights: loading by name, with a report of what matched, and freezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from core.errors import UserError
from core.lookup import did_you_mean


@dataclass(frozen=True)
class LoadReport:
    """What became of every weight; names are the model's, except `unused`, which are the file's."""

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    """Loaded after fitting the number of input channels."""
    missing: tuple[str, ...]
    """In the model only: they keep their initial values."""
    unused: tuple[str, ...]
    """In the file only."""
    mismatched: tuple[str, ...]
    """In both with different shapes: "name: (64, 3) in the file, (64, 2) here"."""

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded"
        for name in ("adapted", "missing", "unused", "mismatched"):
            values: tuple[str, ...] = getattr(self, name)
            if values:
                counts += f", {len(values)} {name} ({values[0]}{', …' if len(values) > 1 else ''})"
        return counts


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a `.safetensors` file or a PyTorch checkpoint, which may nest it under a usual key.

    Raises:
        UserError: the file cannot be read, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    # Every format fails in its own way.
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {' '.join(str(error).split())[:200]}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not any(isinstance(value, torch.Tensor) for value in held.values()):
        raise UserError(f"{path} holds no state dict (found {type(held).__name__}); save model.state_dict()")
    return {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)}


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], prefix: str = "") -> LoadReport:
    """Load every weight whose name and shape fit, in place, and report the others.

    A first convolution for another number of channels is fitted by spreading its sum over channels evenly, so
    that equal channels give the response that they gave before.

    Args:
        model: loaded into.
        weights: a state dict; the "module." of data-parallel training is dropped from its names.
        prefix: take only names that begin with it, without it: "encoder." of a whole model's weights.

    Raises:
        UserError: nothing fits.
    """
    names = {name: own for name in weights if (own := _own_name(name, prefix)) is not None}
    given = {own: weights[name] for name, own in names.items()}
    wanted = model.state_dict()
    channels = _input_channels(wanted, given)
    loaded: dict[str, torch.Tensor] = {}
    adapted, mismatched = [], []
    for name in wanted.keys() & given.keys():
        if given[name].shape == wanted[name].shape:
            loaded[name] = given[name]
        elif channels is not None and _takes(channels, wanted[name], given[name]):
            loaded[name] = given[name].sum(1, keepdim=True).expand_as(wanted[name]) / wanted[name].shape[1]
            adapted.append(name)
        else:
            mismatched.append(
                f"{name}: {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} here"
            )
    # Counters of batches have no dimension and fit every architecture.
    if not any(value.ndim for value in loaded.values()):
        raise UserError(_nothing_fits(wanted, weights, prefix, mismatched))
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=tuple(name for name in wanted if name in loaded),
        adapted=tuple(sorted(adapted)),
        missing=tuple(name for name in wanted if name not in given),
        unused=tuple(name for name in weights if names.get(name) not in wanted),
        mismatched=tuple(sorted(mismatched)),
    )


def freeze(model: nn.Module, prefixes: Sequence[str]) -> tuple[str, ...]:
    """Exclude the parameters whose names begin with one of `prefixes` from training; their names are returned.

    Batch norm keeps following the batches of a module in training mode: call `train_unfrozen` instead of
    `model.train()`.

    Raises:
        UserError: a prefix that no parameter has.
    """
    frozen = []
    for prefix in prefixes:
        found = [(name, value) for name, value in model.named_parameters() if name.startswith(prefix)]
        if not found:
            parts = {name.split(".")[0] for name, _ in model.named_parameters()}
            raise UserError(f"no parameter begins with '{prefix}'; {did_you_mean(prefix, parts)}")
        for name, parameter in found:
            parameter.requires_grad_(False)
            frozen.append(name)
    return tuple(dict.fromkeys(frozen))


def train_unfrozen(model: nn.Module) -> None:
    """Training mode, except for modules whose own parameters are all frozen: their statistics stay."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _own_name(name: str, prefix: str) -> str | None:
    """The model's name of a given weight, or None if it lies outside `prefix`."""
    name = name.removeprefix("module.")
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _input_channels(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> tuple[int, int] | None:
    """(channels here, channels in the file), if the first convolution tells that they differ."""
    for name, value in wanted.items():
        if value.ndim >= 4:
            return (value.shape[1], given[name].shape[1]) if name in given else None
    return None


def _takes(channels: tuple[int, int], wanted: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether this convolution reads the input itself, and differs in its number of channels only."""
    if wanted.ndim < 4 or given.ndim != wanted.ndim:
        return False
    alike = wanted.shape[0] == given.shape[0] and wanted.shape[2:] == given.shape[2:]
    return alike and (wanted.shape[1], given.shape[1]) == channels


def _nothing_fits(
    wanted: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    prefix: str,
    mismatched: Sequence[str],
) -> str:
    under = f" under '{prefix}'" if prefix else ""
    names = (
        f"it wants names like '{next(iter(wanted), 'none')}', the file has '{next(iter(weights), 'none')}'"
    )
    reason = f"another size, {min(mismatched)}" if mismatched else names
    return f"none of the {len(weights)} weights{under} fits the model: {reason}"
