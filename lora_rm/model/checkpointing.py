"""Which activations wait for the backward pass, layer by layer.

    none        all of them
    selective   results of the base's matrix products and of the attention; the rest is computed again
    full        each layer's input; the layer is computed again

Selective holds about 70 % of what `none` holds (of an 8B model's layer 98,664 of 143,720 bytes a token) and takes little more
time: what it computes again (norms, activations, LoRA's second factor) is cheap, and 4-bit weights are not multiplied twice.

Where a layer is made of parts that this package knows (RMS norms, a gated MLP, plain LoRA), each input of an adapted layer is
computed again from what waits anyway (`made_again`). Elsewhere torch's selective checkpointing is asked about every operation,
in Python: three times the time of the host (22 ms a layer, against 6 with `none` and 7 here), which a fast card waits for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_rm.errors import ModelError
from lora_rm.model.adapted_linear import Adapted
from lora_rm.model.elementwise import FusedNorm, GatedMLP

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
        has_known_parts = mode == "selective" and _has_known_parts(layer)
        by_torch = mode == "selective" and not has_known_parts
        layer.gradient_checkpointing = by_torch or mode == "full"  # type: ignore[assignment]
        context: dict[str, Any] = {}
        if by_torch:
            # transformers adds the biases of experts into the result of their product, which then is not what was kept
            adds_in_place = any(getattr(module, "has_bias", False) for module in layer.modules())
            kept = [part for part in KEPT if part != "grouped_mm" or not adds_in_place]
            context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy(max_rank, kept))}
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                module.keeps_base_product = by_torch
            if isinstance(module, FusedNorm | GatedMLP):
                module.tells_source = has_known_parts
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **context)  # type: ignore[assignment]


def _has_known_parts(layer: torch.nn.Module) -> bool:
    """Whether all that a layer keeps beside products and attention can be computed again from these."""
    parts = list(layer.modules())
    adapted = [part for part in parts if isinstance(part, LoraLayer)]
    norms = [part for part in parts if "norm" in type(part).__name__.lower()]
    return (
        any(isinstance(part, GatedMLP) for part in parts)
        and all(isinstance(part, FusedNorm) for part in norms)
        and all(isinstance(part, Adapted) and part.is_plain(training=True) for part in adapted)
    )


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
