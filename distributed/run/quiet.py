"""What libraries say that a user can do nothing about."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence it in this process; every process that works on a run calls this once."""
    # Imported here: what only needs a run's folder does not need Optuna.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Most of Optuna's samplers have been "experimental" for years.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Batches are views of shared memory, and nothing writes to them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # Ray Data reports every execution, of which a sweep has one for every cell.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
