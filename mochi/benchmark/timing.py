"""Time and peak memory of alternatives, taken in turn so that a machine's moods hit all alike."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Measurement(NamedTuple):
    """One alternative."""

    name: str
    seconds: float
    """Median over the rounds."""
    fastest: float
    slowest: float
    ratio: float
    """Median over the rounds of its time over the baseline's in the same round."""
    peak_bytes: int | None
    """Memory at its highest above where it started; None where the system does not tell."""


def compare(
    alternatives: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int, device: torch.device
) -> list[Measurement]:
    """Run every alternative once a round, after uncounted rounds that warm up and measure memory."""
    peaks = {name: _peak(work, device) for name, work in alternatives.items()}
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, work in alternatives.items():
            start = time.perf_counter()
            work()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return [
        Measurement(
            name,
            statistics.median(taken),
            min(taken),
            max(taken),
            statistics.median(mine / base for mine, base in zip(taken, times[baseline], strict=True)),
            peaks[name],
        )
        for name, taken in times.items()
    ]


def table(measurements: list[Measurement], *, baseline: str) -> list[str]:
    """Lines to print."""
    width = max(len(row.name) for row in measurements)
    base = next(row for row in measurements if row.name == baseline)
    lines = [f"{'':{width}}   seconds (min to max)         time ratio   peak memory   memory ratio"]
    for row in measurements:
        memory = ratio = "-"
        if row.peak_bytes is not None:
            memory = f"{row.peak_bytes / 1e6:.0f} MB"
            ratio = f"{row.peak_bytes / base.peak_bytes:.2f}" if base.peak_bytes else "-"
        span = f"{row.seconds:.4f} ({row.fastest:.4f} to {row.slowest:.4f})"
        lines.append(f"{row.name:{width}}   {span:27}  {row.ratio:10.2f}   {memory:>11}   {ratio:>12}")
    return [*lines, f"ratios: against {baseline}"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of `work` above where it started."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - start
    # Once before, so that what libraries set up at their first call is not counted.
    work()
    try:
        # Give back what the C library keeps of freed memory, then, on Linux, forget the highest resident
        # size so far (proc(5), clear_refs).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = _status("VmRSS")
        work()
        return _status("VmHWM") - start
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
