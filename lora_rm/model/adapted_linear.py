"""A frozen linear layer and its LoRA update as one product.

PEFT adds the update to the layer's output in three passes over a tensor as long as the row (four on a 4-bit layer,
whose output it clones), and autograd adds the gradients toward the input in another. Here the second factor of the
update accumulates into the base's product, forward and backward, as BLAS can (`addmm`), on a GPU the base's product into the
update. On a CPU core an adapter of rank 16 then takes 13 % of the time of the base's products, not 18 %. Same sums, so
losses differ by rounding alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora import Linear8bitLt as LoraLinear8bit
from torch import nn

from lora_rm.model.elementwise import made_again
from lora_rm.model.quantization import ExactLinear4bit, ExactLinear8bit, autocast_dtype, dense_weight


class _AdaptedProduct(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, of x (T, in), A (rank, in) and B (out, rank); W and bias are frozen.

    Hu et al. 2021 (arXiv 2106.09685), eq. 3. Backward, for a gradient g of y (T, out):

        x: g W + s (g B) A      A: s (g B)^T x      B: s g^T (x A^T)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        base: Any,
        keep: bool,
        make: Callable[..., torch.Tensor] | None,
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        low = x @ a.T
        ctx.save_for_backward(low, a, b, *(sources if make else (x,)))
        ctx.scale, ctx.weight, ctx.make = scale, dense_weight(base), make
        if x.is_cuda and not keep:
            # the larger product adds itself to the smaller one as it is written: a pass over y less
            y = _scaled_product(low, b.T, scale)
            if base.bias is not None:
                y += base.bias.to(y.dtype)
            return y.addmm_(x, ctx.weight(x.dtype).T)
        product = base(x)
        if keep:
            return torch.addmm(product, low, b.T, alpha=scale)
        return product.addmm_(low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, a, b, *sources = ctx.saved_tensors
        x = ctx.make(*sources).flatten(0, -2).to(a.dtype) if ctx.make else sources[0]
        low_gradient = _scaled_product(gradient, b, ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight(gradient.dtype)
            if x.is_cuda:  # as forward
                of_x = (low_gradient @ a).addmm_(gradient, weight)
            else:
                of_x = (gradient @ weight).addmm_(low_gradient, a)
        own = (None,) * (4 + len(sources) * bool(ctx.make))
        # B's transposed, since a CPU takes 1.5 times as long where the longer factor is the transposed one (of a GPU not measured)
        return of_x, low_gradient.T @ x, _scaled_product(low.T, gradient, ctx.scale).T, *own


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The product times the scale, in one operation."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


class Adapted:
    """The forward pass of an adapted layer, where it is a plain LoRA on a layer whose weight stands as (out, in)."""

    keeps_base_product = False
    """Whether selective checkpointing keeps what the base computes, and must find it as it was."""

    def is_plain(self: Any, training: bool) -> bool:
        """Whether base and update are all there is: no dropout, DoRA, bias of its own or second adapter."""
        return (
            type(self.get_base_layer()) in (nn.Linear, ExactLinear4bit, ExactLinear8bit)
            and self.active_adapters == ["default"]
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and (type(self.lora_dropout["default"]) is nn.Identity or not training)
            and self.lora_B["default"].bias is None
        )

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base and update; with dropout, DoRA or several adapters as PEFT computes them."""
        if args or kwargs or not self.is_plain(self.training):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc] # of PEFT's class
        base, source = self.get_base_layer(), made_again(x)
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        dtype = autocast_dtype(x, a.dtype)
        rows, scale = x.flatten(0, -2).to(dtype), self.scaling["default"]
        y: torch.Tensor = _AdaptedProduct.apply(
            rows,
            a.to(dtype),
            b.to(dtype),
            scale,
            base,
            self.keeps_base_product,
            *((source.make, *source.sources) if source else (None,)),
        )
        y = y.unflatten(0, x.shape[:-1])
        return y if type(base) is nn.Linear else y.to(x.dtype)


class AdaptedLinear(Adapted, LoraLinear):  # type: ignore[misc] # PEFT is not checked
    """On a layer that is not quantised."""


class AdaptedLinear4bit(Adapted, LoraLinear4bit):  # type: ignore[misc]
    """On a 4-bit layer."""


class AdaptedLinear8bit(Adapted, LoraLinear8bit):  # type: ignore[misc]
    """On an 8-bit layer."""


def join_products(model: nn.Module) -> None:
    """Lets every adapted layer compute base and update as one product; layers of other kinds stay PEFT's."""
    for module in model.modules():
        if type(module) is LoraLinear and not module.fan_in_fan_out:
            module.__class__ = AdaptedLinear
        elif type(module) is LoraLinear4bit:
            module.__class__ = AdaptedLinear4bit
        elif type(module) is LoraLinear8bit:
            module.__class__ = AdaptedLinear8bit
