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

INSTRUCTIONS = ("fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
"""For any CPU that has them, not for the one at hand alone: the machines of a cluster share a home folder."""

FLAGS = (
    *("-O3", "-std=gnu17", "-shared", "-fPIC", "-fopenmp", *(f"-m{name}" for name in INSTRUCTIONS)),
    # OpenMP is torch's, which is there: threads of another would wait for those of torch that still spin
    *("-nodefaultlibs", "-lm", "-lc"),
)


def has_instructions() -> bool:
    """Whether what is compiled would run here."""
    return sys.platform == "linux" and torch.cpu._is_avx512_bf16_supported()


@functools.cache
def library(source: Path, *definitions: str) -> Any:
    """A C file as a library; compiling takes 1 to 3 seconds.

    Args:
        source: The file.
        definitions: Of its macros, such as D=64.

    Raises:
        OSError: If there is no compiler, or no folder to write to.
        RuntimeError: If the compiler fails.
    """
    defined = [f"-D{definition}" for definition in definitions]
    name = hashlib.sha256(source.read_bytes() + " ".join((*defined, *FLAGS)).encode()).hexdigest()[:16]
    folder = cache_folder() / "compiled"
    file = folder / f"{source.stem}-{name}.so"
    if not file.exists():
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise OSError("no C compiler (cc) was found")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            command = (*compiler.split(), *defined, str(source), *FLAGS, "-o", f"{made}/{file.name}")
            compiled = subprocess.run(command, capture_output=True, text=True, check=False)
            if compiled.returncode:
                raise RuntimeError(f"{compiler}: {compiled.stderr.strip()}")
            Path(made, file.name).replace(file)  # at once: other processes may make the same
    return ctypes.CDLL(str(file))
