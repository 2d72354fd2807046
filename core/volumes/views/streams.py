"""Random streams of views: one for each (seed, subject, epoch, view) and purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Subjects = Sequence[int] | npt.NDArray[np.int64] | torch.Tensor
"""(B,) whole numbers that identify subjects, such as rows of the cohort; not negative."""

Purpose = Literal[
    "view", "mirrored_crop", "quarter_turn", "drop", "swap", "slice", "slice_view", "donor", "mask"
]

# "view" adds no word: it was the first purpose, and its views must stay the same
_WORDS: dict[Purpose, tuple[int, ...]] = {
    "view": (), "mirrored_crop": (1,), "quarter_turn": (2,), "drop": (3,), "swap": (4,), "slice": (5,),
    "slice_view": (6,), "donor": (7,), "mask": (8,),
}  # fmt: skip

_STATE_OF_CHOICES = 4
"""Words of a stream's state, 64 bits each, that numpy's generator takes; the next one seeds the noise."""


def stream_of(
    seed: int, subject: int, epoch: int, view: int, purpose: Purpose = "view", part: int = 0
) -> np.random.SeedSequence:
    """The stream of one view of one subject for one purpose; `part` numbers several results of one purpose."""
    words = _WORDS[purpose]
    return np.random.SeedSequence(
        (seed, int(subject), epoch, view, *words, *((part,) if words and part else ()))
    )


def choices_of(stream: np.random.SeedSequence) -> np.random.Generator:
    """The generator of a stream's choices: places, sizes, chances."""
    return np.random.default_rng(stream)


def standard_normal(like: torch.Tensor, stream: np.random.SeedSequence) -> torch.Tensor:
    """Standard normal numbers of the shape, type and device of `like`, independent of the stream's choices.

    The same on every device of one type (CPU, CUDA), not across types.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(int(stream.generate_state(_STATE_OF_CHOICES + 1, np.uint64)[_STATE_OF_CHOICES]))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
