"""Locks: one workflow per folder, one process per run. The kernel releases them when a process ends.

Snakemake's own lock survives a kill; every later run is then refused until somebody unlocks it.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mochi.errors import UserError

logger = logging.getLogger(__name__)

# Everybody who may write to the folder may lock in it, for any umask of the first user.
_MODE = 0o666

_held: list[FileLock] = []


def lock_until_exit(path: Path) -> None:
    """Lock `path` until this process ends.

    Raises:
        UserError: another process holds it; the text names it.
    """
    try:
        _held.append(_acquired(path, wait_seconds=0))
    except Timeout:
        raise UserError(
            f"{path}: held by {_holder(path)}; expected no other workflow in this folder, because "
            "both would write the same results; wait for it, stop it, or run in another clone"
        ) from None


@contextmanager
def locked(folder: Path, wait_seconds: float = 20) -> Iterator[None]:
    """Keep other processes from a run's work folder.

    If only the workflow is killed, its jobs keep running, and a second job would overwrite their
    checkpoints. The lock file is next to the folder, and is removed at the end.

    Args:
        folder: of the run's checkpoints.
        wait_seconds: how long to wait for a process that is about to end.

    Raises:
        UserError: another process holds it; the text names it.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        lock = _acquired(path, wait_seconds)
    except Timeout:
        raise UserError(
            f"{folder}: found {_holder(path)} at work on this run, perhaps of a killed workflow; "
            "expected none; wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        if lock.is_locked:  # not in a forked process, which inherits no lock
            # Before the release: a waiting process notices that the file is gone and tries the new one.
            path.unlink(missing_ok=True)
            lock.release()


def _acquired(path: Path, wait_seconds: float) -> FileLock:
    """A lock on `path`, which records the holder; no lock if the file system does not support it.

    Raises:
        Timeout: another process holds it.
    """
    lock = FileLock(path, wait_seconds, mode=_MODE, poll_interval=0.2, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except FileNotFoundError:  # the process that had it has removed its empty folders
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except (Timeout, PermissionError):
        raise
    except OSError as error:
        logger.warning(
            "%s: this file system cannot lock (%s); start no second process here", path, error.strerror
        )
    else:
        with suppress(OSError):  # a full disk: the lock holds without it
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "an unknown process"
    except OSError:
        return "an unknown process"
