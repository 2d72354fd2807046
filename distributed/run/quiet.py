"""Messages of libraries about which a user can do nothing."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence them in this process; every process that works on a run calls this once."""
    # Imported here, because modules that only need the folder of a run do not need Optuna.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Most samplers of Optuna are called experimental.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Batches are views of shared memory, and nothing writes to them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # MONAI calls its own function in a way that it has deprecated.
    warnings.filterwarnings("ignore", message=".*get_mask_edges", category=FutureWarning)
    # Ray Data reports every execution, and a sweep has one for every cell.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
