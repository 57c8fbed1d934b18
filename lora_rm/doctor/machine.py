"""Checks of a machine: versions, device, bitsandbytes, disk, memory."""

import importlib.metadata
import math
import shutil
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch

from lora_rm.config import Settings
from lora_rm.doctor.finding import Finding, judge
from lora_rm.errors import first_line
from lora_rm.model.device import host_memory, pick_compute_dtype, pick_device
from lora_rm.model.quantization import dtype_name, make_exact
from lora_rm.plan import GIB, Plan, plan, remedies


def check_versions(requirements: Sequence[str] | None = None) -> Finding:
    """Whether the libraries are there in the versions needed.

    Args:
        requirements: Like `torch>=2.11`; None: those of this package.
    """
    from packaging.requirements import Requirement

    wrong, seen = [], []
    for text in own_requirements() if requirements is None else requirements:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        seen.append(f"{needed.name} {version}")
        if version == "missing" or not needed.specifier.contains(version, prereleases=True):
            wrong.append((f"{needed.name} is {version}, needed: {needed.specifier}", text))
    command = " ".join(f'"{text}"' for _, text in wrong)
    found = "; ".join(sentence for sentence, _ in wrong) or ", ".join(seen)
    return judge("versions", found, f"pip install {command}", fault=bool(wrong), value=len(wrong))


def own_requirements() -> list[str]:
    """The libraries that this package needs, out of its metadata or, in a checkout, of pyproject.toml."""
    try:
        return importlib.metadata.requires("lora_rm") or []
    except importlib.metadata.PackageNotFoundError:
        text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["dependencies"]


def check_gpu(num_usable: int | None = None, has_driver: bool | None = None) -> Finding:
    """Whether torch can use the GPU that is there.

    Args:
        num_usable: CUDA devices that torch finds; None: ask it.
        has_driver: Whether an NVIDIA driver runs; None: look.
    """
    if num_usable is None:
        num_usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if has_driver is None:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if num_usable and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(num_usable)]
        found = f"{num_usable} usable by torch {torch.__version__}: {', '.join(names)}"
    elif has_driver:
        found = f"an NVIDIA driver is there, but torch {torch.__version__} finds no GPU, so all would run on the CPU"
    else:
        found = f"none; everything runs on the CPU with {torch.get_num_threads()} threads, which suits models up to about 1B"
    remedy = (
        "If the version of torch ends with +cpu, install a CUDA build (pytorch.org, Get started). Else run `nvidia-smi`: "
        "if it fails, the driver or the container's access to the GPU is what to mend."
    )
    return judge("GPU", found, remedy, fault=has_driver and not num_usable, value=num_usable)


