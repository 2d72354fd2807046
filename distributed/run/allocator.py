"""How this process, and those that it starts, keep the memory that they have freed."""

from __future__ import annotations

import ctypes
import os

OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**30),
    "MALLOC_TOP_PAD_": (-2, 2**27),
}
"""Options of malloc in glibc by the variables that set them in new processes: their numbers (malloc.h), and values."""


def keep_freed_memory() -> None:
    """Reuse freed memory; what the user has set for an option stays.

    A training step on a CPU makes and frees the same tensors again and again, and glibc gives each that is larger than
    some 100 kB back to the system, which clears new pages for the next one: a third of the time of a small Swin. Up to
    1 GiB stays with a process now. One arena, because those of other threads consist of pieces of 64 MiB that are given
    back whole, and training runs in a thread of a worker of Ray.
    """
    for name, (_, value) in OPTIONS.items():
        os.environ.setdefault(name, str(value))
    # Other C libraries have no such function, and their allocators other habits.
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (number, _) in OPTIONS.items():
        if set_option is not None and os.environ[name].isdigit():
            set_option(number, min(int(os.environ[name]), 2**31 - 1))
