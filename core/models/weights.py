"""Starting from trained weights: loading by name, with a report of what matched, and freezing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn

from core.errors import UserError

Take = Literal["encoder", "encoder_and_decoder", "all"]
Freeze = Literal["none", "encoder", "all_but_head"]
LEAST = 0.5
"""The least share of a part of a model, and of the weights for it, that a start must use."""


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
    of_file: float = 1.0
    """The share of the values in the file that were loaded, of the part of it that fits."""
    of_model: float = 1.0
    """The share of the values of the model that were loaded."""

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


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model on the CPU, as a `.safetensors` file holds it: every tensor once.

    Some networks have a layer under two names, as MONAI's DynUNet has; it is kept under the first of them.
    """
    kept, known = dict[str, torch.Tensor](), set[tuple[int, int]]()
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.numel())
        if value.numel() == 0 or place not in known:
            known.add(place)
            kept[name] = value.detach().cpu().contiguous()
    return kept


def load_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    rename: Sequence[str] = (),
    within: Sequence[str] = (),
) -> LoadReport:
    """Load every weight whose name and shape fit, in place, and report the others.

    Names need not be equal: what stands before them (`module.`, `encoder.`, `swinViT.`) is found by what then fits, see
    `match_names`. A first convolution for another number of channels is fitted by spreading its sum over channels
    evenly, so that equal channels give the response that they gave before.

    Args:
        model: loaded into.
        weights: a state dict.
        rename: THEIRS=OURS: what stands at the beginning of names in the file, and what is to stand there instead.
        within: dotted names of the modules that are loaded; all if absent.

    Raises:
        UserError: nothing fits.
    """
    beginnings = tuple(f"{name}." for name in within) or ("",)
    wanted = {name: value for name, value in model.state_dict().items() if name.startswith(beginnings)}
    names = match_names(wanted, weights, rename)
    given = {own: weights[name] for own, name in names.items()}
    channels = _input_channels(wanted, given)
    loaded: dict[str, torch.Tensor] = {}
    adapted, mismatched = [], []
    for name in given:
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
        raise UserError(_nothing_fits(wanted, weights, mismatched))
    model.load_state_dict(loaded, strict=False)
    used = {names[name] for name in (*loaded, *(text.partition(":")[0] for text in mismatched))}
    return LoadReport(
        loaded=tuple(name for name in wanted if name in loaded),
        adapted=tuple(sorted(adapted)),
        missing=tuple(name for name in wanted if name not in given),
        unused=tuple(name for name in weights if name not in used),
        mismatched=tuple(sorted(mismatched)),
        of_file=_share(loaded, [weights[name] for name in _beside(names, weights)]),
        of_model=_share(loaded, list(wanted.values())),
    )


def match_names(
    wanted: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], rename: Sequence[str]
) -> dict[str, str]:
    """The name in the file of every name of the model that has one.

    Files name the same layers in several ways: `conv1.weight` of a ResNet is `module.encoder.conv1.weight` in one that
    was trained in parallel inside a larger model, and MONAI's Swin is `swinViT.…` in Swin UNETR. Of all pairs of
    beginnings, in the file and in the model, the one is taken after which most values fit; names outside both that
    are equal behind what stands before these beginnings are matched, too. Nothing inside a network is moved to another
    place in it: beginnings are those of whole parts.

    Args:
        wanted: the state dict of the model.
        weights: that of the file.
        rename: see `load_weights`.
    """
    given = {_renamed(name, rename): name for name in weights}
    best, most = ("", ""), 0
    for theirs in _beginnings(given):
        for ours in _beginnings(wanted):
            fitting = _fitting(wanted, given, weights, theirs, ours)
            if fitting > most or (fitting == most and fitting and len(theirs + ours) < len("".join(best))):
                best, most = (theirs, ours), fitting
    matched: dict[str, str] = {}
    for theirs in _before(best[0]):
        for ours in _before(best[1]):
            for name in wanted:
                if name.startswith(ours) and (found := given.get(theirs + name.removeprefix(ours))):
                    matched.setdefault(name, found)
    return matched


