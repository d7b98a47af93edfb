"""Errors that a user can fix."""


class UserError(ValueError):
    """A mistake in an input, or a limit of the machine: never shown with a traceback.

    The text says what was found, what was expected and what to do, one line for each mistake.
    """


class DataError(UserError):
    """Images that are missing, unusable or of another data set."""
