"""Time and peak memory of alternatives, as ratios to a baseline that is measured in the same run.

The alternatives are interleaved, so that other load on the machine slows all of them; torch.utils.benchmark
finishes one before it starts the next. `compare_in_turn` does that too, for alternatives that do not fit
into a GPU's memory together. A ratio compares calls of the same round; its median and range are reported.
If the load average in the first line is not near 0, or two runs differ by more than 10%, measure again.
"""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

Rounds = Annotated[
    int, typer.Option("--rounds", min=1, help="Number of rounds; each times every alternative once.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")]

_CPU = torch.device("cpu")
_CALLS_BEFORE = 5
"""Of each alternative, before it is timed: libraries choose their kernels."""
_CALLS = 5
"""In a round of `compare_in_turn`."""
_BUSY_CYCLES = 200_000_000  # a tenth of a second


class Measurement(NamedTuple):
    """One alternative."""

    name: str
    seconds: list[float]
    """One for each round."""
    ratios: list[float]
    """Its seconds divided by the baseline's of the same round."""
    peak_bytes: int | None
    """Peak memory above the start; None if not measured or not available on this system."""


def compare(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device = _CPU,
    memory: bool = False,
    queued: bool = False,
) -> list[Measurement]:
    """Call every alternative once in each round, after one call that is not timed.

    Args:
        alternatives: name -> a call; all do the same amount of work. The first is the baseline.
        rounds: at least 1.
        device: synchronised before the clock is read.
        memory: also measure the peak memory of this process, in calls that are not timed.
        queued: on a GPU, measure the time of the kernels alone: the GPU is kept busy until all of them are
            queued, so that launching them costs no time.
    """
    clock = _time_of_kernels if queued and device.type == "cuda" else _time
    peaks = {name: _warm_up(work, device, memory) for name, work in alternatives.items()}
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, work in alternatives.items():
            seconds[name].append(clock(work, device))
    return _measurements(seconds, peaks)


def compare_in_turn(
    alternatives: Mapping[str, Callable[[], Callable[[], object]]], *, rounds: int, device: torch.device
) -> list[Measurement]:
    """Time and peak memory of alternatives that do not fit into a GPU's memory together.

    Each is made, called, and freed before the next; nothing else may run meanwhile. A round is several
    calls, queued as in training without waiting for each; seconds are those of one. Peak memory is all that
    torch has reserved, including the memory of CUDA graphs.

    Args:
        alternatives: name -> a function that makes the call. The first is the baseline.
        rounds: at least 1.
        device: as in `compare`.
    """
    peaks, seconds = {}, {}
    for name, make in alternatives.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        work = make()
        for _ in range(_CALLS_BEFORE):
            work()
        _wait(device)
        peaks[name] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        seconds[name] = [_time(partial(_repeat, work), device) / _CALLS for _ in range(rounds)]
        del work
        gc.collect()
    return _measurements(seconds, peaks)


def _repeat(work: Callable[[], object]) -> None:
    for _ in range(_CALLS):
        work()


def _measurements(seconds: Mapping[str, list[float]], peaks: Mapping[str, int | None]) -> list[Measurement]:
    baseline = next(iter(seconds.values()))
    return [
        Measurement(name, own, [each / base for each, base in zip(own, baseline, strict=True)], peaks[name])
        for name, own in seconds.items()
    ]


def _time(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _time_of_kernels(work: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_BUSY_CYCLES)
    start.record()
    work()
    end.record()
    _wait(device)
    return float(start.elapsed_time(end)) / 1000


def conditions(device: torch.device = _CPU) -> str:
    """Versions, hardware and load, to print before anything is measured."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"torch {torch.__version__}, {where}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def table(measurements: list[Measurement], *, items: int = 1, unit: str = "") -> list[str]:
    """Lines to print: a header, then one line for each alternative.

    Args:
        measurements: what `compare` returned, the baseline first.
        items: number of items that one call processes; with `unit`, the median rate is shown too.
        unit: name of the items, for example "views".
    """
    width = max(len(row.name) for row in measurements)
    base = measurements[0]
    has_memory = any(row.peak_bytes is not None for row in measurements)
    header = f"{'':{width}}  {'seconds (min to max)':27}"
    header += f"  {unit + '/s':>10}" if unit else ""
    header += "  time ratio (min to max)"
    header += f"  {'peak memory':>11}  {'memory ratio':>12}" if has_memory else ""
    lines = [header]
    for row in measurements:
        line = f"{row.name:{width}}  {_median_and_range(row.seconds, 4):27}"
        line += f"  {items / statistics.median(row.seconds):10.0f}" if unit else ""
        line += f"  {_median_and_range(row.ratios, 2):23}"
        if row.peak_bytes is not None:
            ratio = f"{row.peak_bytes / base.peak_bytes:.2f}" if base.peak_bytes else "-"
            line += f"  {row.peak_bytes / 1e6:8.0f} MB  {ratio:>12}"
        lines.append(line.rstrip())
    return [*lines, f"ratios to: {base.name}"]


def _median_and_range(values: list[float], digits: int) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _processor() -> str:
    """The CPU model on Linux, otherwise "CPU"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(work: Callable[[], object], device: torch.device, memory: bool) -> int | None:
    """Call `work` once; with `memory`, again to find the bytes at its peak above where it started."""
    # What libraries set up at their first call is not counted.
    work()
    _wait(device)
    if not memory:
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - start
    try:
        # Return freed memory to the system, then, on Linux, reset the peak resident size (proc(5),
        # clear_refs).
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
