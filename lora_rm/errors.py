"""Errors that a user can act on.

Each message says what is wrong with the value found, what is allowed, and what to do. Every class is
also a `ValueError`, so code that knows nothing of this package can still catch it. Mistakes of the
programmer are `assert`s instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


class StorageError(LoraRmError, OSError):
    """A disk is full or a folder cannot be written; what was there before is whole."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Says in plain words that a file or folder cannot be written.

    Raises:
        StorageError: Instead of the `OSError` of a full, read-only or broken disk.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}). Free space on its disk or give a folder that can be "
            "written. Nothing that was saved before is lost; a training goes on with --resume."
        ) from None


class Interrupted(LoraRmError):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved a checkpoint."""
