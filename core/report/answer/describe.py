"""A configuration in a few words, from its dotted settings: `exponential, cauchy, width 3.2 y, τ 0.08`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

# The text for a setting, by its dotted name, in the order of a description; `{}` stands for the value. Settings that
# are not listed follow, each with its own name.
PHRASES: dict[str, str] = {
    "begin.weights": "from {}",
    "objective.name": "{}",
    "objective.kernel": "{}",
    "objective.width": "width {} y",
    "objective.bin_width": "bins of {} y",
    "objective.temperature": "τ {}",
    "objective.neighbours": "neighbours {}",
    "optimiser.name": "{}",
    "optimiser.learning_rate": "lr {}",
    "optimiser.weight_decay": "wd {}",
    "objective.neighbours.metric": "by {} distance",
    "objective.normalise": "mean over {}",
    "model.readout": "read from {}",
    "views.crop": "crop {}",
    "views.cutout": "cutout {}",
    "views.noise": "noise {}",
}
# Views that the value 0 turns off; then a description does not mention them.
OFF_AT_ZERO = ("views.cutout", "views.noise")
# The last part of the name of a setting of a schedule; the part before it is the name of the scheduled quantity.
SCHEDULE_KEYS = ("shape", "value", "start", "end", "rate", "step")


def describe(settings: Mapping[str, Any], most: int | None = None) -> str:
    """The configuration in words. A setting without a value (NaN: it cannot act in this configuration) is left out.

    With `most`, only so many parts are given, the most important ones first, and an ellipsis stands for the rest.
    """
    acting = {name: value for name, value in settings.items() if not is_absent(value)}
    parts = _gather({name: value for name, value in acting.items() if name not in OFF_AT_ZERO or value != 0})
    order = list(PHRASES)
    names = sorted(parts, key=lambda name: order.index(name) if name in PHRASES else len(order))
    words = [_phrase(name, parts[name]) for name in names]
    if most is not None and len(words) > most:
        words = [*words[:most], "…"]
    return ", ".join(words) if words else "nothing was searched"


def is_absent(value: Any) -> bool:
    """Whether `value` is None or NaN."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def number(value: Any) -> str:
    """The value of a setting as short text: 14.0 as 14, 0.0812 as 0.081, 0.000123 as 1.2e-4."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if 0.01 <= abs(value) < 1e5:
        return f"{float(f'{value:.2g}'):g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _gather(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of each setting by its dotted name; the settings of one schedule become one entry."""
    parts: dict[str, str] = {}
    for name, value in settings.items():
        quantity, _, key = name.rpartition(".")
        if key not in SCHEDULE_KEYS or not quantity:
            parts[name] = number(value)
        elif quantity not in parts:
            block = {
                each: settings[f"{quantity}.{each}"]
                for each in SCHEDULE_KEYS
                if f"{quantity}.{each}" in settings
            }
            parts[quantity] = _share(block) if quantity == "objective.neighbours" else _schedule(block)
    return parts


def _share(block: Mapping[str, Any]) -> str:
    """The schedule of the neighbours; its ends are shares of the batch if they are at most 1."""
    ends = [block.get("start", 0), block.get("end", 0)]
    if not all(0 < each <= 1 for each in ends):
        return _schedule(block)
    rest = {key: value for key, value in block.items() if key not in ("start", "end")}
    return f"{100 * ends[0]:.0f}→{100 * ends[1]:.0f} % {_schedule(rest)}"


def _schedule(block: Mapping[str, Any]) -> str:
    words = []
    if "value" in block:
        words.append(number(block["value"]))
    if "start" in block or "end" in block:
        words.append(f"{number(block.get('start', '…'))}→{number(block.get('end', '…'))}")
    if block.get("shape", "constant") != "constant":
        words.append(str(block["shape"]))
    words += [f"{key} {number(block[key])}" for key in ("rate", "step") if key in block]
    return " ".join(words) or str(block.get("shape", ""))


def _phrase(name: str, value: str) -> str:
    if name in PHRASES:
        return PHRASES[name].format(value)
    if name.startswith("pretraining."):
        return f"pre-training: {_phrase(name.removeprefix('pretraining.'), value)}"
    words = " ".join(name.split(".")[-2:]).replace("_", " ")
    return f"{words} {value}"
