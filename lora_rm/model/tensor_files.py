"""Safetensors files read and written piece by piece, without mapping them into memory.

The format: eight bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, the
tensors' bytes. All offsets are known before the first byte of data, so every piece is written straight to
its place. Reading uses plain reads into one buffer: mapped pages would count as memory of the process.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lora_rm.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
"""Bytes are codes of weights stored in 4 bit."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self.values(0, math.prod(self.shape)).reshape(self.shape)

    def values(self, start: int, stop: int) -> torch.Tensor:
        """The values from `start` to `stop`, flat.

        Raises:
            ModelError: If the file ends before they do.
        """
        with self.open() as read:
            return read(start, stop)

    @contextmanager
    def open(self) -> Iterator[Callable[[int, int], torch.Tensor]]:
        """`values` for many pieces and several threads."""
        size, handles = self.dtype.itemsize, Handles(self.file, "rb")

        def read(start: int, stop: int) -> torch.Tensor:
            buffer: Any = np.empty((stop - start) * size, np.uint8)
            stream, filled = handles.at(self.start + start * size), 0
            while filled < len(buffer):
                count = stream.readinto(buffer[filled:])
                if not count:
                    raise ModelError(f"{self.file}: ends in the middle of {self.name}. Fetch the file again.")
                filled += count
            return torch.from_numpy(buffer).view(self.dtype)

        try:
            yield read
        finally:
            handles.close()

    def announce(self) -> None:
        """Tells the system that the tensor will be read soon, so that it comes from the disk meanwhile."""
        if hasattr(os, "posix_fadvise"):  # Linux
            with self.file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), self.start, self.num_bytes, os.POSIX_FADV_WILLNEED)


class Handles:
    """A file that every thread reads or writes at places of its own; opening it for each piece takes 20 us."""

    def __init__(self, file: Path, mode: Literal["rb", "r+b"]) -> None:
        self.file, self.mode = file, mode
        self.own = threading.local()
        self.all: list[FileIO] = []

    def at(self, offset: int) -> FileIO:
        """This thread's handle, moved to a byte."""
        stream: FileIO | None = getattr(self.own, "stream", None)
        if stream is None:
            stream = self.own.stream = FileIO(self.file, self.mode)
            self.all.append(stream)
        stream.seek(offset)
        return stream

    def close(self) -> None:
        """Closes those of all threads, which must be done."""
        for stream in self.all:
            stream.close()


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a safetensors file holds, in the order of its bytes.

    Raises:
        ModelError: If it is no safetensors file, or holds a type that weights do not have.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            if length > min(100 * 2**20, size - 8):  # the limit that safetensors sets itself
                raise ValueError("header too long")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = [
            StoredTensor(
                name,
                file,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
        for tensor in found:
            _check_place(tensor, header[tensor.name]["data_offsets"], 8 + length, size)
    except KeyError as error:
        raise ModelError(
            f"{file}: holds tensors of type {error}. Merging needs 16- or 32-bit weights; give the model that was not quantised."
        ) from None
    except (
        OSError,
        ValueError,
        struct.error,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise ModelError(f"{file}: is not a safetensors file ({error}). Fetch it again.") from None
    return sorted(found, key=lambda tensor: tensor.start)


def _check_place(tensor: StoredTensor, offsets: Any, data: int, size: int) -> None:
    """Raises ValueError if a tensor's offsets are not those of its shape, or leave the file of `size` bytes."""
    numbers = [*tensor.shape, *offsets]
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{tensor.name[:80]} has an impossible shape or place")
    if offsets[1] - offsets[0] != tensor.num_bytes or data + offsets[1] > size:
        raise ValueError(f"the bytes of {tensor.name[:80]} are not all there")


class TensorWriter:
    """Writes a safetensors file whose tensors come in pieces, in any order, from several threads."""

    def __init__(self, file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Writes the header and makes the file as long as it will be; `tensors` gives type and shape of each."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.file = file
        self.starts = {name: 8 + len(encoded) + header[name]["data_offsets"][0] for name in tensors}
        self.num_bytes = 8 + len(encoded) + offset
        """Of the whole file."""
        self.missing = offset
        """Bytes of tensors that have not come yet."""
        self.lock = threading.Lock()
        self.handles = Handles(file, "r+b")
        with file.open("wb", buffering=0) as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(self.num_bytes)

    def write(self, name: str, piece: torch.Tensor, start: int = 0) -> None:
        """Writes a piece of a tensor that begins at its value `start`."""
        values: Any = piece.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(values)
        stream = self.handles.at(self.starts[name] + start * piece.dtype.itemsize)
        with self.lock:
            self.missing -= len(view)
        while len(view):
            view = view[stream.write(view) :]

    def flush(self) -> None:
        """Brings to the disk what was written so far."""
        with self.file.open("r+b", buffering=0) as stream:
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Flushes the file to the disk; asserts that all announced bytes have come."""
        assert not self.missing, "tensors written do not match the header"
        self.handles.close()
        self.flush()


def tensors_by_name(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Where the tensors of several files lie.

    Raises:
        ModelError: If a file is damaged.
    """
    return {tensor.name: tensor for file in files for tensor in stored_tensors(file)}


def find_tensor(files: Iterable[Path], name: str) -> torch.Tensor | None:
    """The tensor of a name in the first file that has one, or None.

    Raises:
        ModelError: If a file on the way to it is damaged.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - not a dict
                    return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file}: is damaged ({error}). Fetch or copy it again, or make it anew."
            ) from None
    return None


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small file.

    Raises:
        ModelError: If it is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: is missing or damaged ({error}). Copy it again, or make it anew."
        ) from None


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes a small file; a full disk is a `SafetensorError`, which `storing` tells as any other."""
    save_file(dict(tensors), file, metadata={"format": "pt"})
