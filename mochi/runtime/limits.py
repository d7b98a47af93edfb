"""Host limits that affect loading workers."""

import multiprocessing.util
import os
import resource
import tempfile
from pathlib import Path

from mochi.errors import UserError

_LONGEST_FOLDER = 70  # bytes: a socket's path has 107, of which multiprocessing's names take up to 37


def make_room_for_workers() -> None:
    """Raise the limit of open files, and use a shorter folder for sockets if TMPDIR is too long.

    Workers send each tensor as an open file, and the socket for it has a name in the temporary folder.

    Raises:
        UserError: TMPDIR is too long, and there is no shorter folder.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_FOLDER:
        return
    short = Path("/tmp")  # noqa: S108 - multiprocessing makes a private folder in it
    if not os.access(short, os.W_OK):
        raise UserError(
            f"TMPDIR: found {len(os.fsencode(usual))} characters; at most {_LONGEST_FOLDER} leave room for "
            "the sockets of loading workers; set a shorter one, or use --workers 0"
        )
    tempfile.tempdir = str(short)
    multiprocessing.util.get_temp_dir()  # kept, and inherited by workers
    tempfile.tempdir = usual
