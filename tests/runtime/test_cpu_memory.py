"""Freed memory is kept for the next tensor; whoever sets malloc's variables keeps the choice."""

import os
import platform
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")

FAULTS = """
import resource, torch
from mochi.runtime.cpu_memory import keep_freed_memory
kept = keep_freed_memory()
def allocate():
    for size in (1 << 24, 1 << 26, 1 << 22):  # 16, 64 and 4 MiB
        torch.zeros(size, dtype=torch.uint8)
rounds = []
for _ in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, *rounds)
"""


def faults(**environment: str) -> tuple[str, float]:
    """(whether memory is kept, page faults of a round of allocations) in a process of its own.

    The median of 15 rounds: the heap still grows in a few of them, where small blocks split the free ones.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, *rounds = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return kept, statistics.median(map(int, rounds))


def test_tensors_reuse_memory_instead_of_getting_it_cleared_by_the_kernel() -> None:
    kept, own = faults()
    assert kept == "True"
    assert own < 100  # 84 MiB are 21,504 pages

    kept, usual = faults(MALLOC_MMAP_MAX_="65536")  # large blocks come from the kernel
    assert kept == "False"
    assert usual > 10_000
