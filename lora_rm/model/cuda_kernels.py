"""Gated activations and rotary positions on a GPU in bfloat16, a kernel each way.

Written operation by operation an activation is 2 kernels forward and 4 backward, positions are 5 each way, and each reads and writes
a tensor as long as the row: 10 % of the time that an H200 computes in a step of an 8B model, of which these leave half. NVRTC, which
comes with torch, compiles them in a second when they are first asked for, so no compiler need be installed. Every step is
rounded where torch's operations round: the same bits (tests/gpu). Where they cannot be compiled, torch's operations remain.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lora_rm.console import say
from lora_rm.errors import first_line

SOURCE = r"""
typedef unsigned short bf16;
struct __align__(16) Eight { bf16 at[8]; };

__device__ float wide(bf16 x) { return __uint_as_float((unsigned) x << 16); }

__device__ bf16 narrow(float x) {  // to the nearest, ties to even
    unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

extern "C" __global__ void gated(const Eight* gate, const Eight* up, Eight* y, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    Eight g = gate[i], u = up[i], out;
    for (int k = 0; k < 8; k++) {
        float x = wide(g.at[k]);
        out.at[k] = narrow(wide(narrow(x / (1.0f + expf(-x)))) * wide(u.at[k]));
    }
    y[i] = out;
}

extern "C" __global__ void gated_backward(
    const Eight* gradient, const Eight* gate, const Eight* up, Eight* of_gate, Eight* of_up, int count
) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    Eight d = gradient[i], g = gate[i], u = up[i], to_gate, to_up;
    for (int k = 0; k < 8; k++) {
        float x = wide(g.at[k]), dy = wide(d.at[k]), s = 1.0f / (1.0f + expf(-x));
        to_gate.at[k] = narrow(wide(narrow(dy * wide(u.at[k]))) * s * (1.0f + x * (1.0f - s)));
        to_up.at[k] = narrow(wide(narrow(x / (1.0f + expf(-x)))) * dy);
    }
    of_gate[i] = to_gate;
    of_up[i] = to_up;
}

