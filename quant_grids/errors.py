"""The root of every error that a user can cause or meet.

A message is one clear sentence (or two): what was given, what the limit is, the way out. The command line prints it and
exits with 2; a traceback is for bugs.
"""


class QGuardError(Exception):
    """Root of the project's errors; `str(error)` is written for the user."""


class FormatError(QGuardError):
    """Bytes that cannot be what they claim to be: a truncated file, a size that overflows, an unknown type."""


class UnsupportedError(QGuardError):
    """A valid input that this version cannot handle; the message names the way out."""
