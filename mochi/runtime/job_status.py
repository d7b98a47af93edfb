"""The status of a job in a small file next to its checkpoints, for `mochi status`.

A job resumes without it. A job that succeeds removes it.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

_EVERY_SECONDS = 2.0
_NAME = "status.json"


@dataclass(frozen=True)
class JobStatus:
    """The content of the file."""

    state: Literal["running", "interrupted", "failed"]
    host: str
    process: int
    updated: float
    """Seconds since 1970."""
    done: int = 0
    total: int = 0
    """Number of steps, epochs or images that the job is processing."""
    seconds_left: float | None = None
    rate: float | None = None
    """Units of progress per second."""
    note: str = ""
    """A note, such as the loss."""
    health: str = ""
    """State of contrastive training after the last complete epoch (`monitoring.training_status`)."""
    accuracy: float | None = None
    """Accuracy of the proxy task, 0 to 1, in the last complete epoch."""
    error: str = ""
    """First line of the error of a failed job."""

    def alive(self) -> bool:
        """Whether it is running: its process exists, or another host reported in the last minute."""
        if self.state != "running":
            return False
        if self.host != socket.gethostname():
            return time.time() - self.updated < 60
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class _Reporter:
    """Writes the file of this process's job."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, Any] = {}
        self._last = -_EVERY_SECONDS

    def update(self, *, now: bool, **facts: Any) -> None:
        self._facts |= facts
        if now or time.monotonic() - self._last >= _EVERY_SECONDS:
            self._last = time.monotonic()
            itself = {"host": socket.gethostname(), "process": os.getpid(), "updated": time.time()}
            status = JobStatus(**{"state": "running", **itself, **self._facts})
            # Not flushed to disk: the file is only for display, and may be lost if the machine crashes.
            temporary = self._path.with_name(f".{_NAME}.{os.getpid()}")
            try:
                temporary.write_text(json.dumps(asdict(status)), encoding="utf-8")
                temporary.replace(self._path)
            except OSError:  # a full disk: writers of files that matter report it
                with suppress(OSError):
                    temporary.unlink()


_reporter: _Reporter | None = None


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Keep the status of this process's job in `folder` while it runs, and after it has failed."""
    global _reporter  # noqa: PLW0603 (progress is reported from everywhere, as in logging)
    path = folder / _NAME
    _reporter = _Reporter(path)
    try:
        _reporter.update(now=True)
        yield
    except KeyboardInterrupt:
        _reporter.update(now=True, state="interrupted")
        raise
    except BaseException as error:
        lines = str(error).splitlines() or [type(error).__name__]
        _reporter.update(now=True, state="failed", error=lines[0])
        raise
    else:
        path.unlink(missing_ok=True)
    finally:
        _reporter = None


def report(*, now: bool = False, **facts: Any) -> None:
    """Update fields of `JobStatus`, written every few seconds or `now`; do nothing outside a job."""
    if _reporter is not None:
        _reporter.update(now=now, **facts)


def read(folder: Path) -> JobStatus | None:
    """The status of a running or unsuccessful job; None if there is none or the file is unreadable."""
    try:
        content = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        known = {field.name for field in fields(JobStatus)}
        return JobStatus(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
