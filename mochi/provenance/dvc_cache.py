"""Earlier versions of results in DVC's cache, found by their provenance.json.

DVC itself restores only outputs without `persist`, and those it deletes before it runs a command.
"""

import logging
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mochi.errors import DataError
from mochi.provenance.wanted import RECORD, Result
from mochi.storage.atomic import publishing
from mochi.text import read_json

logger = logging.getLogger(__name__)

_PREPARED = ("prepare", "scenes")
"""Not restored: their folders contain more than the files in provenance.json. Preparing them again
gives the same bytes."""

Version = dict[str, Path]
"""The files of one folder: name -> object in the cache."""
Versions = Mapping[str, list[Version]]
"""Folder with a provenance.json, relative to the folder that DVC tracks -> its versions."""


def versions(cache: Path | None = None) -> Versions:
    """All versions in a cache; default: the output of `dvc cache dir`, without which there are none.

    Source: dvc.org/doc/user-guide/project-structure/internal-files, structure of the cache directory.
    """
    found: dict[str, list[Version]] = defaultdict(list)
    cache = cache or _cache_here()
    if cache is None:
        return found
    for listing in cache.glob("files/md5/??/*.dir"):
        by_folder: dict[Path, Version] = defaultdict(dict)
        try:
            entries = read_json(listing, "DVC's list of a folder")
            files = [(Path(entry["relpath"]), str(entry["md5"])) for entry in entries]
        except (DataError, LookupError, TypeError) as error:  # of a killed DVC
            logger.warning("%s: skipped: %s", listing, error)
            continue
        for path, md5 in files:
            by_folder[path.parent][path.name] = cache / "files/md5" / md5[:2] / md5[2:]
        for path, version in by_folder.items():
            if RECORD in version:
                found[path.as_posix()].append(version)
    return found


def _cache_here() -> Path | None:
    try:
        done = subprocess.run(["dvc", "cache", "dir"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(done.stdout.strip())


def restore(result: Result, cached: Versions) -> bool:
    """Replace a stale result with a current version; False if there is none."""
    if result.stage in _PREPARED:
        return False
    parts = result.folder.parts
    # DVC's lists have paths relative to the tracked folder.
    for start in range(1, len(parts)):
        for version in cached.get("/".join(parts[start:]), []):
            if _is_current(result, version):
                with publishing(result.folder) as new:
                    for name, path in version.items():
                        shutil.copyfile(path, new / name)
                return True
    return False


def _is_current(result: Result, version: Version) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        for name, path in version.items():
            Path(folder, name).symlink_to(path)
        return replace(result, folder=Path(folder)).why_stale() is None
