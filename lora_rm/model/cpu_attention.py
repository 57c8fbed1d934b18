"""Attention over a row of trees on a CPU that multiplies in bfloat16, compiled where a C compiler is at hand.

torch's flash attention runs at a fifth to a third of such a machine's peak. Here a tree's keys are arranged once for all of its
queries, scores and weights stay in registers and the cache, and blocks that a causal mask hides are not computed. It is the
computation of `block_attention`, with scores in float32 throughout.

Shape letters as in tree_attention.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lora_rm.console import say
from lora_rm.data.batches import Tree, TreePlan
from lora_rm.errors import first_line
from lora_rm.model.cpu_library import has_instructions, library

SOURCE = Path(__file__).with_suffix(".c")
MOST_SHARED = 96
"""Query heads that may share keys: the rows of a block."""

_CHECKED: dict[int, bool] = {}
"""Whether what was compiled for a head size has been found right."""


def compiled_attention(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, plan: TreePlan, scale: float
) -> torch.Tensor:
    """Causal attention of every token of a row to what it sees, (1, T, H, D); for its equations see `block_attention`.

    Args:
        query_1HTD: Queries, bfloat16 like keys and values.
        key_1GTD: Keys.
        value_1GTD: Values.
        plan: With what the core `compiled` looks up.
        scale: Of the scores.
    """
    rows = (x.squeeze(0).transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
    tables = plan.indices["trees"], plan.indices["answer_lengths"]
    output: torch.Tensor = _CompiledAttention.apply(*rows, *tables, scale)
    return output[None]


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *rows, trees, answer_lengths, ctx.scale = inputs
        inputs = *(x.contiguous() for x in rows), trees, answer_lengths
        output, sums = _forward(*inputs, ctx.scale)
        ctx.save_for_backward(*inputs, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(*ctx.saved_tensors, gradient.contiguous(), ctx.scale), None, None, None


# operators of torch's, so that tensors without data go through, and checkpointing knows the output as attention's


@torch.library.custom_op("lora_rm::tree_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: torch.Tensor,
    answer_lengths: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, sums = _like_outputs(query)
    _compute(scale, query, key, value, trees, answer_lengths, output, sums)
    return output, sums


@_forward.register_fake
def _like_outputs(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("lora_rm::tree_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: torch.Tensor,
    answer_lengths: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    gradient: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _like_inputs(query, key, value)
    _compute(scale, query, key, value, trees, answer_lengths, output, sums, gradient, *gradients)
    return gradients


@_backward.register_fake
def _like_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_INPUTS = "query", "key", "value", "trees", "answer_lengths"
_TENSORS = *_INPUTS, "output", "sums", "gradient", "of_query", "of_key", "of_value"


class _Job(ctypes.Structure):
    """`Job` of the C file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int32) for name in ("num_trees", "heads", "groups")),
        ("scale", ctypes.c_float),
        ("own", ctypes.c_int64 * 2),
    )


def _compute(scale: float, *tensors: torch.Tensor) -> None:
    """Computes a pass; tensors in the order of `_TENSORS`, of the forward pass without the last four."""
    query, key, _, trees, *_ = tensors
    job = _Job(
        *(x.data_ptr() for x in tensors),
        num_trees=len(trees),
        heads=query.shape[1],
        groups=key.shape[1],
        scale=scale,
    )
    if library(SOURCE, f"D={query.shape[2]}").compute(ctypes.byref(job), torch.get_num_threads()):
        raise RuntimeError("can't allocate memory for the keys of one tree")  # as torch says it


def is_to_be_had(heads: int, groups: int, size: int) -> bool:
    """Whether attention can be compiled here for so many heads, that share keys in groups, of a size; the first time takes seconds."""
    if not has_instructions() or size % 16 or heads > MOST_SHARED * groups:
        return False
    if size not in _CHECKED:
        _CHECKED[size] = _is_exact(size)
    return _CHECKED[size]


def suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether queries, keys and values, (1, H, T, D) and twice (1, G, T, D), are what was compiled and checked; a model's config may tell other sizes."""
    are_of_type = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (query, key, value))
    return (
        are_of_type and _CHECKED.get(query.shape[-1], False) and query.shape[1] <= MOST_SHARED * key.shape[1]
    )


def _is_exact(size: int) -> bool:
    """Whether what was compiled gives what float32 gives, on two small trees with a stem; whatever mode asks, a plan's among them."""
    trees = Tree(0, 70, (30, 5)), Tree(105, 9, (40,), 4)
    try:
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            _check(TreePlan(trees, torch.tensor([99, 104, 153])).with_core("compiled"), size)
    except (OSError, RuntimeError) as error:
        say(f"Attention is computed by torch, which takes longer: {first_line(error, 160)}")
        return False
    return True


def _check(plan: TreePlan, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    length, heads = plan.trees[-1].end, (6, 2, 2)
    inputs = [torch.randn(1, count, length, size, generator=generator).bfloat16() for count in heads]
    hidden = torch.ones(length, length, dtype=torch.bool)
    for piece in plan.pieces:
        for start, end in (*piece.before, (piece.start, piece.end)):
            hidden[piece.start : piece.end, start:end] = False
    hidden |= torch.ones_like(hidden).triu(1)
    query, key, value = (x.float().requires_grad_() for x in inputs)
    scores = query @ key.repeat_interleave(3, 1).mT / size**0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(3, 1)).transpose(1, 2)
    direction = torch.randn(expected.shape, generator=generator).bfloat16()
    gradients = torch.autograd.grad(expected, (query, key, value), direction.float())
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    found = compiled_attention(query, key, value, plan, size**-0.5)
    our_gradients = torch.autograd.grad(found, (query, key, value), direction)
    for one, other in zip((found, *our_gradients), (expected, *gradients), strict=True):
        off = float((one - other).detach().norm() / other.detach().norm())
        if not off < 2**-7:  # bfloat16 rounds by 2^-9
            raise RuntimeError(f"what was compiled is {off:.1e} off")
