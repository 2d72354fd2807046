"""Memory that a training step frees is used by the next one, in this process and in those of Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import distributed
from distributed.run.allocator import OPTIONS

STEPS = """
import resource, sys, threading
import numpy as np

if sys.argv[1] == "kept":
    from distributed.run.allocator import keep_freed_memory
    keep_freed_memory()

def step():
    made = [np.ones(2**20) for _ in range(16)]  # 8 MiB each, alive together as activations are

def steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

steps()
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


def new_pages(kind: str, **variables: str) -> tuple[int, int]:
    """How many pages ten steps were given, in the main thread and in another one."""
    clean = {name: value for name, value in os.environ.items() if name not in OPTIONS}
    ran = subprocess.run(
        [sys.executable, "-c", STEPS, kind], env=clean | variables, capture_output=True, text=True, check=True
    )
    main, other = map(int, ran.stdout.split())
    return main, other


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep memory in other ways")
def test_freed_memory_is_used_again():
    at_once = new_pages("given back")
    assert min(at_once) > 2**23 / 4096
    assert max(new_pages("kept")) < min(at_once) / 20
    inherited = new_pages("given back", **{name: str(value) for name, (_, value) in OPTIONS.items()})
    assert max(inherited) < min(at_once) / 20
    # What a user has set stays.
    assert max(new_pages("kept", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_TOP_PAD_="0")) > 2**23 / 4096


def test_a_job_of_slurm_sets_the_same():
    """And what the user has set stays."""
    text = (Path(distributed.__file__).parent / "clusters" / "slurm.sbatch").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("export MALLOC")]
    shown = " ".join(f"${name}" for name in OPTIONS)
    ran = subprocess.run(
        ["bash", "-c", f"MALLOC_ARENA_MAX=7; {line}; echo {shown}"], env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == ["7", *(str(value) for _, value in list(OPTIONS.values())[1:])]
