"""Results that other settings, other code or other inputs have made, told by their own record.

Snakemake remembers all that too, but in `.snakemake`: `git clone` alone does not bring it, and it does not
notice when git puts other results in the place of those it remembers.
"""

import json
import os
import shutil
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mochi.errors import UserError
from mochi.running.code import file_digest

_LONG_AGO = (1, 1)  # 0 is no time to Snakemake
_MEMORY = Path(".snakemake/metadata")


def date(path: Path, *, outdated: bool) -> None:
    """Make a file older than all that it is made from and forget how it was made, or undo the former;
    nothing where there is none.

    Raises:
        UserError: neither the file nor its folder may be changed.
    """
    if not path.exists() or outdated == (path.stat().st_mtime == _LONG_AGO[1]):
        return
    try:
        _set_time(path, _LONG_AGO if outdated else None)
        if outdated:
            for made_with in path.parent.iterdir():
                _forget(made_with)
    except OSError as error:
        raise UserError(
            f"{path}: found what other settings or code have made, where nothing may be changed ({error}); "
            "work in a copy of the project, or ask the file's owner"
        ) from None


def _set_time(path: Path, times: tuple[int, int] | None) -> None:
    try:
        os.utime(path, times)
    except PermissionError:
        # Somebody else's file in a shared folder: a copy takes its place.
        copy = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, copy)
        os.utime(copy, times)
        copy.replace(path)


def _forget(path: Path) -> None:
    """As `snakemake --cleanup-metadata`: what it remembers is not of the file that lies here."""
    _memory_of(path).unlink(missing_ok=True)


def _memory_of(path: Path) -> Path:
    """Snakemake's record of a file (snakemake/persistence/file.py)."""
    return _MEMORY / urlsafe_b64encode(str(path).encode()).decode()


def seen_by_snakemake(path: Path, *params: str) -> bool:
    """Does it remember that a file was made with other params than these? Then it makes it again itself."""
    try:
        record = _memory_of(path).read_text(encoding="utf-8")
    except OSError:
        return False
    return not all(value in record for value in params)


def date_results(folder: Path, settings_digest: str, code_digest: str) -> bool:
    """Date back the results of a stage if they were made otherwise, or undo that. Raises as `date`.

    Returns:
        whether there are results, and made so.
    """
    made = _read(record := folder / "provenance.json")
    if made is None:
        return False
    other_settings = made.get("settings_digest") != settings_digest
    other_code = made.get("code_digest") != code_digest
    seen = (other_settings and seen_by_snakemake(folder / "run.yaml", settings_digest)) or (
        other_code and seen_by_snakemake(record, code_digest)
    )
    if not seen:
        date(record, outdated=other_settings or other_code)
    return not (other_settings or other_code)


def made_from(title: str, code_digest: str, files: Iterable[Path]) -> dict[str, Any]:
    """What tables and figures are made from, as JSON, to lie beside them."""
    return {
        "title": title,
        "code_digest": code_digest,
        "files": {str(path): file_digest(path) for path in sorted(set(files))},
    }


def date_summary(record: Path, title: str, code_digest: str, files: Iterable[Path]) -> None:
    """Date back tables or figures whose `made_from` is no longer so, or undo that. Raises as `date`."""
    made = _read(record)
    if made is None or seen_by_snakemake(record, code_digest):
        return
    try:
        current: Mapping[str, Any] | None = made_from(title, code_digest, files)
    except FileNotFoundError:
        current = None  # a result is missing: made again, and the summary after it
    date(record, outdated=made != current)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
