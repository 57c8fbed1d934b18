"""RMS norms, rotary positions and gated activations in fewer passes over a row.

transformers writes the first two operation by operation: a norm is 8 passes forward and some 20 backward, rotary positions are 9
and 16. Here a norm is one kernel each way on a GPU, and positions are three, or one in bfloat16 (`cuda_kernels`); on a CPU in bfloat16
all are one each way (`cpu_kernels`). Same
sums, so rewards differ by rounding alone; of a norm only its input and a number a token wait for the backward pass,
of an activation only what went in.

What comes out of a norm or an activation waits for the backward pass all the same, as the input of an adapted layer. Under
selective checkpointing it carries what it was made from instead (`made_again`), which waits already.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from lora_rm.model import cpu_kernels, cuda_kernels
from lora_rm.model.cuda_kernels import Kernels, is_planned

SILU = nn.SiLU, SiLUActivation
"""The activation that has a kernel of its own."""

AT_ONCE = 2**18
"""Values whose norm a CPU computes at once: a megabyte of float32, which stays in its cache. The norm of 3,165 tokens of 576 took half the time."""


def _kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The compiled kernels of the device where tensors lie, or for which they are planned."""
    on_cpu = tensors[0].device.type == "cpu" and not is_planned()
    return cpu_kernels.kernels_for(*tensors) if on_cpu else cuda_kernels.kernels_for(*tensors)


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension; w is frozen.

    Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4. With n = x / sqrt(...), the gradient toward x of a gradient g of y is
    (w g - n mean(w g n)) / sqrt(...).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        if x.is_cuda or is_planned():
            of_x, _ = torch.ops.aten._fused_rms_norm_backward(
                gradient, x, weight.shape, scale, weight, [True, False]
            )
            return of_x, None, None
        if kernels := cpu_kernels.kernels_for(gradient, x, weight):
            return kernels.norm_backward(gradient, x, weight, scale), None, None
        # torch has no such kernel for a CPU, but that of a layer norm: around 0 it takes mean(w g) / sqrt(...) too much away
        of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient,
            x,
            weight.shape,
            torch.zeros_like(scale),
            scale,
            weight.to(scale.dtype),
            None,
            [True, False, False],
        )
        taken = (gradient @ weight[:, None]).mul_(scale / len(weight))
        return of_x.add_(taken), None, None


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What eq. 4 makes of x (..., D), and 1 / sqrt(...) of every token, (..., 1) float32."""
    # a graph takes one operation: a loop over tokens would be unrolled for the length that it was traced with
    if x.is_cuda or is_planned() or torch.compiler.is_compiling():
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._fused_rms_norm(
            x, weight.shape, weight, eps
        )
        return found
    if kernels := cpu_kernels.kernels_for(x, weight):
        return kernels.norm(x, weight, eps)
    # by torch's operations that is several passes over a float32 copy
    size = len(weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, scale = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)
    weight, tokens = weight.to(wide), max(1, AT_ONCE // size)
    for rows, to, of_rows in zip(*(t.flatten(0, -2).split(tokens) for t in (x, y, scale)), strict=True):
        rows = rows.to(wide)
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=of_rows)
        of_rows.square_().div_(size).add_(eps).rsqrt_()
        to.copy_((rows * of_rows).mul_(weight))
    return y, scale


class MadeAgain(NamedTuple):
    """How a tensor is computed again, bit for bit."""

    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]
    """Its arguments, without gradient."""

    version: int
    """Of the tensor; another one has been changed in place since."""


def made_again(x: torch.Tensor) -> MadeAgain | None:
    """How an input can be computed again, if a norm or an activation says so."""
    found: MadeAgain | None = getattr(x, "made_again", None)
    return found if found is not None and found.version == x._version else None


def _tell(y: torch.Tensor, make: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
    # without gradient, for a tensor that knows where it came from would keep itself alive
    y.made_again = MadeAgain(make, tuple(x.detach() for x in sources), y._version)  # type: ignore[attr-defined]
    return y


class FusedNorm(nn.Module):
    """The forward pass of a norm that is no more than eq. 4."""

    tells_source = False
    """Whether what comes out carries what it was made from."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The norm; of a trained weight, or one of another type, as transformers computes it."""
        weight = getattr(self, "weight", None)  # some norms of a class have none
        if weight is None or weight.requires_grad or weight.dtype != x.dtype:
            return super().forward(x)
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        y: torch.Tensor = _RMSNorm.apply(x, weight, eps)
        return _tell(y, functools.partial(_norm, eps=eps), x, weight) if self.tells_source else y


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _normed(x, weight, eps)[0]


