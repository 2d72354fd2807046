"""Recognise from an error of torch or numpy that memory ran out."""

from __future__ import annotations

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Torch has no own exception for the memory of the host; it raises a RuntimeError that contains this name."""
ADVICE = "smaller training.batch_size, model.width or views need less"


def out_of_memory(error: BaseException) -> str | None:
    """One line for the user if `error` says that memory ran out, on a GPU or in the host; None for other errors."""
    is_gpu = isinstance(error, torch.OutOfMemoryError)
    if not (is_gpu or isinstance(error, MemoryError) or CPU_ALLOCATOR in str(error)):
        return None
    words = " ".join(str(error).split())[:160]
    return f"out of memory{' on the GPU' if is_gpu else ''}{f' ({words})' if words else ''}: {ADVICE}"
