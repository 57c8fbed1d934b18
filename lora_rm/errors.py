"""Errors that a user can act on.

Each message says what is wrong with the value found, what is allowed, and what to do. Every class is
also a `ValueError`, so code that knows nothing of this package can still catch it. Mistakes of the
programmer are `assert`s instead.
"""


class LoraRmError(Exception):
    """Anything that the user can mend; the command line prints it without a traceback."""


class ConfigError(LoraRmError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(LoraRmError, ValueError):
    """A preference file, a row in it, or the tokens made from it cannot be used."""


class ModelError(LoraRmError, ValueError):
    """A base model, an adapter or a score head is missing, broken or of the wrong shape."""


class MergeError(LoraRmError, ValueError):
    """A merge or an export cannot be made, or what was written does not give the same rewards."""


class Interrupted(LoraRmError):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved a checkpoint."""
