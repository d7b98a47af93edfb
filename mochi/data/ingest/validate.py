"""Every file of a split read and judged: in parallel, in order, and decoded only when never seen."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mochi.data.format import DataError
from mochi.data.ingest import decode, verdicts
from mochi.data.ingest.raw import Blob, FileSplit, in_batches
from mochi.data.ingest.verdicts import Verdicts

_FILES_A_TASK = 64
_FILES_ALONE = 512  # so few are done before worker processes have started
_KEEP_EVERY = 4096  # verdicts; an interrupted run loses no more than these


@dataclass(frozen=True)
class Scanned:
    """One file: its row in the split and its verdict."""

    row: int
    size: int
    sha256: bytes
    verdict: decode.Checked


class Scanner:
    """Reads splits with one pool of processes; made by `scanning`."""

    def __init__(self, pool: ProcessPoolExecutor | None, jobs: int, cache: Path) -> None:
        self._pool, self._jobs, self._cache = pool, jobs, cache
        self._known = verdicts.open_store(cache)

    def scan(self, split: FileSplit, *, keep_encoded: bool = True) -> Iterator[Scanned]:
        """Judge the files of a split; results come in the order of the rows.

        Without `keep_encoded`, what would be written anew is only marked (by empty bytes).

        Raises:
            DataError: a worker process was killed, most often for want of memory.
        """
        new: list[tuple[bytes, decode.Checked]] = []
        try:
            for result in self._results(split, keep_encoded):
                if result.sha256:  # there is none of what could not even be read
                    new.append((result.sha256, _without_bytes(result.verdict)))
                if len(new) >= _KEEP_EVERY:
                    verdicts.add(self._cache, new)
                    new = []
                yield result
        finally:
            verdicts.add(self._cache, new)

    def _results(self, split: FileSplit, keep_encoded: bool) -> Iterator[Scanned]:
        tasks = (
            (rows.start, [split.blobs[row] for row in rows], self._known, keep_encoded)
            for rows in in_batches(len(split.blobs), _FILES_A_TASK)
        )
        if self._pool is None or len(split.blobs) <= _FILES_ALONE:
            for task in tasks:
                yield from _judge(*task)
            return
        waiting: deque[Future[list[Scanned]]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_judge, *task))
                # Bounded, so that images never pile up in memory when the disk is slow.
                if len(waiting) > 3 * self._jobs:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a decoding process was killed, most often for want of memory; "
                "run again with fewer --jobs: what was checked is kept"
            ) from None


@contextmanager
def scanning(jobs: int, cache: Path) -> Iterator[Scanner]:
    """A scanner with `jobs` processes and the verdicts under `cache`."""
    if jobs == 1:
        yield Scanner(None, 1, cache)
        return
    # Processes are started when the first task comes, so that small sets never wait for them.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield Scanner(pool, jobs, cache)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _judge(first: int, blobs: list[Blob], known: Verdicts, keep_encoded: bool) -> list[Scanned]:
    return [_judge_one(first + offset, blob, known, keep_encoded) for offset, blob in enumerate(blobs)]


def _judge_one(row: int, blob: Blob, known: Verdicts, keep_encoded: bool) -> Scanned:
    try:
        size = os.stat(blob.file).st_size if blob.size is None else blob.size  # noqa: PTH116 - as in `_read`
        if size > decode.MAX_BYTES:
            raise decode.UnreadableError(f"more than {decode.MAX_BYTES >> 20} MiB, too large for an image")
        data = _read(blob)
    except OSError as error:
        return _unread(row, -1, f"cannot be read: {error.strerror}")
    except MemoryError:
        return _unread(row, size, "cannot be read: not enough memory")
    except decode.UnreadableError as error:
        return _unread(row, size, str(error))
    sha256 = hashlib.sha256(data).digest()
    verdict = known.get(sha256)
    if verdict is None or (keep_encoded and verdict.encoded is not None):
        verdict = decode.check(data)
    return Scanned(row, len(data), sha256, verdict if keep_encoded else _without_bytes(verdict))


def _without_bytes(verdict: decode.Checked) -> decode.Checked:
    return verdict if verdict.encoded is None else replace(verdict, encoded=b"")


def _unread(row: int, size: int, reason: str) -> Scanned:
    return Scanned(row, size, b"", decode.Checked(reason, 0, 0, "", "", None))


def stored_bytes(split: FileSplit, result: Scanned) -> bytes:
    """What is to be stored of a readable file: written anew by the scan, or the file's own bytes.

    The latter are read again, from the system's cache: cheaper than sending them between processes.

    Raises:
        DataError: the file is no longer what was judged.
    """
    if result.verdict.encoded is not None:
        return result.verdict.encoded
    blob = split.blobs[result.row]
    data = _read(blob)
    if hashlib.sha256(data).digest() != result.sha256:
        raise DataError(f"{blob.file}: changed while it was read; prepare again once nobody writes there")
    return data


def _read(blob: Blob) -> bytes:
    with open(blob.file, "rb", buffering=0) as file:  # noqa: PTH123 - a Path a file costs as much as its read
        file.seek(blob.offset)
        return file.read() if blob.size is None else file.read(blob.size)
