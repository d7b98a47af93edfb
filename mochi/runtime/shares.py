"""How the cores of this machine are shared: threads and workers of a run, and concurrent runs."""

import logging
import os

logger = logging.getLogger(__name__)

_MOST_THREADS = 16
"""For one GPU of this host: an H100 takes the views of about a dozen cores (docs/benchmarks.md)."""
_THREADS_ELSEWHERE = 8
"""For one GPU of a cluster's node, whose cores are unknown here."""


def threads_per_run(num_gpus: int) -> int:
    """CPU threads of a run: with GPUs its share of the cores, without GPUs one.

    Loaders of one GPU need some cores, but no GPU may wait for cores. On a CPU, two runs of one thread each
    are faster than one run of two threads.
    """
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // num_gpus)) if num_gpus else 1


def threads_of_job(num_gpus: int, gpus_of_job: int) -> int:
    """CPU threads of a job on some GPUs, on a host with `num_gpus`; a login node has none."""
    if not gpus_of_job:
        return threads_per_run(0)
    return gpus_of_job * (threads_per_run(num_gpus) if num_gpus else _THREADS_ELSEWHERE)


def workers_of(threads: int) -> int:
    """Processes that load images for a run with this many threads."""
    return threads - 1


def warn_without_workers(device_type: str, workers: int) -> None:
    """Warn that a GPU will wait for images, which this process decodes one by one."""
    if device_type == "cuda" and not workers:
        logger.warning(
            "this process decodes all images, so the GPU waits for one core; pass --workers N, the cores "
            "for each GPU less one"
        )


def runs_at_once(num_gpus: int) -> int:
    """Runs that `snakemake --cores all` starts concurrently."""
    return num_gpus or os.cpu_count() or 1
