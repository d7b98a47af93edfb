"""Every file of a split read and judged: in parallel, in order, and only once while it stays the same."""

import hashlib
import logging
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from mochi.data import decode
from mochi.data.origin import FileSplit, in_batches
from mochi.data.shards import DataError

_LOG = logging.getLogger(__name__)
_FILES_A_TASK = 32


@dataclass(frozen=True)
class Scanned:
    """One file: where it is in its split, its verdict, and the bytes to store (empty if unreadable)."""

    row: int
    size: int
    sha256: bytes
    verdict: decode.Checked
    stored: bytes


def scan(split: FileSplit, jobs: int) -> Iterator[Scanned]:
    """Judge the files of a split on `jobs` processes; results come in the order of the rows.

    Raises:
        DataError: a worker process was killed, most often for want of memory.
    """
    tasks = (
        (row.start, [str(split.root / split.paths[number]) for number in row])
        for row in in_batches(len(split.paths), _FILES_A_TASK)
    )
    if jobs == 1 or len(split.paths) <= _FILES_A_TASK:
        for first, paths in tasks:
            yield from _judge(first, paths)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting: deque[Future[list[Scanned]]] = deque()
        try:
            for first, paths in tasks:
                waiting.append(pool.submit(_judge, first, paths))
                # Bounded, so that images never pile up in memory when the disk is slow.
                if len(waiting) > 3 * jobs:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"{split.root}: a decoding process was killed, most often for want of memory; "
                "run again with fewer --jobs (what is done is kept)"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _judge(first: int, paths: list[str]) -> list[Scanned]:
    return [_judge_one(first + offset, path) for offset, path in enumerate(paths)]


def _judge_one(row: int, path: str) -> Scanned:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        return Scanned(row, -1, b"", decode.Checked(reason, 0, 0, "", "", None), b"")
    verdict = decode.check(data)
    stored = b"" if verdict.reason else verdict.encoded or data
    return Scanned(row, len(data), hashlib.sha256(data).digest(), verdict, stored)
