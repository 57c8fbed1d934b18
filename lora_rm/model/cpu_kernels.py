"""Norms, gated activations and rotary positions on a CPU that multiplies in bfloat16, a kernel each way.

torch's operations read and write a tensor as long as the row several times, and were 10 % of a step. Each kernel reads its
inputs once, and rounds once, so values are within a rounding of torch's. Where they cannot be compiled (`cpu_library`), torch's
operations remain.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_rm.console import say
from lora_rm.errors import first_line
from lora_rm.model.cpu_library import has_instructions, library
from lora_rm.model.cuda_kernels import Kernels

SOURCE = Path(__file__).with_suffix(".c")


class CpuKernels(Kernels):
    """The kernels of a GPU and two for norms; their tensors lie on a CPU in rows of a multiple of 16 values, in bfloat16.

    Raises:
        OSError: If they cannot be compiled.
        RuntimeError: Likewise, or if they do not give what torch gives.
    """

    RELATIVE, ABSOLUTE = 2**-8, 2**-12  # rounded once

    def __init__(self) -> None:
        """Compiles and checks them."""
        self._library = library(SOURCE)
        with torch.no_grad():
            self._check(torch.device("cpu"))

    def _launch(self, name: str, values: int, *args: torch.Tensor | int | float) -> None:
        del values
        if isinstance(args[0], FakeTensor):
            return
        kinds: dict[type, Any] = {int: ctypes.c_long, float: ctypes.c_float}
        values_in_c = (
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else kinds[type(x)](x) for x in args
        )
        getattr(self._library, name)(*values_in_c)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x (..., D): w x / sqrt(mean(x^2) + eps), and 1 / sqrt(...) of every row, (..., 1) float32."""
        x = x.contiguous()
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._launch("norm", x.numel(), x, weight, y, scale, scale.numel(), x.shape[-1], float(eps))
        return y, scale

    def norm_backward(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The gradient toward x."""
        gradient, x = gradient.contiguous(), x.contiguous()
        of_x = torch.empty_like(x)
        self._launch("norm_backward", x.numel(), gradient, x, weight, scale, of_x, scale.numel(), x.shape[-1])
        return of_x

    def _check(self, device: torch.device) -> None:
        super()._check(device)
        generator = torch.Generator(device).manual_seed(0)
        x, gradient = (torch.randn((15, 32), generator=generator).bfloat16() for _ in range(2))
        weight = gradient[0].contiguous()
        scale = (x.float().square().mean(-1, keepdim=True) + 1e-2).rsqrt()
        normed, weighted = x * scale, gradient.float() * weight
        of_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale
        found = self.norm(x, weight, 1e-2)[0], self.norm_backward(gradient, x, weight, scale)
        self._compare(found, (normed * weight, of_x))


def kernels_for(*tensors: torch.Tensor) -> CpuKernels | None:
    """The kernels for tensors, if these are for them: with data, unless a plan counts them. A graph that is traced gets torch's operations."""
    kinds = (torch.Tensor, nn.Parameter, *((FakeTensor,) if _is_planned.get() else ()))
    for x in tensors:
        if type(x) not in kinds or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return None
        if x.shape[-1] % 16 or not x.numel():
            return None
    return _kernels()


_is_planned: ContextVar[bool] = ContextVar("is_planned", default=False)


@contextmanager
def without_runs() -> Iterator[None]:
    """Tensors without data are what kernels give, to count their bytes."""
    token = _is_planned.set(True)
    try:
        yield
    finally:
        _is_planned.reset(token)


@functools.cache
def _kernels() -> CpuKernels | None:
    if not has_instructions():
        return None
    try:
        with _disable_current_modes():  # a plan's, whose tensors have no data
            return CpuKernels()
    except (OSError, RuntimeError) as error:
        say(
            f"Norms, activations and positions are computed by torch, in more passes: {first_line(error, 160)}"
        )
        return None
