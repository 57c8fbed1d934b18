"""Where a model computes, and in what type."""

import os
import platform
from pathlib import Path

import torch

from lora_rm import processes
from lora_rm.errors import ModelError
from lora_rm.model.quantization import DTYPES


def pick_device(name: str) -> torch.device:
    """The device of `model.device`, which becomes torch's present one if it is a GPU.

    What asks for no device in particular (bitsandbytes, `torch.cuda.synchronize`) then means this one.

    Raises:
        ModelError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{processes.LOCAL_RANK}"
    elif name.startswith("cuda:") and processes.LOCAL_COUNT > 1:
        raise ModelError(
            f"model.device is {name}, but {processes.LOCAL_COUNT} processes were started on this machine, each for a GPU "
            "of its own. Use auto or cuda."
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device is {name!r}; allowed: auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device is {name}, but torch finds {torch.cuda.device_count()} CUDA devices here."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if segments_grow():
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return device


def segments_grow() -> bool:
    """Whether torch's allocator is asked for memory that can be extended: unless the user has told it something.

    Rows of many lengths leave gaps in segments of fixed sizes: of an H200 with caps of 8 to 24 GiB the allocator then took 2 to 7 % more
    than the tensors it held, and one planned row did not fit; with segments that grow 1 to 3 %. WSL2 cannot always.
    """
    is_told = any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_"))
    return not is_told and "microsoft" not in platform.release().lower()


def host_memory() -> tuple[float, float]:
    """Bytes that the machine, or the container within it, has, and of them the free ones.

    What a container's files hold in the page cache counts as free: it is given back when memory is short.
    """
    total = free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit, current, counts = (
            (CGROUP / name).read_text(encoding="utf-8")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = sum(
            float(size)
            for name, size in map(str.split, counts.splitlines())
            if name in ("active_file", "inactive_file")
        )
        if limit.strip() != "max":
            return min(total, float(limit)), min(free, float(limit) - float(current) + cached)
    except (OSError, StopIteration, ValueError):  # not Linux, or no limits
        pass
    return total, free


CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits lie (cgroup 2)."""


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of `model.compute_dtype`; auto is bfloat16 only where the hardware multiplies it.

    On a CPU without AVX512-BF16 or AMX, bfloat16 products take three times as long as float32 ones.

    Raises:
        ModelError: For float16 on a CPU, for which torch has no autocast that knows every operation.
    """
    if name == "float16" and device.type == "cpu":
        raise ModelError(
            "model.compute_dtype is float16, which needs a GPU; the model is on a CPU. Use auto."
        )
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch's allocator, or what CUDA's libraries allocate themselves, found too little memory."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