class _Gated(torch.autograd.Function):
    """y = f(gate) up, of which gate and up alone wait for the backward pass; Shazeer 2020 (arXiv 2002.05202), eq. 6."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, f: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.f = f
        return _gated_product(gate, up, f)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.f, SILU):
            if kernels := _kernels_for(gradient, gate, up):
                return *kernels.gated_backward(gradient, gate, up), None
            # in place: on a CPU a fresh tensor as long as the row takes longer to get than to fill
            of_gate = gradient * up
            torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
            return of_gate, F.silu(gate).mul_(gradient), None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.f(gate)
        (of_gate,) = torch.autograd.grad(activated, gate, gradient * up)
        return of_gate, activated.detach() * gradient, None


def _gated_product(gate: torch.Tensor, up: torch.Tensor, f: Any) -> torch.Tensor:
    if isinstance(f, SILU):
        kernels = _kernels_for(gate, up)
        return kernels.gated(gate, up) if kernels else F.silu(gate).mul_(up)
    y: torch.Tensor = f(gate) * up
    return y


class GatedMLP(nn.Module):
    """The forward pass of an MLP that is no more than down(f(gate(x)) up(x))."""

    tells_source = False
    """As of a norm."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The MLP."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        y: torch.Tensor = _Gated.apply(gate, up, self.act_fn)
        return self.down_proj(_tell(y, self.make_again, gate, up) if self.tells_source else y)

    def make_again(self: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What goes into the last layer."""
        return _gated_product(gate, up, self.act_fn)


class _Rotation(torch.autograd.Function):
    """Turns each pair (x_i, x_{i + D/2}) by its token's angle, x (..., T, D); Su et al. 2021 (arXiv 2104.09864), eq. 34."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        if kernels := _kernels_for_rotation(x, cos, sin):
            return kernels.turned(x, cos, sin, back=False)
        low, high = sin.chunk(2, dim=-1)
        return _turned(x, cos, low.neg(), high)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if kernels := _kernels_for_rotation(gradient, cos, sin):
            return kernels.turned(gradient, cos, sin, back=True), None, None
        low, high = sin.chunk(2, dim=-1)
        return _turned(gradient, cos, high, low.neg()), None, None


def _kernels_for_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Kernels | None:
    is_one_row = x.dim() == 4 and x.shape[0] == 1 and cos.shape == (1, 1, *x.shape[2:])
    return _kernels_for(x, cos, sin) if is_one_row else None


def _turned(x: torch.Tensor, cos: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The product of x and cos, plus the upper half times `low` in the lower and the lower times `high` in the upper."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], low)
    y[..., half:].addcmul_(x[..., :half], high)
    return y


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their positions, as transformers' function of this name does it.

    Args:
        q: Queries, (1, H, T, D).
        k: Keys, (1, G, T, D).
        cos: Of every angle, (1, T, D).
        sin: Likewise.
        unsqueeze_dim: Where cos and sin lack the heads.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def fuse_elementwise(model: nn.Module) -> None:
    """Lets a model's norms, activations and rotary positions take fewer passes, where they are what the above computes.

    Rotary positions are a function of a module of transformers, so every model of the family in this process gets ours, until
    `give_back_rotary`.
    """
    for module in list(model.modules()):
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm") and _is_plain_norm(kind):
            module.__class__ = _fused(kind)
        if hasattr(module, "act_fn") and _is_plain_mlp(kind):
            module.__class__ = _gated(kind)
        home = sys.modules[kind.__module__]
        theirs = getattr(home, "apply_rotary_pos_emb", None)
        if theirs not in (None, apply_rotary_pos_emb) and _is_plain_rotation(theirs):
            _REPLACED[home] = theirs
            home.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]


_REPLACED: dict[Any, Any] = {}
"""Functions of transformers in whose place ours stand, by their module."""


def give_back_rotary() -> None:
    """Puts transformers' own functions back, so that a proof against transformers is one."""
    while _REPLACED:
        home, theirs = _REPLACED.popitem()
        home.apply_rotary_pos_emb = theirs


@functools.cache
def _fused(kind: Any) -> Any:
    return type(kind.__name__, (FusedNorm, kind), {})


@functools.cache
def _gated(kind: Any) -> Any:
    return type(kind.__name__, (GatedMLP, kind), {})


@functools.cache
def _is_plain_mlp(kind: Any) -> bool:
    """Whether a class of MLPs computes down(f(gate(x)) up(x))."""
    if issubclass(kind, GatedMLP):
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        probe: Any = _gated(kind).__new__(_gated(kind))
        nn.Module.__init__(probe)
        probe.act_fn = nn.SiLU()
        for name, shape in (("gate_proj", (12, 8)), ("up_proj", (12, 8)), ("down_proj", (8, 12))):
            layer = nn.Linear(shape[1], shape[0])
            layer.weight.copy_(torch.randn(shape, generator=generator))
            setattr(probe, name, layer)
        x = torch.randn((3, 8), generator=generator)
        try:
            return torch.equal(kind.forward(probe, x), probe(x))
        except (TypeError, AttributeError, RuntimeError):
            return False


@functools.cache
def _is_plain_norm(kind: Any) -> bool:
    """Whether a class of norms computes eq. 4 with its weight (Gemma's adds 1 to it), and this torch can in one operation."""
    if issubclass(kind, FusedNorm):
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"), torch.no_grad():
            norm = kind(16, eps=1e-2)
            weight, x = (torch.randn(shape, generator=generator) for shape in (16, (3, 16)))
            norm.weight.copy_(weight)
            found, ours = norm(x), _RMSNorm.apply(x, weight, 1e-2)
    except (TypeError, AttributeError, RuntimeError):
        return False
    return found.shape == ours.shape and bool(torch.allclose(found, ours, atol=1e-5))


@functools.cache
def _is_plain_rotation(function: Any) -> bool:
    """Whether a function turns pairs half a head apart, and whole heads only."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        q, k, cos, sin = (
            torch.randn(shape, generator=generator)
            for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
        )
    try:
        found, expected = function(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
        same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    try:
        function(q, k, cos[..., :4], sin[..., :4])
    except RuntimeError:
        return same
    return False  # it turns parts of heads too
