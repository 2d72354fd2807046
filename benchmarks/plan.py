"""The cost of plans for large cohorts: seconds and memory for the order of all batches of 200 epochs.

    python -m benchmarks.plan

"batches" makes every batch of the plan. "reads" makes the tables for a stream, with one line for each read of up to 64
volumes. A plan keeps nothing of an epoch that is over, so memory grows with the rows and not with the epochs.
"""

from __future__ import annotations

import resource
import time
import tracemalloc

import numpy as np
from rich.console import Console
from rich.table import Table

from distributed.batches.plan import Plan

EPOCHS = 200
BATCH = 32
SUBJECTS = (5_000, 50_000, 500_000)


def seconds_of(plan: Plan, *, as_reads: bool) -> float:
    """Seconds to go through all of `plan`."""
    started = time.perf_counter()
    if as_reads:
        planned = sum(len(plan.reads(epoch, 64)["rows"].chunk(0).values) for epoch in plan.epochs)
    else:
        planned = sum(len(batch) for batch in plan.batches())
    if planned != len(plan.rows) * len(plan.epochs):
        raise AssertionError(f"{planned} rows were planned")
    return time.perf_counter() - started


def peak_of(plan: Plan) -> int:
    """The largest number of bytes that two epochs of `plan` need at a time."""
    tracemalloc.start()
    seconds_of(Plan(plan.rows, plan.batch_size, plan.seed, range(1, 3)), as_reads=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Measure, print the table."""
    table = Table(
        "subjects", "rows in all", "seconds, batches", "seconds, reads", "peak MB", title=f"{EPOCHS} epochs"
    )
    for subjects in SUBJECTS:
        plan = Plan(np.arange(subjects), BATCH, 0, range(1, EPOCHS + 1))
        seconds = seconds_of(plan, as_reads=False), seconds_of(plan, as_reads=True)
        table.add_row(
            f"{subjects:,}", f"{subjects * EPOCHS:,}", *(f"{value:.2f}" for value in seconds),
            f"{peak_of(plan) / 1e6:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"largest resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )


if __name__ == "__main__":
    main()
