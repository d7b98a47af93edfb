"""What a user can mend."""


class UserError(ValueError):
    """A mistake in an input, or a limit of the machine: never shown with a traceback.

    The text says what was found, what was expected and what to do, one line for each mistake.
    """