def load_part(
    model: nn.Module, weights: Mapping[str, torch.Tensor], take: Take, rename: Sequence[str] = ()
) -> LoadReport:
    """Let a part of a model start from weights; see `load_weights`.

    Args:
        model: loaded into; its parts are called encoder, decoder and head.
        weights: a state dict.
        take: the parts.
        rename: see `load_weights`.

    Raises:
        UserError: the model has no such part, or most of the part or of the weights would not be used.
    """
    within: list[str] = []
    for part in [] if take == "all" else take.split("_and_"):
        names = part_names(model, part)
        if not names:
            raise UserError(f"begin.take={take} cannot act: this model has no {part}")
        within.extend(names)
    report = load_weights(model, weights, rename, within)
    if min(report.of_model, report.of_file) < LEAST:
        which = (
            "of the part that it starts" if report.of_model < report.of_file else "of the weights in the file"
        )
        raise UserError(
            f"begin.weights: only {min(report.of_model, report.of_file):.0%} {which} would be used ({report}); give "
            "weights of this network, or names that fit by begin.rename"
        )
    return report


def part_names(model: nn.Module, part: str) -> tuple[str, ...]:
    """The dotted names of the modules that are the encoder, decoder or head of a model; () if it has none.

    A model whose parts are not called so says in `parts` which they are.
    """
    own = getattr(model, "parts", None)
    if isinstance(own, Mapping):
        return tuple(own.get(part, ()))
    return (part,) if part in dict(model.named_children()) else ()


def part_of(model: nn.Module, part: str) -> nn.Module | None:
    """The encoder, decoder or head of a model; None if it has none."""
    names = part_names(model, part)
    if len(names) < 2:
        return model.get_submodule(names[0]) if names else None
    return nn.ModuleDict({name.rpartition(".")[2]: model.get_submodule(name) for name in names})


def freeze(model: nn.Module, which: Freeze) -> None:
    """Exclude parts from training. They have no gradient, so an optimiser keeps nothing for them.

    Batch norm keeps following the batches of a module in training mode: call `train_unfrozen` instead of
    `model.train()`.

    Raises:
        UserError: the model has no such part.
    """
    if which == "none":
        return
    part = "encoder" if which == "encoder" else "head"
    beginnings = tuple(f"{name}." for name in part_names(model, part))
    if not beginnings:
        raise UserError(f"begin.freeze={which} cannot act: this model has no {part}")
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith(beginnings) != (which == "encoder"))


def rates_by_layer(model: nn.Module, rate: float, layer_decay: float) -> dict[str, float]:
    """The factor on the learning rate of every parameter of the encoder, by name; {} if all are 1.

    The last layer has `rate`, and every layer before it `layer_decay` times that of the one behind it (Clark et al.
    2020, ELECTRA). Layers are the parts of the encoder in their order; what stands alone before them is one layer.

    Raises:
        UserError: the model has no encoder.
    """
    if rate == 1.0 and layer_decay == 1.0:
        return {}
    encoder, whole = part_of(model, "encoder"), part_names(model, "encoder")
    if encoder is None:
        raise UserError("begin.rate and begin.layer_decay cannot act: this model has no encoder")
    names = [name for name, _ in encoder.named_parameters()]
    ordered = getattr(encoder, "layers_in_order", ()) or getattr(model, "layers_in_order", ())
    depth_of = _depths(encoder, names, ordered)
    last = max(depth_of.values())
    # Of an encoder of one module names begin with its own; of several with the last part of theirs.
    before = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in whole}
    full = {
        name: f"{whole[0]}.{name}" if len(whole) == 1 else f"{before[name.split('.')[0]]}.{name}"
        for name in names
    }
    return {full[name]: rate * layer_decay ** (last - depth_of[name]) for name in names}


