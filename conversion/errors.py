"""The error that a user can act on."""


class ConversionError(ValueError):
    """One sentence: what was given, what is allowed, what to do. The command prints it without a traceback."""
