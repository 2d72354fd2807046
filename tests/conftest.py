"""What holds for every test: what brainsweep asks of Ray's import, and random numbers that are the same every time."""

import distributed  # noqa: F401, I001 - before any test imports Ray

import random

import numpy as np
import pytest
import torch

from distributed.run.quiet import quiet

quiet()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Inputs and weights that a test draws from the global generators do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