def check_bitsandbytes(device: torch.device) -> Finding:
    """Whether a 4-bit layer holds its weight, multiplies by it, and lets gradients through.

    NF4 changes a normal weight by 9 to 10 % (root mean square).
    """
    remedy = (
        "Run `python -m bitsandbytes` to see which library it found, then `pip install --force-reinstall bitsandbytes`. "
        "Until then train with --model.quantization none."
    )
    version = importlib.metadata.version("bitsandbytes")
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(256, 256, generator=generator, dtype=torch.float32)
        layer: Any = bnb.nn.Linear4bit(
            256, 256, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        make_exact(layer)
        inputs = torch.randn(8, 256, generator=generator).to(device)
        with torch.no_grad():
            outputs = layer(inputs).cpu()
        stored = bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
        loss = float((stored - weight).norm() / weight.norm())
        product = float((outputs - inputs.cpu() @ stored.T).norm() / outputs.norm())
        inputs.requires_grad_()
        layer(inputs).sum().backward()
        slope = math.inf if inputs.grad is None else _relative(inputs.grad.cpu()[0], stored.sum(0))
    except Exception as error:  # whatever a library without its kernels raises
        found = f"{version} does not work on {device}: {first_line(error)}"
        return judge("bitsandbytes", found, remedy, fault=True)
    found = (
        f"{version} on {device}: 4-bit storage changes a weight by {loss:.1%} (sound: about 9 %), products are off by "
        f"{product:.1e} and gradients by {slope:.1e}"
    )
    sound = 0.05 < loss < 0.15 and product < 0.01 and slope < 0.01
    return judge("bitsandbytes", found, remedy, fault=not sound, value=loss)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_bfloat16(
    device: torch.device, wanted: str = "auto", seconds: Mapping[torch.dtype, float] | None = None
) -> Finding:
    """Whether the type of matrix products that training would use is the fast one here.

    Args:
        device: Where.
        wanted: As in `model.compute_dtype`.
        seconds: Of one product by type; None: measure.
    """
    seconds = seconds or {dtype: time_product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = pick_compute_dtype(wanted, device)
    name = dtype_name(chosen)
    times = seconds[torch.bfloat16] / seconds[torch.float32]
    speed = f"{1 / times:.1f} times as fast as" if times < 1 else f"{times:.1f} times as slow as"
    found = f"products run in {name} (model.compute_dtype {wanted}); here bfloat16 is {speed} float32"
    is_slow = (chosen == torch.bfloat16 and times > 1.2) or (chosen == torch.float32 and times < 0.6)
    other = "float32" if chosen == torch.bfloat16 else "bfloat16"
    return judge(
        "bfloat16", found, f"Set --model.compute-dtype {other}.", fault=False, warning=is_slow, value=times
    )


def time_product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one matrix product; the fastest of five."""
    size = 4096 if device.type == "cuda" else 384
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    found = []
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def check_disk(folder: Path, needed: float = 20 * GIB) -> Finding:
    """Whether a folder can be written to and has room.

    Args:
        folder: May not be there yet.
        needed: Bytes wanted; a merged 8B model takes 16 GB.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return judge(
            "disk",
            f"{there} cannot be written to ({error.strerror})",
            "Change its permissions, or give another folder: --output-dir, or the environment's LORA_RM_CACHE.",
            fault=True,
        )
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free for {folder}"
    remedy = (
        f"Free {max(0.0, needed - free) / GIB:.1f} GiB, or give a folder on another disk (--output-dir; LORA_RM_CACHE). "
        "A checkpoint takes 12 bytes a trained value, a merged model 2 bytes a parameter: 16 GB for 8B."
    )
    return judge("disk", found, remedy, fault=free < GIB, warning=free < needed, value=free / GIB)


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still have: of a GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return host_memory()[1]


def check_memory(free: float, where: str = "cpu") -> Finding:
    """Whether anything at all can be trained in this memory.

    The built-in 135M model takes 1.4 GiB on a CPU, an 8B model in 4 bits about 8 GiB on a GPU.
    """
    least = 2.0
    found = f"{free / GIB:.1f} GiB free ({where})"
    remedy = (
        "Close other programs that use it, or raise the container's limit; `lora-rm plan MODEL` says what a model needs. "
        f"Below {least:.0f} GiB not even the smallest model trains, 8 GiB are for 8B in 4 bits."
    )
    return judge("memory", found, remedy, fault=free < least * GIB, warning=free < 8 * GIB, value=free / GIB)


def check_fit(settings: Settings, planned: Plan | None = None, free: float | None = None) -> Finding:
    """Whether the training of a model fits into the memory that is there and free.

    Args:
        settings: Of the run.
        planned: None: plan it.
        free: Bytes; None: what is free here.
    """
    planned = planned or plan(settings)
    fits, planned = planned.is_fitting, planned.settled
    free = free_memory(pick_device(settings.model.device)) if free is None else free
    needed = planned.needed(planned.mode, planned.row)
    found = (
        f"training takes {needed / GIB:.2f} GiB with rows of {planned.row} tokens and checkpointing {planned.mode}; "
        f"{planned.memory / GIB:.1f} GiB are there, {free / GIB:.1f} free"
    )
    if fits:
        remedy = f"Close other programs: {needed / GIB:.1f} GiB must be free."
    else:
        remedy = "What would help: " + "; ".join(remedies(planned)) + "."
    return judge(
        "memory for the model", found, remedy, fault=not fits, warning=needed > free, value=needed / GIB
    )
