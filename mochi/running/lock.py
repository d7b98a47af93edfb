"""One workflow at a time in a folder, by a lock that the kernel drops with the process.

Snakemake's own lock outlives a kill, after which every run is refused until somebody unlocks by hand.
"""

import fcntl
import logging
import os
import socket
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
