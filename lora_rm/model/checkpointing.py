"""Which activations wait for the backward pass, layer by layer.

    none        all of them
    selective   results of the base's matrix products and of the attention; the rest is computed again
    full        each layer's input; the layer is computed again

Selective takes half to two thirds of the memory of `none` and little more time: what it computes again (norms, activations,
LoRA's second factor) is cheap, and 4-bit weights are not multiplied twice. It asks Python about every operation, which a fast
card waits for in short rows: in rows of 4,096 tokens of an 8B model an H200 takes longer than with `full` (RESULTS.md).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_rm.errors import ModelError

Mode = Literal["none", "selective", "full"]

MODES: tuple[Mode, ...] = ("none", "selective", "full")
"""From the most memory to the least."""

PRODUCTS = ("aten::mm", "aten::addmm")
KEPT = ("attention", "attn", "gemm_4bit", "grouped_mm")
"""Parts of the names of further operators whose results are kept."""


def set_checkpointing(layers: Sequence[torch.nn.Module], modes: Sequence[Mode], max_rank: int) -> None:
    """Sets what each decoder layer keeps.

    Works on transformers' `GradientCheckpointingLayer`, whose flag is per instance.
    `gradient_checkpointing_enable` of a PEFT model would also ask for gradients of the embeddings' output.

    Args:
        layers: Of the decoder.
        modes: One a layer.
        max_rank: Largest rank of the adapter: products over so few columns are LoRA's second factor, which is
            cheaper to compute again than to keep.
    """
    for layer, mode in zip(layers, modes, strict=True):
        if mode != "none" and not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(
                f"train.checkpointing {mode}: transformers cannot compute a {type(layer).__name__} again. Set it to none."
            )
        layer.gradient_checkpointing = mode != "none"  # type: ignore[assignment]
        context: dict[str, Any] = {}
        if mode == "selective":
            # transformers adds the biases of experts into the result of their product, which then is not what was kept
            adds_in_place = any(getattr(module, "has_bias", False) for module in layer.modules())
            kept = [part for part in KEPT if part != "grouped_mm" or not adds_in_place]
            context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy(max_rank, kept))}
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                module.keeps_base_product = mode == "selective"
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **context)  # type: ignore[assignment]


def _policy(max_rank: int, kept: Sequence[str]) -> Callable[..., CheckpointPolicy]:
    def keep(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        name = operator.name() if hasattr(operator, "name") else str(operator)
        if name.partition(".")[0] in PRODUCTS:
            columns = args[-2].shape[-1]  # of the left factor
            return CheckpointPolicy.MUST_SAVE if columns > max_rank else CheckpointPolicy.PREFER_RECOMPUTE
        if any(part in name for part in kept):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return keep