def _depths(encoder: nn.Module, names: Sequence[str], ordered: Sequence[str]) -> dict[str, int]:
    """The number of the layer of every parameter, from the first one: as they are ordered, or as they stand."""
    if ordered:
        return {
            name: next(depth for depth, layer in enumerate(ordered) if name.startswith(layer))
            for name in names
        }
    common = _common_part(names)
    layers = {name: name.removeprefix(common).split(".")[0] for name in names}
    depth_of: dict[str, int] = {}
    was_alone = False
    for layer in layers.values():
        if layer not in depth_of:
            is_alone = not any(True for _ in encoder.get_submodule(common + layer).children())
            depth_of[layer] = max(depth_of.values(), default=-1) + (not (was_alone and is_alone))
            was_alone = is_alone
    return {name: depth_of[layers[name]] for name in names}


def train_unfrozen(model: nn.Module) -> None:
    """Training mode, except for modules whose own parameters are all frozen: their statistics stay."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


_VIDEO = (
    (r"(^|\.)stem\.0\.", r"\1conv1."),
    (r"(^|\.)stem\.1\.", r"\1bn1."),
    (r"(layer\d+\.\d+)\.conv(\d)\.0\.", r"\1.conv\2."),
    (r"(layer\d+\.\d+)\.conv(\d)\.1\.", r"\1.bn\2."),
)
"""What torchvision calls the layers of its 3D ResNets, and what MONAI calls them, as we do."""


def _renamed(name: str, rename: Sequence[str]) -> str:
    for theirs, ours in (each.split("=") for each in rename):
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    for pattern, ours in _VIDEO:
        name = re.sub(pattern, ours, name)
    return name


def _beginnings(names: Iterable[str]) -> list[str]:
    """Whatever stands before a dot in at least one of `names`, down to three parts; the empty one first."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:count]) + "." for count in range(1, min(4, len(parts)))}
    # Parts of a network that repeat themselves (layer1.0, layer1.1) are no beginnings of a whole one.
    return sorted((each for each in found if not re.search(r"\d", each)), key=lambda each: (len(each), each))


def _before(beginning: str) -> list[str]:
    """A beginning, and what stands before it: `encoder.swin.`, `encoder.`, and nothing."""
    parts = beginning.split(".")[:-1]
    return [".".join(parts[:count]) + "." for count in range(len(parts), 0, -1)] + [""]


def _fitting(
    wanted: Mapping[str, torch.Tensor],
    given: Mapping[str, str],
    weights: Mapping[str, torch.Tensor],
    theirs: str,
    ours: str,
) -> int:
    """How many tensors have the same name after these beginnings, and the same shape."""
    return sum(
        bool(value.ndim)
        and name.startswith(ours)
        and (found := given.get(theirs + name.removeprefix(ours))) is not None
        and weights[found].shape == value.shape
        for name, value in wanted.items()
    )


def _beside(names: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in the file under the part that was taken: the longest beginning that all of `names` have there."""
    part = _common_part(list(names.values()))
    return [name for name in weights if name.startswith(part)]


def _common_part(names: Sequence[str]) -> str:
    """The dotted beginning that all names have, with its last dot: "encoder." of encoder.a.w and encoder.b.w."""
    beginnings = [name.split(".")[:-1] for name in names]
    common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*beginnings, strict=False)))
    return "".join(f"{parts[0]}." for parts in common)


def _share(loaded: Mapping[str, torch.Tensor], of: Sequence[torch.Tensor]) -> float:
    """The share of the values in `of` that were loaded."""
    whole = sum(value.numel() for value in of)
    return sum(value.numel() for value in loaded.values()) / whole if whole else 0.0


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
    wanted: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], mismatched: Sequence[str]
) -> str:
    names = (
        f"it wants names like '{next(iter(wanted), 'none')}', the file has '{next(iter(weights), 'none')}'"
    )
    reason = f"another size, {min(mismatched)}" if mismatched else names
    return f"none of the {len(weights)} weights fits the model: {reason}"
