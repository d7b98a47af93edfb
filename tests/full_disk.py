"""Disks without space, as far as a process without special rights can simulate them."""

import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

_Usage = namedtuple("_Usage", "total used free")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses every write beyond this size: "File too large" instead of "No space left"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def required_space(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Folder -> bytes that the module requests with `require_space`; there is always enough."""
    found: dict[Path, int] = {}
    monkeypatch.setattr(module, "require_space", found.update)
    return found


def free(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system says that it has so many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1 << 40, (1 << 40) - size, size))
