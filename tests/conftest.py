"""What holds for every test: what brainsweep asks of Ray's import, and random numbers that are the same every time."""

import distributed  # noqa: F401, I001 - before any test imports Ray

import random
import sys

import numpy as np
import pytest
import torch

from distributed.commands.app import main
from distributed.run.quiet import quiet

quiet()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Inputs and weights that a test draws from the global generators do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def brainsweep(monkeypatch, capsys):
    """Run `brainsweep ARGUMENTS` in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["brainsweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run
