"""End a run within a minute, with the reason, if a rank or a loading worker dies, hangs or never starts.

Ranks send heartbeats through the rendezvous store; loading workers through a number in shared memory.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch.utils.data import DataLoader

from mochi.errors import UserError

START_SECONDS = 45.0
"""Time for all ranks to start."""
RANK_SECONDS = 25.0
"""Without a heartbeat for this long, a rank counts as dead."""
WORKER_SECONDS = 45.0
"""The same for loading workers, if none has an image ready."""
LOOK_SECONDS = 5
"""`timeout` of a loader that is `watched`, which then asks the loader again."""
_TICK_SECONDS = 1.0
_BEAT_SECONDS = 5.0
_GONE = b"gone"

Batch_co = TypeVar("Batch_co", covariant=True)


def reason(error: RuntimeError) -> str | None:
    """Explain an error of torch about a process that died; None for any other error."""
    text = str(error).splitlines()[0] if str(error) else ""
    if "DataLoader worker" in text:
        return (
            f"a loading worker ended: {text}; see its own message, if any; or give the run more memory "
            "(Killed), more /dev/shm (Bus error), or fewer --workers; the same command continues"
        )
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return f"another process of this run ended; see its own message: {text}"
    return None


# ---------------------------------------------------------------- ranks


def meet() -> tuple[dist.Store, int, int]:
    """Wait for all ranks of the environment; return the rendezvous store, this rank and their number.

    Raises:
        UserError: some did not start.
    """
    limit = timedelta(seconds=START_SECONDS)
    own, number = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {own} of {number}: the other processes cannot be reached in "
            f"{START_SECONDS:.0f} s: {str(error).splitlines()[0]}"
        ) from None
    store.set(f"process/{rank}", str(os.getpid()))
    store.set(f"beat/{rank}", "0")
    try:
        store.wait([f"beat/{other}" for other in range(world_size)], limit)
    except RuntimeError:
        missing = [str(other) for other in range(world_size) if not store.check([f"beat/{other}"])]
        raise UserError(
            f"rank {rank} of {world_size}: rank {', '.join(missing)} did not start within "
            f"{START_SECONDS:.0f} s; look for its message, and whether its host has memory and GPUs left"
        ) from None
    return store, rank, world_size


@contextmanager
def watching(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """End this process if another rank falls silent before it has left this context.

    The main thread may be waiting for that rank in a collective operation, so another thread watches.
    """
    # A separate connection: on the other one a wait would block it.
    own, done = store.clone(), threading.Event()
    watch = threading.Thread(target=_watch, args=(own, rank, world_size, done), daemon=True)
    watch.start()
    try:
        yield
    except BaseException:
        done.set()  # and stop sending heartbeats
        raise
    done.set()
    watch.join()
    with suppress(RuntimeError):
        own.set(f"beat/{rank}", _GONE.decode())


def _watch(store: dist.Store, rank: int, world_size: int, done: threading.Event) -> None:
    others = [other for other in range(world_size) if other != rank]
    beats, heard = dict.fromkeys(others, b""), dict.fromkeys(others, time.monotonic())
    last, count = time.monotonic(), 0
    while not done.wait(_BEAT_SECONDS):
        count += 1
        try:
            store.set(f"beat/{rank}", str(count))
            latest = store.multi_get([f"beat/{other}" for other in others])
        except RuntimeError as error:
            _end(
                rank,
                world_size,
                f"the process that started this one is gone ({str(error).splitlines()[0]})",
            )
        now = time.monotonic()
        slept, last = now - last > 2 * _BEAT_SECONDS, now  # suspended, and the others perhaps as well
        for other, beat in zip(others, latest, strict=True):
            if slept or beat == _GONE or beat != beats[other]:
                beats[other], heard[other] = beat, now
            elif now - heard[other] > RANK_SECONDS:
                _kill_sibling(int(store.get(f"process/{other}")))
                _end(rank, world_size, f"rank {other} sent no heartbeat for {RANK_SECONDS:.0f} s")


def _kill_sibling(process: int) -> None:
    """Kill a rank that torchrun started on this host: torchrun would wait 30 s for a suspended one."""
    parent = os.getppid()
    with suppress(OSError):  # no Linux, or it has ended
        if str(process) in Path(f"/proc/{parent}/task/{parent}/children").read_text("ascii").split():
            os.kill(process, signal.SIGKILL)


def _end(rank: int, world_size: int, why: str) -> NoReturn:
    sys.stderr.write(f"error: rank {rank} of {world_size}: {why}; the same command continues\n")
    sys.stderr.flush()
    os._exit(1)


# ---------------------------------------------------------------- loading workers


class Pulse:
    """When the workers of a loader were last active; shared by all processes."""

    def __init__(self) -> None:
        # CLOCK_MONOTONIC is the same in all processes of a host.
        self._last = multiprocessing.RawValue("d", time.monotonic())

    @property
    def last(self) -> float:
        """When a worker was last active, in seconds of the monotonic clock."""
        return float(self._last.value)

    def beat(self) -> None:
        """Record activity."""
        self._last.value = time.monotonic()


def watched(loader: DataLoader[Batch_co], pulse: Pulse) -> Iterator[Batch_co]:
    """The batches of a loader with a `timeout`, whose workers record their activity in `pulse`.

    Workers may take any time for a batch as long as they work on it.

    Raises:
        UserError: none was active for `WORKER_SECONDS`.
        RuntimeError: one ended, see `reason`.
    """
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    watch = _WorkerWatch(workers, pulse)
    if workers:
        watch.start()
    try:
        while True:
            yield watch.next(batches)
    except StopIteration:
        return
    except (RuntimeError, OSError, EOFError):
        if not watch.hang:
            raise
        _reap(workers)
        raise UserError(
            f"{len(workers)} loading workers did nothing for {WORKER_SECONDS:.0f} s; "
            "look for their messages and at the disk that holds the images, or use "
            "--workers 0; the same command continues"
        ) from None
    finally:
        watch.stop()


class _WorkerWatch(threading.Thread):
    """Kills the workers of a loader if none is active while a batch is waited for.

    The main thread cannot: it may be connected to a worker that does not answer, without a time limit.
    """

    def __init__(self, workers: Sequence[BaseProcess], pulse: Pulse) -> None:
        super().__init__(daemon=True)
        self._workers, self._pulse, self._done = workers, pulse, threading.Event()
        self._asked: float | None = None
        """When the main thread asked for the batch that it waits for."""
        self.hang = False

    def run(self) -> None:
        """Check once a second; time during which this process was suspended does not count."""
        silent, before = 0.0, (self._asked, self._pulse.last)
        while not self._done.wait(_TICK_SECONDS):
            now = self._asked, self._pulse.last
            silent = silent + _TICK_SECONDS if now == before and self._asked is not None else 0.0
            before = now
            if silent >= WORKER_SECONDS:
                self.hang = True
                for process in self._workers:
                    process.kill()  # otherwise Python waits for them at exit
                return

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        if self.is_alive():
            self.join()

    def next(self, batches: Iterator[Batch_co]) -> Batch_co:
        """The next batch, watched."""
        self._asked = time.monotonic()
        try:
            while True:
                try:
                    return next(batches)
                except RuntimeError as error:
                    if self.hang or "timed out" not in str(error):
                        raise
        except (OSError, EOFError) as error:
            # A batch is received from the process that made it, which may be gone.
            if self.hang or (ended := _ended(self._workers)) is None:
                raise
            raise RuntimeError(f"DataLoader worker (pid {ended.pid}) ended: {error!r}") from None
        finally:
            self._asked = None


def _ended(workers: Sequence[BaseProcess]) -> BaseProcess | None:
    """A worker that has ended, or does so in a moment."""
    ready = connection.wait([process.sentinel for process in workers], timeout=1)
    ended = [process for process in workers if process.sentinel in ready]
    _reap(ended)
    return ended[0] if ended else None


def _reap(ended: Sequence[BaseProcess]) -> None:
    """Wait for them here, so that torch reports them here and not later, anywhere in the main thread."""
    for process in ended:
        with suppress(RuntimeError):
            process.join(1)


def end_worker_that_cannot_send(worker: int) -> None:
    """On a worker: end it if a batch cannot be sent; Python would print an error and drop the batch."""

    def end(error: Exception, _: object) -> NoReturn:
        sys.stderr.write(f"error: loading worker {worker} cannot send images: {error!r}\n")
        sys.stderr.flush()
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
