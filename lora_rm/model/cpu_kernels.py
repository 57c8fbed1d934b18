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
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_rm.console import say
from lora_rm.errors import first_line
from lora_rm.model.cpu_library import has_instructions, library

SOURCE = Path(__file__).with_suffix(".c")


class CpuKernels:
    """The kernels; their tensors lie in rows of a multiple of 16 values, in bfloat16.

    Raises:
        OSError: If they cannot be compiled.
        RuntimeError: Likewise, or if they do not give what torch gives.
    """

    def __init__(self) -> None:
        """Compiles and checks them."""
        self._compiled = library(SOURCE)
        with torch.no_grad():
            self._check()

    def _run(self, name: str, *args: torch.Tensor | int | float) -> None:
        if isinstance(args[0], FakeTensor):
            return
        kinds: dict[type, Any] = {int: ctypes.c_long, float: ctypes.c_float}
        values = (
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else kinds[type(x)](x) for x in args
        )
        getattr(self._compiled, name)(*values)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product of silu(gate) and up."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self._run("gated", gate, up, y, *_rows(y))
        return y

    def gated_backward(
        self, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients toward gate and up."""
        gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._run("gated_backward", gradient, gate, up, of_gate, of_up, *_rows(gate))
        return of_gate, of_up

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x (..., D): w x / sqrt(mean(x^2) + eps), and 1 / sqrt(...) of every row, (..., 1) float32."""
        x = x.contiguous()
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._run("norm", x, weight, y, scale, *_rows(x), float(eps))
        return y, scale

    def norm_backward(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The gradient toward x."""
        gradient, x = gradient.contiguous(), x.contiguous()
        of_x = torch.empty_like(x)
        self._run("norm_backward", gradient, x, weight, scale, of_x, *_rows(x))
        return of_x

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Pairs (x_i, x_{i + D/2}) turned by their token's angle, or back.

        Args:
            x: (1, H, T, D), in any order of heads and tokens, which comes back as it is; D is a multiple of 16.
            cos: Of every angle, (1, 1, T, D).
            sin: Likewise.
            back: Whether by the angle's negative, as gradients are.
        """
        x = x if x.stride(3) == 1 else x.contiguous()
        y = torch.empty_like(x)
        _, heads, tokens, size = x.shape
        strides = x.stride(2), x.stride(1), y.stride(2), y.stride(1)
        angles = cos.contiguous(), sin.contiguous()
        self._run("turned", x, *angles, y, tokens, heads, size // 2, *strides, -1 if back else 1)
        return y

    def _check(self) -> None:
        """Compares what small tensors give with float32."""
        generator = torch.Generator().manual_seed(0)
        x, y, z = (torch.randn((1, 3, 5, 32), generator=generator).bfloat16() for _ in range(3))
        gate, up, gradient = x.float(), y.float(), z.float()
        weight = y[0, 0, 0].contiguous()
        scale = (gate.square().mean(-1, keepdim=True) + 1e-2).rsqrt()
        normed, weighted = gate * scale, gradient * weight
        cos, sin = y[:, :1], z[:, :1]
        half = torch.cat((-x[..., 16:], x[..., :16]), -1).float()
        expected = [
            F.silu(gate) * up,
            torch.ops.aten.silu_backward(gradient * up, gate),
            F.silu(gate) * gradient,
            normed * weight,
            (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale,
            x * cos.float() + half * sin,
        ]
        found = [
            self.gated(x, y),
            *self.gated_backward(z, x, y),
            self.norm(x, weight, 1e-2)[0],
            self.norm_backward(z, x, weight, scale),
            self.turned(x, cos, sin, back=False),
        ]
        for one, other in zip(found, expected, strict=True):
            if not torch.allclose(one.float(), other, rtol=2**-8, atol=2**-12):
                raise RuntimeError("compiled kernels give other values than torch")


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


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
