"""One workflow at a time in a folder, one process at a run: locks that the kernel drops with the process.

Snakemake's own lock outlives a kill, after which every run is refused until somebody unlocks by hand.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mochi.errors import UserError

logger = logging.getLogger(__name__)


def hold(path: Path) -> None:
    """Lock `path` until this process ends, however it ends.

    Raises:
        UserError: another process holds it; the text names it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 200).decode(errors="replace").strip() or "an unknown process"
        os.close(file)
        raise UserError(
            f"{path}: held by {holder}; one workflow at a time may run in a folder, for two would write "
            "the same results; wait for it, stop it, or run in another clone"
        ) from None
    except OSError as error:
        logger.warning(
            "%s: this file system cannot lock (%s); start no second workflow here", path, error.strerror
        )
        return
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


@contextmanager
def holding(folder: Path, wait_seconds: float = 20) -> Iterator[None]:
    """Keep other processes from a run's work folder, until this one ends if need be.

    A workflow that was killed alone leaves its jobs running, and two would take each other's checkpoints.
    The folder itself is locked, so that nothing is left in it. The wait is for loading workers, which
    outlive a killed training by some seconds.

    Raises:
        UserError: another process holds it, and does not end within `wait_seconds`.
    """
    opened = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + wait_seconds
    while not _taken(opened):
        if time.monotonic() > deadline:
            os.close(opened)
            raise UserError(
                f"{folder}: found another process at work on this run, perhaps of a killed workflow; "
                "expected none; wait for it or stop it"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        os.close(opened)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("this file system cannot lock (%s)", error.strerror)
    return True
