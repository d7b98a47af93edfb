"""Which GPUs of this host a process uses: handed out by locks that the kernel drops with the process.

Snakemake counts GPUs (`resources: gpu`) and names none, so that two jobs would both land on the first.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mochi.errors import UserError

_POLL_SECONDS = 0.2


def visible() -> list[str]:
    """The GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all that the driver lists.

    UUIDs where the driver is asked: its numbers follow the PCI bus, CUDA's the speed of the cards.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip()]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],  # noqa: S607
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []  # no driver, hence no GPU
    return done.stdout.split()


def claim(count: int, names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Wait for `count` free GPUs of `names` and lock them for this process and what it becomes by exec.

    Whoever waits longest is served first, also when it waits for several. The locks end with the
    process, however it ends.

    Args:
        count: how many.
        names: candidates, as CUDA_VISIBLE_DEVICES spells them.
        folder: where the locks lie, one for the whole host; by default in the temporary folder, shared
            by all users.

    Raises:
        UserError: more GPUs asked for than there are.
    """
    if count > len(names):
        raise UserError(
            f"GPUs: found {len(names)} on this host ({', '.join(names) or 'none'}); {count} are asked "
            f"for; lower the number, or widen CUDA_VISIBLE_DEVICES"
        )
    if folder is None:
        folder = Path(tempfile.gettempdir()) / "mochi-gpus"
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    # Only the holder of the gate takes GPUs, hence it may keep those it has while it waits for more.
    gate = _open(folder / "gate.lock")
    fcntl.flock(gate, fcntl.LOCK_EX)
    files = {name: _open(folder / f"{name.replace('/', '_')}.lock") for name in names}
    taken: list[str] = []
    while True:
        taken += [name for name in names if name not in taken and _lock(files[name])][: count - len(taken)]
        if len(taken) == count:
            break
        time.sleep(_POLL_SECONDS)
    for name, file in files.items():
        if name in taken:
            os.set_inheritable(file, True)
        else:
            os.close(file)
    os.close(gate)
    return taken


def _open(path: Path) -> int:
    """Open for locking, which needs no right to write: the file may be another user's."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return os.open(path, os.O_RDONLY)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
