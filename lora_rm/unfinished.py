"""A file or a folder that is written beside its place and gets its name when it is whole.

What interrupts the writing (a kill, a full disk) leaves an unfinished folder; the same call then goes on after the last file
that was finished, and ends with the bytes that it would have had.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_rm.console import say
from lora_rm.errors import LoraRmError, MergeError, StorageError, storing

NOTES = "progress.json"
"""File that says from what the folder is made, and which of its files are finished."""


class UnfinishedFolder:
    """A folder in the making.

    Args:
        path: Where it lies; exists.
        identity: All that its bytes depend on, as JSON holds it. Files of another identity are removed, and so are
            those that were not finished or have changed since.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.finished: dict[str, dict[str, list[int]]] = {}
        """By name of a step: its files, with size and time of change."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
            if notes["identity"] == self.identity:
                self.finished = {
                    name: files for name, files in notes["finished"].items() if files == self._stamps(files)
                }
        kept = {name for files in self.finished.values() for name in files}
        for file in sorted(path.rglob("*"), reverse=True):  # what a folder holds before the folder
            if file.is_dir() and not file.is_symlink():
                with suppress(OSError):  # not empty
                    file.rmdir()
            elif str(file.relative_to(path)) not in kept and file.name != NOTES:
                file.unlink()

    def finish(self, name: str, *files: Path) -> None:
        """Notes that a step is done; its files must be on the disk."""
        self.finished[name] = self._stamps([str(file.relative_to(self.path)) for file in files])
        noted = self.path / f"{NOTES}.new"
        noted.write_text(json.dumps({"identity": self.identity, "finished": self.finished}), encoding="utf-8")
        noted.replace(self.path / NOTES)

    def once(self, name: str, write: Callable[[Path], object]) -> None:
        """Has `write` make a file or folder of that name, and what it puts beside it, if it is not finished."""
        if name in self.finished:
            return
        before = set(self._files())
        with storing(self.path):
            write(self.path / name)
            new = sorted(set(self._files()) - before)
            for file in new:
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            self.finish(name, *new)

    def _files(self) -> Iterator[Path]:
        return (file for file in self.path.rglob("*") if file.is_file() and file.name != NOTES)

    def _stamps(self, names: Any) -> dict[str, list[int]]:
        stats = {name: (self.path / name).stat() for name in names}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def has_lock(descriptor: int) -> bool:
    """Whether this process has the lock of an open folder now; a network disk without locks keeps nobody out."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_atomically(file: Path, text: str) -> None:
    """Writes a text file so that a reader finds the old one or the new one, never a part.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with storing(file):
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
    finally:
        with suppress(OSError):  # a disk that is read-only
            partial.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(out: Path, identity: Any, what: str) -> Iterator[UnfinishedFolder]:
    """The folder that becomes `out`, in the place of an earlier one, when the block ends without an error.

    Args:
        out: Its later name. A symbolic link stays one, and what it points to is replaced.
        identity: See `UnfinishedFolder`.
        what: For messages: merge, export.

    Raises:
        MergeError: If another process makes the same folder.
        StorageError: If it cannot be written.
    """
    out = Path(os.path.realpath(out))  # `resolve` fails at a link to itself before Python 3.13
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.mkdir(exist_ok=True)
    with _only_one(partial, f"{out}: another process is writing this {what}. Wait for it, or end it."):
        folder = UnfinishedFolder(partial, identity)
        if folder.finished:
            say(f"Going on with an interrupted {what}: {len(folder.finished)} of its files are there.")
        try:
            yield folder
        except StorageError:  # with room again, the same command goes on
            raise
        except LoraRmError:  # would happen again; what was interrupted stays
            shutil.rmtree(partial)
            raise
        with storing(out):
            for file in partial.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            partial.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)  # takes its time: until it is done, the notes let the next call go on
            (partial / NOTES).unlink(missing_ok=True)
            partial.rename(out)


@contextmanager
def _only_one(folder: Path, message: str) -> Iterator[None]:
    """Holds a lock on a folder that ends with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not has_lock(handle):
            raise MergeError(message)
        yield
    finally:
        os.close(handle)
