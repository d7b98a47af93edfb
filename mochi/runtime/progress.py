"""Log lines and progress on stderr, from the first rank only, without control characters."""

import atexit
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tqdm import tqdm

from mochi.runtime.job_status import report


def configure_logging() -> None:
    """Log plain messages on stderr: everything from info up; from ranks other than 0 warnings only."""
    _open_standard_streams()
    level = logging.INFO if _is_first_rank() else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    logging.basicConfig(level=level, handlers=[handler])
    atexit.register(_abandon_log)


class _Printable(logging.Formatter):
    """The message alone, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def printable(line: str) -> str:
    """A line with unprintable characters as Python's escapes: names of files may contain codes that a
    terminal executes.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _open_standard_streams() -> None:
    """Open /dev/null where the caller has closed stdin, stdout or stderr, as cron jobs do.

    Otherwise the next opened files get their descriptors, and output of libraries would go there.
    Characters that the terminal's encoding lacks are escaped, on stdout as on stderr.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a class may have a name that Latin-1 lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def _abandon_log() -> None:
    """Drop what a full disk keeps from being written, so that it changes no exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123 (as in `_open_standard_streams`)
            os.dup2(nothing.fileno(), sys.stderr.fileno())


class Progress:
    """A bar on a terminal, a plain line every few seconds in a log, nothing on ranks other than 0.

    The lines are not tqdm's, which uses carriage returns even in a file.
    """

    def __init__(self, label: str, total: int, done: int = 0, every_seconds: float = 10.0) -> None:
        self._label, self._total, self._first, self._every = label, total, done, every_seconds
        self._shown = _is_first_rank()
        self._bar = (
            tqdm(desc=label, total=total, initial=done, dynamic_ncols=True)
            if self._shown and sys.stderr.isatty()
            else None
        )
        self._done = done
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def advance(self, note: str = "") -> None:
        """Count one unit of work; `note` is shown next to it."""
        self._done += 1
        if self._shown:
            rate, left = self._pace()
            report(done=self._done, total=self._total, rate=rate, seconds_left=left, note=note)
        if self._bar:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._shown:
            self._write_if_due(note)

    def _write_if_due(self, note: str) -> None:
        now = time.monotonic()
        if now - self._last >= self._every or self._done == self._total:
            self._last = now
            _, left = self._pace()
            line = f"{self._label}: {self._done}/{self._total}, {clock(left)} left"
            with suppress(OSError):  # a log on a full disk
                sys.stderr.write(f"{line}, {note}\n" if note else f"{line}\n")
                sys.stderr.flush()

    def _pace(self) -> tuple[float, float]:
        """Units per second, and seconds left."""
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        return rate, (self._total - self._done) / max(rate, 1e-9)


def counter(label: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows progress, for code that keeps its own count."""
    shown: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(label, total, done - 1))
        shown[0].advance()

    return report


def _is_first_rank() -> bool:
    """Rank 0, or a process without ranks. torchrun sets RANK before torch knows it."""
    return os.environ.get("RANK", "0") == "0"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
