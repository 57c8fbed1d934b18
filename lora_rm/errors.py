"""Errors that a user can act on.

Each message says what is wrong with the value found, what is allowed, and what to do. Every class is
also a `ValueError`, so code that knows nothing of this package can still catch it. Mistakes of the
programmer are `assert`s instead.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What stands before the last @ of an address, and what comes after its ?: signatures and tokens.
_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"]*(?=@)")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]+")
_SECRET_NAME = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")


def redacted(text: str) -> str:
    """A text without credentials in addresses and without the values of secret environment variables.

    Secret are variables whose names end like HF_TOKEN, WANDB_API_KEY or DB_PASSWORD, from 8 characters on.
    """
    text = _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***", text)) if "://" in text else text
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return text


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another library's error, never empty: an error without words gives its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


class LoraRmError(Exception):
    """Anything that the user can mend; the command line prints it without a traceback.

    The message never shows a secret (see `redacted`), and of a huge one, which quotes a huge name, the middle goes.
    """

    def __str__(self) -> str:
        text = redacted(super().__str__())
        return text if len(text) <= 4000 else f"{text[:2500]} ... {text[-1000:]}"


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
        StorageError: Instead of the error of a full, read-only or broken disk, which safetensors tells in its own class.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}). Free space on its disk or give a folder that can be "
            "written. Nothing that was saved before is lost; a training goes on with --resume."
        ) from None


class Interrupted(LoraRmError):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved a checkpoint."""
