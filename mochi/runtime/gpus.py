"""Assign GPUs of this host to processes by locks, which the kernel releases when a process ends.

Snakemake limits how many jobs use a GPU but assigns none, so two jobs would both use the first.
"""

import fcntl
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mochi.errors import UserError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_NOTICE_SECONDS = 5.0
_ANSWER_SECONDS = 30  # without persistence mode the driver must be loaded first
_IN_USE = 0.1  # of the memory; a display, or what the driver reserves, is less
_DEVICES = Path("/dev")


def visible() -> list[str]:
    """The GPUs that this process may use: CUDA_VISIBLE_DEVICES, or all that the driver lists.

    UUIDs if nvidia-smi is installed, so that each GPU has one name; numbers are then nvidia-smi's. As
    in CUDA, names after the first that is not a GPU are ignored: "-1" hides all.
    """
    listed = _listed()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [uuid for uuids in listed for uuid in uuids]
    names: list[str] = []
    for spelled in allowed.split(","):
        name = _name(spelled.strip(), listed)
        if name is None:
            break
        names.append(name)
    return list(dict.fromkeys(names))


def _listed() -> list[list[str]]:
    """For each GPU its UUID, or the UUIDs of its MIG instances; empty without a driver.

    If nvidia-smi does not respond, the numbers of the GPUs' device files.
    """
    output, trouble = _ask_nvidia_smi("-L")
    if trouble:
        count = len(list(_DEVICES.glob("nvidia[0-9]*")))
        _warn_once(f"{trouble}; assuming {count} GPUs, as in /dev")
        return [[str(number)] for number in range(count)]
    gpus: list[list[str]] = []
    for line in output.splitlines():
        found = re.search(r"\(UUID: ([^)]+)\)", line)
        if found and line.startswith("GPU"):
            gpus.append([found[1]])
        elif found and gpus:
            # The instances replace the card, which CUDA then cannot use as a whole.
            gpus[-1] = [uuid for uuid in gpus[-1] if uuid.startswith("MIG-")] + [found[1]]
    return gpus


def _ask_nvidia_smi(*options: str) -> tuple[str, str]:
    """The output of nvidia-smi, and its error; both empty if there are no GPUs."""
    try:
        done = subprocess.run(  # noqa: S603
            ["nvidia-smi", *options],  # noqa: S607
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi gave no answer in {_ANSWER_SECONDS} s"
    except OSError as error:
        has_gpus = any(_DEVICES.glob("nvidia[0-9]*"))
        return "", f"nvidia-smi cannot be started ({error.strerror})" if has_gpus else ""
    if done.returncode:
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["no message"]
        return "", f"nvidia-smi failed: {lines[0]}"
    return done.stdout, ""


def _memory_in_use() -> dict[str, str]:
    """UUID -> used and total memory, of the GPUs that some process uses. MIG instances are unknown."""
    output, _ = _ask_nvidia_smi(
        "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits"
    )
    found = {}
    for line in output.splitlines():
        # A number is missing if the user may not know it.
        if matched := re.fullmatch(r"\s*(\S+), *(\d+), *(\d+)\s*", line):
            uuid, used, total = matched.groups()
            if int(used) > _IN_USE * int(total):
                found[uuid] = f"{used} of {total} MiB"
    return found


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _name(spelled: str, listed: Sequence[Sequence[str]]) -> str | None:
    """One entry of CUDA_VISIBLE_DEVICES as a UUID, or unchanged if none are known; None: not a GPU."""
    if not re.fullmatch(r"\d+|(GPU|MIG)-.+", spelled):
        return None
    if not listed:
        return spelled
    if spelled.isdigit():
        number = int(spelled)
        return listed[number][0] if number < len(listed) else None
    # CUDA accepts the beginning of a UUID if it is unique.
    matches = [uuid for uuids in listed for uuid in uuids if uuid.startswith(spelled)]
    return matches[0] if len(matches) == 1 else None


def reason(error: RuntimeError) -> str | None:
    """Explain an error of torch about memory or an unusable GPU; None for any other error."""
    text = str(error).partition(" Of the allocated memory")[0].strip()
    text = text.splitlines()[0] if text else ""
    if re.search(r"CUDA out of memory|CUDA error: out of memory|ALLOC_FAILED|can't allocate memory", text):
        return (
            f"{text.rstrip('.')}; expected room for the weights and one batch: end other programs that use "
            "this memory (`nvidia-smi`), use a GPU with more, divide the batch over several (--gpus), or "
            "lower the batch size in the experiment file; the same command continues"
        )
    if "no kernel image is available" in text:
        return f"{text}: this torch has no kernels for this card; `mochi check` names the cards it supports"
    if "busy or unavailable" in text:
        return (
            f"{text}: another process uses this GPU exclusively (`nvidia-smi`); wait for it, or use another"
        )
    return None


def claim(count: int, names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Wait for `count` free GPUs of `names` and lock them for this process, also after exec.

    Claims are served in order of waiting time, including those for several GPUs. The locks end with the
    process. A waiting claim is logged. GPUs that processes without a lock use, of other users or programs,
    are taken last, with a warning.

    Args:
        count: number of GPUs.
        names: candidates, as `visible` gives them.
        folder: of the locks, one for the whole host; by default in the temporary folder, shared by all
            users.

    Raises:
        UserError: more GPUs are requested than there are.
    """
    if count > len(names):
        raise UserError(
            f"GPUs: found {len(names)} on this host ({', '.join(names) or 'none'}); {count} are "
            f"requested; lower the number, or widen CUDA_VISIBLE_DEVICES"
        )
    if folder is None:
        folder = Path(tempfile.gettempdir()) / "mochi-gpus"
    with _umask(0):
        folder.mkdir(mode=0o1777, parents=True, exist_ok=True)
    with _noticed(f"waiting for {count} of the GPUs {', '.join(names)}: other runs use them ({folder})"):
        # One process at a time collects GPUs, so it may keep some while it waits for more: no deadlock.
        gate = _open(folder / "gate.lock")
        fcntl.flock(gate, fcntl.LOCK_EX)
        in_use = _memory_in_use() if any(name.startswith("GPU-") for name in names) else {}
        names = sorted(names, key=lambda name: name in in_use)
        files = {name: _open(folder / f"{name.replace('/', '_')}.lock") for name in names}
        taken: list[str] = []
        while True:
            free = [name for name in names if name not in taken and _lock(files[name])]
            taken += free[: count - len(taken)]
            if len(taken) == count:
                break
            in_use = {}  # by runs that held the locks until now
            time.sleep(_POLL_SECONDS)
    for name in taken:
        if name in in_use:
            logger.warning(
                "%s: other processes use %s of its memory; this run may be slow or find too little; to "
                "avoid it, list other GPUs in CUDA_VISIBLE_DEVICES",
                name, in_use[name],
            )  # fmt: skip
    for name, file in files.items():
        if name in taken:
            os.set_inheritable(file, True)
        else:
            os.close(file)
    os.close(gate)
    return taken


@contextmanager
def _noticed(text: str) -> Iterator[None]:
    """Log `text` once if the block takes longer than a few seconds. It may block in the kernel."""
    notice = threading.Timer(_NOTICE_SECONDS, logger.info, [text])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def _open(path: Path) -> int:
    """Open for locking, which needs no write permission: the file may be another user's."""
    try:
        with _umask(0o022):
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return os.open(path, os.O_RDONLY)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Files of the block are made under this umask, so that other users can open them from the start."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _lock(file: int) -> bool:
    """Lock without waiting. flock, not a library: the lock must survive exec with its descriptor."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