// sign: 1 turns, -1 turns back
extern "C" __global__ void turned(
    const bf16* x, const bf16* cos, const bf16* sin, bf16* y, int tokens, int heads, int half,
    int x_token, int x_head, int y_token, int y_head, int sign
) {
    long long i = (long long) blockIdx.x * blockDim.x + threadIdx.x;
    int chunks = half / 8, at = i % chunks * 8, head = i / chunks % heads;
    long long token = i / chunks / heads;
    if (token >= tokens) return;
    const bf16* from = x + token * x_token + (long long) head * x_head + at;
    bf16* to = y + token * y_token + (long long) head * y_head + at;
    long long angle = token * 2 * half + at;
    Eight low = *(const Eight*) from, high = *(const Eight*) (from + half), new_low, new_high;
    Eight cos_low = *(const Eight*) (cos + angle), cos_high = *(const Eight*) (cos + angle + half);
    Eight sin_low = *(const Eight*) (sin + angle), sin_high = *(const Eight*) (sin + angle + half);
    for (int k = 0; k < 8; k++) {
        float a = wide(low.at[k]), b = wide(high.at[k]);
        float of_low = sign > 0 ? -wide(sin_low.at[k]) : wide(sin_high.at[k]);
        float of_high = sign > 0 ? wide(sin_high.at[k]) : -wide(sin_low.at[k]);
        new_low.at[k] = narrow(wide(narrow(a * wide(cos_low.at[k]))) + b * of_low);
        new_high.at[k] = narrow(wide(narrow(b * wide(cos_high.at[k]))) + a * of_high);
    }
    *(Eight*) to = new_low;
    *(Eight*) (to + half) = new_high;
}
"""

THREADS = 256
"""Of a block; each takes eight values, 16 bytes, of every tensor."""


class Kernels:
    """The kernels, compiled for one device; their tensors lie there, in bfloat16.

    Raises:
        RuntimeError: If they cannot be compiled, or do not give what torch gives.
    """

    RELATIVE, ABSOLUTE = 2**-6, 2**-6
    """Allowed between them and float32: two roundings of 8 bits."""

    def __init__(self, device: int) -> None:
        """Compiles and checks them."""
        with torch.cuda.device(device), torch.no_grad(), _nvrtc():
            names = "gated", "gated_backward", "turned"
            self._compiled = {name: torch.cuda._compile_kernel(SOURCE, name) for name in names}
            self._check(torch.device("cuda", device))

    def _launch(self, name: str, values: int, *args: Any) -> None:
        """Runs a kernel over so many values of each tensor."""
        grid = -(-values // (8 * THREADS)), 1, 1
        self._compiled[name](grid=grid, block=(THREADS, 1, 1), args=list(args))

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product of silu(gate) and up."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self._launch("gated", y.numel(), gate, up, y, y.numel() // 8)
        return y

    def gated_backward(
        self, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients toward gate and up."""
        gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._launch("gated_backward", gate.numel(), gradient, gate, up, of_gate, of_up, gate.numel() // 8)
        return of_gate, of_up

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Pairs (x_i, x_{i + D/2}) turned by their token's angle, or back.

        Args:
            x: (1, H, T, D), in any order of heads and tokens, which comes back as it is; D is a multiple of 16.
            cos: Of every angle, (1, 1, T, D).
            sin: Likewise.
            back: Whether by the angle's negative, as gradients are.
        """
        if x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[1:3]):
            x = x.contiguous()
        y = torch.empty_like(x)
        _, heads, tokens, size = x.shape
        strides = x.stride(2), x.stride(1), y.stride(2), y.stride(1)
        angles = cos.contiguous(), sin.contiguous()
        # a thread takes eight values of each half
        self._launch(
            "turned", x.numel() // 2, x, *angles, y, tokens, heads, size // 2, *strides, -1 if back else 1
        )
        return y

    def _check(self, device: torch.device) -> None:
        """Compares what small tensors give with float32."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, 3, 5, 32)
        x, y, z = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(3))
        gate, up, gradient = x.float(), y.float(), z.float()
        # without autograd: a checkpointed layer that calls this counts what is saved
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        expected = [F.silu(gate) * up, of_gate, F.silu(gate) * gradient]
        found = [self.gated(x, y), *self.gated_backward(z, x, y)]
        cos, sin = y[:, :1], z[:, :1]
        half = torch.cat((-x[..., 16:], x[..., :16]), -1).float()
        expected.append(x * cos.float() + half * sin)
        found.append(self.turned(x, cos, sin, back=False))
        self._compare(found, expected)

    def _compare(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            if not torch.allclose(one.float(), other, rtol=self.RELATIVE, atol=self.ABSOLUTE):
                raise RuntimeError("compiled kernels give other values than torch")


@contextmanager
def _nvrtc() -> Iterator[None]:
    """Makes torch find NVRTC where it came with torch, and not ask for a CUDA toolkit, whose headers the kernels do not include."""
    from torch.utils import cpp_extension

    with suppress(OSError):  # torch's own way to the library, by its place beside torch
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or "/"
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home


class _NoKernels(Kernels):
    """The same tensors without what is in them."""

    def __init__(self) -> None:
        """Compiles nothing."""

    def _launch(self, name: str, values: int, *args: Any) -> None:
        del name, values, args


_planned: ContextVar[Kernels | None] = ContextVar("planned", default=None)


@contextmanager
def without_launches() -> Iterator[None]:
    """Tensors without data take the place of those on a GPU, to count their bytes."""
    token = _planned.set(_NoKernels())
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Whether the tensors stand for those on a GPU."""
    return _planned.get() is not None


def kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels for tensors, if these are for them: on the present device, in bfloat16, at multiples of 16 bytes."""
    # values are counted in 32 bits
    if any(x.dtype != torch.bfloat16 or x.shape[-1] % 16 or not 0 < x.numel() < 2**31 for x in tensors):
        return None
    if planned := _planned.get():
        return planned
    device = tensors[0].get_device()  # -1 of a CPU
    if device < 0 or device != torch.cuda.current_device() or any(x.data_ptr() % 16 for x in tensors):
        return None
    return _kernels(device)


@functools.cache
def _kernels(device: int) -> Kernels | None:
    try:
        return Kernels(device)
    # the last three of a torch whose private function is another, or has other needs
    except (RuntimeError, OSError, AttributeError, TypeError, ImportError) as error:
        say(f"Activations and positions are computed by torch, in more passes: {first_line(error, 100)}")
        return None
