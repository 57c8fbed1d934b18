"""C files compiled for a CPU that multiplies in bfloat16 (AVX512-BF16), where a compiler is at hand; kept for the next process."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lora_rm.model.base import cache_folder

HEADER = Path(__file__).with_name("cpu_vectors.h")
"""What the C files include."""

INSTRUCTIONS = ("fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
"""For any CPU that has them, not for the one at hand alone: the machines of a cluster share a home folder."""

FLAGS = ("-O3", "-std=gnu17", "-fPIC", "-fopenmp", *(f"-m{name}" for name in INSTRUCTIONS))


def has_instructions() -> bool:
    """Whether what is compiled would run here."""
    is_known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private, so it may go
    return sys.platform == "linux" and is_known()


def find_compiler() -> str | None:
    """The command of a C compiler."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


@functools.cache
def library(source: Path, *definitions: str) -> Any:
    """A C file as a library; compiling takes 1 to 3 seconds.

    Args:
        source: The file.
        definitions: Of its macros, such as D=64.

    Raises:
        OSError: If there is no compiler, or no folder of one's own to keep it in.
        RuntimeError: If the compiler fails.
    """
    defined = [f"-D{definition}" for definition in definitions]
    all_there_is = source.read_bytes() + HEADER.read_bytes() + " ".join((*defined, *FLAGS)).encode()
    name = hashlib.sha256(all_there_is).hexdigest()[:16]
    folder = cache_folder() / "compiled"
    file = folder / f"{source.stem}-{name}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise OSError(f"others can write to {folder}, from which code would be loaded; remove it")
    if not file.exists():
        compiler = find_compiler()
        if compiler is None:
            raise OSError("no C compiler (cc) was found")
        with tempfile.TemporaryDirectory(dir=folder) as made:
            _run(*compiler.split(), *defined, *FLAGS, "-c", str(source), "-o", f"{made}/object.o")
            # without OpenMP's library: torch's is there, and threads of another would wait for those of torch that still spin
            _run(*compiler.split(), "-shared", f"{made}/object.o", "-lm", "-o", f"{made}/{file.name}")
            Path(made, file.name).replace(file)  # at once: other processes may make the same
    return ctypes.CDLL(str(file))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
