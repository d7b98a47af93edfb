"""Errors that a user can fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in an input, or a limit of the machine: never shown with a traceback.

    The text says what was found, what was expected and what to do, one line per mistake.
    """


class DataError(UserError):
    """Images are missing, unusable or of another data set."""


def guess(found: str, allowed: Iterable[str], note: str = "") -> str:
    """The message about a name that does not exist, with a guess at the intended one."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(found, allowed, n=1)
    meant = f"{note}; " if note else f"did you mean {close[0]!r}? " if close else ""
    return f"found {found!r}; {meant}allowed: {', '.join(allowed)}"
