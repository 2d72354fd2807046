"""Time and memory of training steps against the plain MONAI model in a plain loop: `make bench`.

Every comparison is a ratio measured in one process: ours and theirs take turns, and the median of the pairs counts.
Ours is an epoch of one batch as in a sweep, with reading, normalising, views, objective, clipping and bookkeeping.
Theirs is the model of MONAI with all its inputs already in memory.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.networks.nets import resnet18
from monai.transforms import Compose, RandCoarseDropout, RandGaussianNoise, RandSpatialCrop, SpatialPad
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.config import resolve
from core.evaluation.splits import Splits
from core.models import ProjectionHead, build
from core.volumes.views import ViewSettings, make_views
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects

Grid = tuple[int, int, int]
Step = Callable[[], object]
"""One optimiser step on its own batch."""

# The ICBM grid at 2 and 4 mm.
GRIDS: tuple[Grid, ...] = ((91, 109, 91), (46, 55, 46))
ENCODERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("resnet18", {}),
    ("resnet50", {}),
    ("resnext50", {}),
    ("sfcn", {}),
    ("swin", {}),
    ("swin", {"checkpointing": True}),
    ("swin_symmetry", {}),
)
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Variant:
    """A way to compute a training step."""

    name: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool = False


VARIANTS = (
    Variant("float32"),
    Variant("float32, channels_last_3d", channels_last=True),
    Variant("bfloat16", torch.bfloat16),
    Variant("bfloat16, channels_last_3d", torch.bfloat16, channels_last=True),
    Variant("bfloat16, compiled", torch.bfloat16, compiled=True),
    Variant("bfloat16, channels_last_3d, compiled", torch.bfloat16, channels_last=True, compiled=True),
)


def random_volumes(volumes: int, grid: Grid) -> Tensor:
    """(volumes, 1, X, Y, Z): normal values in the middle and 0 around it, like a brain in its background."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(volumes, 1, *grid, generator=generator)
    inside = torch.zeros(grid)
    inside[tuple(slice(side // 6, -(side // 6)) for side in grid)] = 1
    return values * inside


def our_step(subjects: int, views: int, grid: Grid, device: torch.device) -> Step:
    """An epoch of one batch of a trial with the published settings in float32."""
    settings = resolve(
        {
            "training": {"batch_size": subjects, "epochs": 10_000, "precision": "float32"},
            "views": {"count": views},
        }
    )
    rows = np.arange(subjects)
    known = Subjects(
        InMemory(random_volumes(subjects, grid).numpy(), np.ones((subjects, 1), np.float32)),
        pd.DataFrame({"subject": rows.astype(str), "age": 20.0 + 10 * rows, "site": ""}),
        Splits(rows[:0], (rows,)),
        ("t1",),
    )
    return CellTraining(settings, known, Cell(HOLDOUT, 0), Place(device)).run_epoch


def plain_step(subjects: int, views: int, grid: Grid, device: torch.device) -> Step:
    """The ResNet-18 of MONAI with a projection head and y-aware contrast, in the shortest loop."""
    encoder = resnet18(
        n_input_channels=1, conv1_t_stride=2, feed_forward=False, shortcut_type="B", bias_downsample=False
    )
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    volumes = random_volumes(subjects, grid).to(device).repeat(views, 1, 1, 1, 1)
    model = nn.Sequential(encoder, head).to(device)
    return plain_loop(model, model.parameters(), volumes)


def our_views(subjects: int, grid: Grid) -> Step:
    """Two views of each volume: noise, cutout and crop with the sizes of the reference."""
    settings = ViewSettings(count=2, crop=0.9, cutout=0.5, noise=0.05)
    volumes = random_volumes(subjects, grid)
    return lambda: make_views(volumes, range(subjects), 0, 0, settings)


def monai_views(subjects: int, grid: Grid) -> Step:
    """The same views with the transforms of MONAI, one volume after another."""
    cube = round(0.35 * min(grid))
    view = Compose(
        [
            RandGaussianNoise(prob=1, std=0.05, sample_std=False),
            RandCoarseDropout(holes=1, spatial_size=cube, fill_value=0, prob=0.5),
            RandSpatialCrop([round(0.9 * side) for side in grid], random_size=False),
            SpatialPad(grid),
        ]
    )
    volumes = random_volumes(subjects, grid)
    return lambda: torch.stack([view(volume) for volume in volumes for _ in range(2)])


def plain_loop(
    model: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    volumes: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Forward, y-aware contrast, backward, Adam."""
    optimiser = torch.optim.Adam(parameters, lr=1e-4, weight_decay=5e-5)
    ages = torch.linspace(50, 55, len(volumes), device=volumes.device)
    own = torch.eye(len(volumes), device=volumes.device)
    weights = torch.exp(-((ages[:, None] - ages[None]) ** 2) / 8) * (1 - own)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(volumes.device.type, dtype, enabled=dtype != torch.float32):
            embedding = model(volumes)
        embedding = F.normalize(embedding.float(), dim=1)
        logits = embedding @ embedding.T / 0.1 - 1e9 * own
        loss = -(weights * F.log_softmax(logits, dim=1)).sum() / weights.sum()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def variant_step(variant: Variant, volumes: int, grid: Grid, device: torch.device) -> Step:
    """A step of our ResNet-18 and head, computed as `variant` says."""
    model = nn.Sequential(build("resnet18"), ProjectionHead(512)).to(device)
    batch = random_volumes(volumes, grid).to(device)
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last_3d)
    forward = torch.compile(model) if variant.compiled else model
    return plain_loop(forward, model.parameters(), batch, variant.dtype)


@dataclass(frozen=True)
class Turn:
    """Seconds of one step: wall clock and processor time."""

    wall: float
    processor: float


def time_of(step: Step, device: torch.device) -> Turn:
    """The time of one step; it waits for the device before and after."""
    synchronise(device)
    processor, wall = time.process_time(), time.perf_counter()
    step()
    synchronise(device)
    return Turn(time.perf_counter() - wall, time.process_time() - processor)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(first: Step, second: Step, repeats: int, device: torch.device) -> list[tuple[Turn, Turn]]:
    """Measure both in turns, after one unmeasured step each; every second pair is reversed, so drift cancels."""
    first(), second()
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            later = time_of(second, device)
            pairs.append((time_of(first, device), later))
        else:
            pairs.append((time_of(first, device), time_of(second, device)))
    return pairs


def matrix_ceiling(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Operations per second in the product of two square matrices, the limit for a model. Best of 5."""
    side = side or (8192 if device.type == "cuda" else 2048)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    matrix @ matrix
    return 2 * side**3 / min(time_of(lambda: matrix @ matrix, device).wall for _ in range(5))


def operations(grid: Grid) -> float:
    """The multiplications and additions of ResNet-18, forward and backward, for one volume."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build("resnet18")(torch.empty(2, 1, *grid)).sum().backward()
    return counter.get_total_flops() / 2


def saved_bytes(model: nn.Module, volumes: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass; each memory counts once, and parameters do not count."""
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            # Keep the storage, so that no other one gets its address.
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(volumes)
    return sum(storage.nbytes() for storage in kept.values())


def peak_per_volume(make: Callable[[int, int, Grid, torch.device], Step], grid: Grid) -> float:
    """Bytes that one more volume adds to the peak of a first step; each batch has its own process."""
    peaks = []
    # With fewer subjects the gradients and the moments of Adam determine the peak.
    for subjects in (4, 12):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            peaks.append(fresh.apply(_peak_here, (make, subjects, grid, torch.get_num_threads())))
    return (peaks[1] - peaks[0]) / 8


def _peak_here(
    make: Callable[[int, int, Grid, torch.device], Step], subjects: int, grid: Grid, threads: int
) -> int:
    torch.set_num_threads(threads)
    step = make(subjects, 1, grid, torch.device("cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def largest(fits: Callable[[int], bool], limit: int = 65536) -> int:
    """The largest count up to `limit` that fits, if all smaller counts fit: by doubling, then by bisection."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_on_gpu(variant: Variant, grid: Grid, device: torch.device, volumes: int) -> bool:
    """Whether two steps on so many volumes fit into the memory of the GPU."""
    try:
        step = variant_step(variant, volumes, grid, device)
        step(), step()  # Adam's moments appear in the first
        synchronise(device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def compare(console: Console, device: torch.device, repeats: dict[Grid, int], subjects: int) -> None:
    """Our step against the plain one: 1 is as fast, above 1 is faster."""
    table = Table("grid", "volumes", "ours s", "plain s", "wall: plain/ours", "processor: plain/ours", "of ceiling",
                  title=f"training step of ResNet-18, float32, {device.type}; asked: 0.97")  # fmt: skip
    ceiling = matrix_ceiling(device, torch.float32)
    for grid in GRIDS:
        ours, plain = our_step(subjects, 2, grid, device), plain_step(subjects, 2, grid, device)
        pairs = take_turns(ours, plain, repeats[grid], device)
        walls = sorted(theirs.wall / mine.wall for mine, theirs in pairs)
        processor = statistics.median(theirs.processor / mine.processor for mine, theirs in pairs)
        mine = statistics.median(turn.wall for turn, _ in pairs)
        share = 2 * subjects * operations(grid) / mine / ceiling
        table.add_row(
            shown(grid), str(2 * subjects), f"{mine:.3f}", f"{statistics.median(t.wall for _, t in pairs):.3f}",
            f"{statistics.median(walls):.3f} ({walls[0]:.2f} to {walls[-1]:.2f})", f"{processor:.3f}", f"{share:.0%}",
        )  # fmt: skip
    console.print(table)


def views(console: Console, repeats: int) -> None:
    """The cost of augmentation on the CPU."""
    title = "views: noise, cutout and crop, two of a volume, processor ms each"
    table = Table("grid", "ours", "MONAI", "times faster", title=title)
    for grid in GRIDS:
        pairs = take_turns(our_views(2, grid), monai_views(2, grid), repeats, torch.device("cpu"))
        mine, theirs = (
            statistics.median(turn.processor for turn in turns) for turns in zip(*pairs, strict=True)
        )
        faster = statistics.median(b.processor / a.processor for a, b in pairs)
        table.add_row(shown(grid), *(f"{value / 4 * 1e3:.1f}" for value in (mine, theirs)), f"{faster:.1f}")
    console.print(table)


def memory(console: Console) -> None:
    """The memory for a volume: the peak of whole steps in new processes, and what each encoder keeps."""
    peaks = Table("grid", "ours MiB", "MONAI MiB", title="peak of a step of ResNet-18 per volume")
    for grid in GRIDS:
        of_each = [peak_per_volume(make, grid) / MEBIBYTE for make in (our_step, plain_step)]
        peaks.add_row(shown(grid), *(f"{peak:.0f}" for peak in of_each))
    console.print(peaks)
    kept = Table(
        "encoder", "parameters", *map(shown, GRIDS), title="MiB kept for backward per volume, float32"
    )
    for name, settings in ENCODERS:
        # Shapes only, so that the largest encoder needs no memory.
        model = build(name, **settings).to("meta")
        of_grids = [saved_bytes(model, torch.empty(2, 1, *grid, device="meta")) / 2 for grid in GRIDS]
        label = name + (", checkpointing" if settings else "")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        kept.add_row(label, f"{parameters:,}", *(f"{value / MEBIBYTE:.0f}" for value in of_grids))
    console.print(kept)


def variants(console: Console, device: torch.device, grid: Grid, volumes: int, repeats: int) -> None:
    """Precision, memory format and compilation; each takes turns with float32."""
    table = Table("variant", "s a step", "volumes/s", "times float32", "of ceiling", "largest batch",
                  title=f"ResNet-18 and head, {shown(grid)}, {volumes} volumes, {device.type}")  # fmt: skip
    ceilings = {dtype: matrix_ceiling(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    work = volumes * operations(grid)
    for variant in VARIANTS:
        if variant.compiled and device.type != "cuda":
            table.add_row(variant.name, *["skipped: no GPU"] * 5)
            continue
        step, base = (variant_step(each, volumes, grid, device) for each in (variant, VARIANTS[0]))
        pairs = take_turns(step, base, repeats, device)
        wall = statistics.median(mine.wall for mine, _ in pairs)
        faster = statistics.median(plain.wall / mine.wall for mine, plain in pairs)
        # Free their memory before the search for the largest batch.
        del step, base
        batch = "skipped: no GPU"
        if device.type == "cuda":
            batch = str(largest(functools.partial(fits_on_gpu, variant, grid, device)))
        table.add_row(
            variant.name, f"{wall:.3f}", f"{volumes / wall:.1f}", f"{faster:.2f}",
            f"{work / wall / ceilings[variant.dtype]:.0%}", batch,
        )  # fmt: skip
    console.print(table)


def shown(grid: Grid) -> str:
    """91x109x91."""
    return "x".join(map(str, grid))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, help="pairs of steps of each grid")
    parser.add_argument("--variants", action="store_true", help="precision and format on the CPU too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    console = Console()
    few, many = (20, 40) if gpu else (5, 15)
    repeats = {GRIDS[0]: options.repeats or few, GRIDS[1]: options.repeats or many}
    compare(console, device, repeats, subjects=16 if gpu else 2)
    views(console, repeats=many)
    memory(console)
    if gpu:
        for grid in GRIDS:
            variants(console, device, grid, volumes=32, repeats=20)
    elif options.variants:
        variants(console, device, GRIDS[1], volumes=4, repeats=options.repeats or 5)
    else:
        console.print("bfloat16, channels_last_3d, compile, largest batch: skipped, torch sees no CUDA device "
                      "(--variants measures the first two here)")  # fmt: skip


if __name__ == "__main__":
    main()
