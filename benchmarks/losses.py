"""Time and memory of the objective family against plain published algorithms: `make bench`.

Every comparison is a ratio measured in one process: ours and theirs take turns, forward and backward, and the median of
the repeats counts. Peak memory is measured in a new process, above its memory before the pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import published_losses as published
from core.losses import build

Case = Callable[[], Tensor]
"""One forward pass on its own inputs; the caller runs the backward pass."""

EMBEDDING = 128
GIBIBYTE = 2**30


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings (rows/2, 2, 128) and ages in years."""
    generator = torch.Generator().manual_seed(rows)
    embeddings = torch.randn(rows // 2, 2, EMBEDDING, generator=generator).requires_grad_()
    return embeddings, 20 + 70 * torch.rand(rows // 2, generator=generator)


def neighbours(subjects: int, metric: str) -> dict[str, object]:
    """A constant neighbourhood."""
    return {"start": subjects, "end": subjects, "shape": "linear", "metric": metric}


def threshold(rows: int) -> tuple[Case, Case]:
    """Ours and the (N, N, N) form of the formula."""
    z, y = batch(rows)
    loss = build("threshold")
    return lambda: loss(z, y, 1.0), lambda: published.threshold(z, y)


def threshold_as_released(rows: int) -> tuple[Case, Case]:
    """Ours with reference='barbano' and the released (N, N, N) form."""
    z, y = batch(rows)
    loss = build("threshold", reference="barbano")
    return lambda: loss(z, y, 1.0), lambda: published.threshold_as_released(z, y)


def rank_n_contrast(rows: int) -> tuple[Case, Case]:
    """Ours and the released loop over positives."""
    z, y = batch(rows)
    loss = build("rank_n_contrast")
    return lambda: loss(z, y, 1.0), lambda: published.rank_n_contrast(z, y)


def exponential_manhattan(rows: int) -> tuple[Case, Case]:
    """Dynamic Localised Repulsion with half the batch as neighbours, by manhattan distance."""
    return _exponential(rows, rows // 4, "manhattan")


def exponential_cosine(rows: int) -> tuple[Case, Case]:
    """Dynamic Localised Repulsion with half the batch as neighbours, by cosine."""
    return _exponential(rows, rows // 4, "cosine")


def _exponential(rows: int, subjects: int, metric: str) -> tuple[Case, Case]:
    z, y = batch(rows)
    loss = build("exponential", reference="dynlocrep", neighbours=neighbours(subjects, metric))
    return lambda: loss(z, y, 1.0), lambda: published.exponential_with_neighbours(z, y, subjects, metric)


def constrained_contrast(patches: int) -> tuple[Case, Case]:
    """10 images, 20 anchors each, 64-d, 101 nearest; ours with reference='ccl' and the loop over anchors."""
    generator = torch.Generator().manual_seed(patches)
    side = round(patches**0.5)
    features = torch.randn(10, 64, side, side, generator=generator).requires_grad_()
    clusters = torch.randint(0, 20, (10, side, side), generator=generator)
    anchors = torch.stack([torch.randperm(patches, generator=generator)[:20] for _ in range(10)])
    loss = build("constrained_contrast", reference="ccl")
    foreground = torch.ones_like(clusters, dtype=torch.bool)
    return (
        lambda: loss(features, clusters, foreground, 1.0, anchors),
        lambda: published.constrained_contrast(
            features.flatten(2).transpose(1, 2), clusters.flatten(1), anchors
        ),
    )


# Case, size, repeats, and what is asked: how many times faster, and the largest share of the peak memory.
COMPARISONS: list[tuple[str, Callable[[int], tuple[Case, Case]], int, int, float, float | None]] = [
    ("threshold, as released", threshold_as_released, 512, 5, 50, 1 / 50),
    ("threshold, formula", threshold, 512, 5, 50, 1 / 50),
    ("rank_n_contrast", rank_n_contrast, 1024, 5, 15, None),
    ("exponential, 128 nearest (manhattan)", exponential_manhattan, 512, 15, 2, None),
    ("exponential, 128 nearest (cosine)", exponential_cosine, 512, 15, 2, None),
    ("constrained_contrast", constrained_contrast, 1600, 15, 20, None),
]

GROWTH = ("y_aware", "threshold", "exponential", "rank_n_contrast")


def seconds(case: Case) -> float:
    """Wall time of one forward and backward pass."""
    start = time.perf_counter()
    case().backward()
    return time.perf_counter() - start


def side_by_side(ours: Case, theirs: Case, repeats: int) -> tuple[float, float]:
    """Median seconds of each, taking turns after one unmeasured turn."""
    seconds(ours), seconds(theirs)
    turns = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    mine, others = zip(*turns, strict=True)
    return statistics.median(mine), statistics.median(others)


def peak_of(make: Callable[[int], tuple[Case, Case]], size: int, side: int) -> int:
    """Bytes at the peak of one forward and backward pass, above those before it, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(_peak_here, (make, size, side))


def _peak_here(make: Callable[[int], tuple[Case, Case]], size: int, side: int) -> int:
    torch.set_num_threads(1)
    case = make(size)[side]
    # The memory that torch uses once does not belong to the loss.
    make(64)[side]().backward()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    case().backward()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def sixteen_thousand_rows(rows: int) -> tuple[Case, Case]:
    """The chunked form."""
    z, y = batch(rows)
    loss = build("threshold", chunk_rows=1024)
    return lambda: loss(z, y, 1.0), lambda: loss(z, y, 1.0)


def compare(console: Console) -> None:
    """The table of ratios."""
    table = Table("loss", "size", "ours ms", "published ms", "times faster", "memory", "asked", "value gap")
    for name, make, size, repeats, faster, share in COMPARISONS:
        ours, theirs = make(size)
        a, b = ours().item(), theirs().item()
        mine, others = side_by_side(ours, theirs, repeats)
        memory, asked = "", f"{faster:.0f}×"
        if share is not None:
            peaks = [peak_of(make, size, side) for side in (0, 1)]
            memory = (
                f"{peaks[0] / 2**20:.0f} of {peaks[1] / 2**20:.0f} MiB (1/{peaks[1] / max(peaks[0], 1):.0f})"
            )
            asked += f", 1/{1 / share:.0f}"
        table.add_row(
            name, str(size), f"{mine * 1e3:.1f}", f"{others * 1e3:.1f}", f"{others / mine:.1f}", memory, asked,
            f"{abs(a - b) / abs(b):.0e}",
        )  # fmt: skip
    console.print(table)


def growth(console: Console, sizes: Sequence[int]) -> None:
    """Seconds of each loss as the batch doubles; N² means four times each."""
    table = Table("rows", *(f"{name} s" for name in GROWTH))
    for rows in sizes:
        z, y = batch(rows)
        cases = [partial(build(name), z, y, 1.0) for name in GROWTH]
        table.add_row(str(rows), *(f"{min(seconds(case) for _ in range(2)):.2f}" for case in cases))
    console.print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="leave out large batches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    compare(console)
    growth(console, (512, 1024, 2048) if options.quick else (512, 1024, 2048, 4096, 8192))
    if not options.quick:
        peak = peak_of(sixteen_thousand_rows, 16384, 0)
        console.print(
            f"threshold at 16384 rows in chunks of 1024: {peak / GIBIBYTE:.2f} GiB at the peak (asked: 4)"
        )


if __name__ == "__main__":
    main()
