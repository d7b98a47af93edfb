"""Results that other settings or other code have made, told by their own record.

Snakemake remembers settings and code too, but in `.snakemake`, which `git clone` alone does not bring:
there it would take whatever lies in `results` for what the experiment asks for.
"""

import json
import os
from pathlib import Path

from mochi.errors import UserError

_LONG_AGO = (1, 1)  # 0 is no time to Snakemake


def date(path: Path, *, outdated: bool) -> None:
    """Make a file older than all that it is made from, or undo that; nothing where there is none.

    Raises:
        UserError: the file belongs to somebody else.
    """
    if not path.exists() or outdated == (path.stat().st_mtime == _LONG_AGO[1]):
        return
    try:
        os.utime(path, _LONG_AGO if outdated else None)
    except PermissionError as error:
        raise UserError(
            f"{path}: found what other settings or code have made, in a file that is not yours ({error}); "
            "work in a copy of the project, or ask the file's owner"
        ) from None


def date_results(folder: Path, settings_digest: str, code_digest: str) -> bool:
    """Date back the results of a stage if they were made otherwise, or undo that.

    Returns:
        whether with other settings.

    Raises:
        UserError: the files belong to somebody else.
    """
    record = folder / "provenance.json"
    try:
        made = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # not finished: made again in any case
    other_settings = bool(made.get("settings_digest") != settings_digest)
    date(record, outdated=other_settings or made.get("code_digest") != code_digest)
    return other_settings
