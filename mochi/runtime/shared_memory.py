"""Limit the processes that load images to the size of shared memory."""

import logging
import os
import shutil
import sys
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SHARED = Path("/dev/shm")  # noqa: S108 - only its free space is read
_AHEAD = 4


def fitting_workers(workers: int, batch_bytes: int) -> tuple[int, int | None]:
    """(workers, batches that each prepares ahead): as many as fit in shared memory next to two in use.

    A container has 64 MiB of it by default, and a worker that needs more is killed.
    """
    if workers == 0:
        return 0, None
    room = max(_free() // batch_bytes - 2, 0)
    fitting = min(workers, room)
    ahead = min(_AHEAD, room // fitting) if fitting else None
    if (fitting, ahead) != (workers, _AHEAD):
        _warn_once(
            f"{_SHARED} has room for {fitting} of {workers} loading workers, each {ahead or 0} of {_AHEAD} "
            "batches ahead; give it more (--ipc=host or --shm-size=8g for a container)"
        )
    return fitting, ahead


def _free() -> int:
    """Bytes for this process; the ranks of a host share them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return shutil.disk_usage(_SHARED).free // ranks if _SHARED.exists() else sys.maxsize


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
