"""Attention over a packed row of trees: each prompt is computed once and seen by all of its answers.

A row holds trees one after another; a tree is a prompt followed by its K answers. What all prompts of a row begin
with, such as a system prompt, is the row's stem: it stands once, in the first tree. A token sees the stem, the prompt
of its tree and its own answer up to itself, at the positions it has in its own conversation, so every hidden state
equals that of the separate conversation and autograd adds the gradients of all that saw it.

    row        [ s s p p | a a a | b b ][ q q | c c c | d ]
    position     0 1 2 3   4 5 6   4 5    2 3   4 5 6   4

The plan travels as the model kwarg `tree_plan` down to the attention function, so it is still there when
checkpointing recomputes a layer. Published for DPO by Wang and Hegde 2024 (arXiv 2410.20305).

Shape letters: T tokens of the row, H query heads, G key-value heads, D head size, Q queries, K keys.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from lora_rm.data.batches import Core, Tree, TreePlan
from lora_rm.model.block_attention import block_attention
from lora_rm.model.cpu_attention import compiled_attention, suits
from lora_rm.model.quantization import autocast_dtype

NAME = "lora_rm_tree"
"""Name under which the attention is registered with transformers.

The mask interface has no function of this name, so transformers builds no mask: a dense T x T one would cost
more than sharing gains.
"""


def tree_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers passes it by position
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_plan: TreePlan | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in the form that transformers calls; returns (1, T, H, D).

    A sliding window counts along the answer's own conversation, as it would in a separate row.

    Raises:
        NotImplementedError: If the model wants what this cannot do exactly (attention sinks, no causal mask)
            or does not pass the plan down. The check at the start then chooses padded batches.
    """
    if tree_plan is None or s_aux is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError("tree attention: no plan, attention sinks, or attention that is not causal")
    tree_plan.calls.append(
        (len(tree_plan.ends) if tree_plan.only_ends else query_1HTD.shape[2], sliding_window)
    )
    how = _How(tree_plan, scaling, dropout, sliding_window, softcap)
    # of one layer only the ends are wanted; these two compute all queries there, for a call an answer takes longer
    if tree_plan.core == "gathered" and softcap is None:
        return _gathered(query_1HTD, key_1GTD, value_1GTD, how), None
    if tree_plan.core == "varlen" and softcap is None and not dropout:  # the kernel has no dropout
        return _varlen(query_1HTD, key_1GTD, value_1GTD, how), None
    if tree_plan.only_ends:
        return _at_ends(query_1HTD, key_1GTD, value_1GTD, how), None
    if tree_plan.core in ("blocks", "compiled"):
        # to one type, as autocast does for torch's function; rotary positions in float32 leave queries and keys in it
        dtype = autocast_dtype(value_1GTD, value_1GTD.dtype)
        rows = query_1HTD.to(dtype), key_1GTD.to(dtype), value_1GTD.to(dtype)
        if _is_plain(*rows, how):
            if tree_plan.core == "compiled":
                return compiled_attention(*rows, tree_plan, how.scale(query_1HTD)), None
            if torch.is_grad_enabled():  # the forward pass is that of `answers`
                return block_attention(*rows, tree_plan, how.scale(query_1HTD)), None
    # split, not slices: the backward pass of a slice fills a tensor as long as the row, for every answer
    queries, keys, values = (x.split(tree_plan.lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD))
    outputs = [_attend(q, k, v, how) for q, k, v in _answers(queries, keys, values, tree_plan)]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of a GPU. cuDNN's, which torch prefers on an H200, is built anew for each pair of lengths: seconds a row."""


class _How(NamedTuple):
    """What the layer wants of the attention."""

    plan: TreePlan
    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None

    def scale(self, query: torch.Tensor) -> float:
        """What scores are multiplied with."""
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


Pieces = Sequence[torch.Tensor]


def _answers(
    queries: Pieces, keys: Pieces, values: Pieces, plan: TreePlan
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every answer's queries, and the keys and values of stem, prompt and itself."""
    pieces = zip(queries, keys, values, strict=True)
    stem = plan.trees[-1].stem_length
    of_stem = keys[0][:, :, :stem], values[0][:, :, :stem]
    for tree in plan.trees:
        shared = of_stem if tree.stem_length else None
        for number, (query, key, value) in zip(range(len(tree.answer_lengths)), pieces, strict=False):
            if shared:
                key, value = torch.cat((shared[0], key), dim=2), torch.cat((shared[1], value), dim=2)
            if number == 0:  # prompt and first answer in one piece: the prompt's outputs come with it
                prompt = tree.stem_length + tree.prompt_length
                shared = key[:, :, :prompt], value[:, :, :prompt]
            yield query, key, value


def _at_ends(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, how: _How
) -> torch.Tensor:
    """Outputs of every answer's last token, zeros elsewhere, (1, T, H, D)."""
    plan = how.plan
    queries = query_1HTD.index_select(2, plan.ends).split(1, dim=2)
    keys, values = (x.split(plan.lengths, dim=2) for x in (key_1GTD, value_1GTD))
    outputs = [_attend(q, k, v, how) for q, k, v in _answers(queries, keys, values, plan)]
    found_1AHD = torch.cat(outputs, dim=2).transpose(1, 2)
    _, heads, length, _ = query_1HTD.shape
    empty = found_1AHD.new_zeros(1, length, heads, found_1AHD.shape[-1])
    return empty.index_copy(1, plan.ends, found_1AHD)


def _is_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: _How) -> bool:
    """Whether the cores of a CPU take these as they are, and nothing but causality is asked for."""
    has_no_more = how.softcap is None and not how.dropout
    has_window = how.window is not None and how.window < how.plan.longest[1]
    is_even = all(x.stride(-1) == 1 and x.shape[-1] == query.shape[-1] for x in (query, key, value))
    is_compiled = how.plan.core == "blocks" or suits(query, key, value)
    return has_no_more and not has_window and is_even and is_compiled


def _gathered(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    how: _How,
) -> torch.Tensor:
    """All conversations side by side in one causal call: what stands behind an end is seen by no query."""
    conversations, places = how.plan.indices["conversations"], how.plan.indices["places"]
    query_AHSD, key_AGSD, value_AGSD = (
        x[0].transpose(0, 1)[conversations].transpose(1, 2) for x in (query_1HTD, key_1GTD, value_1GTD)
    )
    output_AHSD = _attend(query_AHSD, key_AGSD, value_AGSD, how)
    return output_AHSD.transpose(1, 2).flatten(0, 1).index_select(0, places)[None]


def _varlen(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    how: _How,
) -> torch.Tensor:
    """One flash-attention call in which every answer has its own numbers of queries and keys.

    The last query of an answer stands at its last key (causal from the lower right). The kernel takes 16 bits and one
    type; autocast does not know it, and rotary positions held in float32 leave queries and keys in float32.
    """
    from torch.nn.attention.varlen import varlen_attn

    dtype = autocast_dtype(value_1GTD, value_1GTD.dtype)
    # squeezed: the gradient of x[0] would be filled into a tensor of zeros
    query_THD, key_TGD, value_TGD = (
        x.squeeze(0).transpose(0, 1).to(dtype) for x in (query_1HTD, key_1GTD, value_1GTD)
    )
    keys = how.plan.indices["keys"]
    most_queries, most_keys = how.plan.longest
    output_THD: Any = varlen_attn(
        query_THD.contiguous(),
        key_TGD[keys],  # whose gradient is summed in a fixed order; that of index_select is not
        value_TGD[keys],
        how.plan.indices["query_starts"],
        how.plan.indices["key_starts"],
        most_queries,
        most_keys,
        scale=how.scaling,
        window_size=(-1 if how.window is None else how.window - 1, 0),
        **_asks_for_groups(varlen_attn),
    )
    return output_THD[None]


@functools.cache
def _asks_for_groups(varlen_attn: Any) -> dict[str, Any]:
    """The argument that allows query heads to share keys: since torch 2.13; before it the kernel was not asked and could."""
    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _has_flash(query_1HQD: torch.Tensor) -> bool:
    """Whether flash attention, which has no masks, computes this type and head size on this card: Ampere or newer."""
    is_new = _capability(query_1HQD.device) >= (8, 0)
    return is_new and query_1HQD.dtype != torch.float32 and query_1HQD.shape[-1] <= 256


_capability = functools.cache(torch.cuda.get_device_capability)


def _attend(
    query_1HQD: torch.Tensor,
    key_1GKD: torch.Tensor,
    value_1GKD: torch.Tensor,
    how: _How,
) -> torch.Tensor:
    """The last Q of K positions attend to the K, causally, (1, H, Q, D)."""
    queries, keys = query_1HQD.shape[2], key_1GKD.shape[2]
    if how.softcap is not None:  # scaled_dot_product_attention cannot express it
        # its Q x K scores, computed again in the backward pass, do not wait for it
        return checkpoint(
            _softcapped,
            query_1HQD,
            key_1GKD,
            value_1GKD,
            how,
            use_reentrant=False,
            preserve_rng_state=how.dropout > 0,
        )
    window = how.window if how.window is not None and how.window < keys else None
    is_causal = queries == keys and window is None
    sees_all = queries == 1 and window is None
    mask = None if is_causal or sees_all else how.plan.mask(queries, keys, window, query_1HQD)
    groups = query_1HQD.shape[1] // key_1GKD.shape[1]
    if groups > 1 and query_1HQD.is_cuda and (mask is not None or not _has_flash(query_1HQD)):
        # the next best kernel has no groups: torch would take the one that writes down all Q x K scores
        key_1GKD, value_1GKD = (x.repeat_interleave(groups, dim=1) for x in (key_1GKD, value_1GKD))
    with sdpa_kernel(KERNELS) if query_1HQD.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            query_1HQD,
            key_1GKD,
            value_1GKD,
            attn_mask=mask,
            dropout_p=how.dropout,
            is_causal=is_causal,
            scale=how.scaling,
            enable_gqa=query_1HQD.shape[1] != key_1GKD.shape[1],
        )


def _softcapped(
    query_1HQD: torch.Tensor,
    key_1GKD: torch.Tensor,
    value_1GKD: torch.Tensor,
    how: _How,
) -> torch.Tensor:
    """Attention whose scores are bent to softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, 2.2)."""
    groups = query_1HQD.shape[1] // key_1GKD.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key_1GKD, value_1GKD))
    assert how.softcap is not None
    scores_1HQK = how.softcap * torch.tanh(
        query_1HQD @ key.transpose(2, 3) * how.scale(query_1HQD) / how.softcap
    )
    mask = how.plan.mask(query_1HQD.shape[2], key.shape[2], how.window, scores_1HQK)
    weights = torch.softmax(scores_1HQK + mask, dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(value.dtype), p=how.dropout) @ value


AttentionInterface.register(NAME, tree_attention)


@torch.enable_grad()
def time_cores(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int
) -> dict[Core, float]:
    """Seconds of a forward and a backward pass of every core that is exact on a device, on a row of random values.

    Args:
        device: On a CPU nothing is chosen by time, see `RewardModel.exact_cores`.
        dtype: Of queries, keys and values; varlen needs a 16-bit one and CUDA.
        heads: Query heads.
        groups: Key-value heads.
        size: Of a head.
    """
    trees, start = [], 0
    for number in range(16):
        trees.append(Tree(start, 160 + 7 * number, (60 + number, 90 - number)))
        start = trees[-1].end
    ends = torch.tensor([tree.end - 1 for tree in trees])
    plan, move = TreePlan(tuple(trees), ends), functools.partial(torch.Tensor.to, device=device)
    shapes = [(1, count, start, size) for count in (heads, groups, groups)]
    generator = torch.Generator(device).manual_seed(0)  # a resumed run has its random state restored already
    inputs = [
        torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()
        for shape in shapes
    ]
    query, key, value = (x.detach().float() for x in inputs)
    exact, _ = tree_attention(torch.nn.Module(), query, key, value, None, tree_plan=plan.mapped(move))
    step = torch.finfo(dtype).eps
    seconds: dict[Core, float] = {}
    for core in ("answers", "gathered", "varlen"):
        own = plan.with_core(core).mapped(move)
        try:
            runs = [_run(inputs, own) for _ in range(5)]
        except (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError):
            if core == "answers":
                raise
            continue
        if float((runs[0][0].float() - exact).abs().max()) <= 8 * step * float(exact.abs().max()):
            seconds[core] = min(taken for _, taken in runs)
    return seconds


def _run(inputs: Sequence[torch.Tensor], plan: TreePlan) -> tuple[torch.Tensor, float]:
    """Output of the attention, and the seconds of a forward and a backward pass."""
    query, key, value = inputs
    synchronize = torch.get_device_module(query.device).synchronize
    synchronize()
    started = time.perf_counter()
    output, _ = tree_attention(torch.nn.Module(), query, key, value, None, tree_plan=plan)
    output.sum().backward()
    synchronize()
    return output.detach(), time.perf_counter() - started


class LastLayer:
    """Spares the last layer what nobody reads.

    Rewards are read at the answers' ends. The last layer needs keys and values of every token, but queries,
    output projection and MLP only there: about one layer's work less of 30. Other rows of its output are
    not the model's.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        """Hooks into the layer; `remove` takes the hooks out again."""
        self.ends: torch.Tensor | None = None
        self.length = 0
        self.handles = []
        for name, module in layer.named_modules():
            # hooks of the layer itself would stay outside of what checkpointing computes again
            if name in ("self_attn", "attn"):
                self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            elif name in ROW_WISE:
                self.handles += [
                    module.register_forward_pre_hook(self._select),
                    module.register_forward_hook(self._put_back),
                ]

    def remove(self) -> None:
        """Puts the layer back as it was."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Notes where the ends are and tells the attention that only they are wanted."""
        plan: TreePlan | None = kwargs.get("tree_plan")
        self.ends = None if plan is None else plan.ends
        return args, kwargs if plan is None else {**kwargs, "tree_plan": replace(plan, only_ends=True)}

    def _select(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.ends is None or not args:  # called by keyword: lengths then differ, and the check says no
            return args
        self.length = args[0].shape[1]
        return (args[0].index_select(1, self.ends), *args[1:])

    def _put_back(self, _: torch.nn.Module, __: Any, output: Any) -> Any:
        if self.ends is None:
            return output
        rows, *rest = output if isinstance(output, tuple) else (output,)
        empty = rows.new_zeros(rows.shape[0], self.length, rows.shape[2])
        whole = empty.index_copy(1, self.ends, rows)
        return (whole, *rest) if isinstance(output, tuple) else whole


ROW_WISE = {"self_attn.q_proj", "self_attn.o_proj", "attn.c_proj", "mlp"}
"""Parts of a decoder layer, by the names they have in transformers, that treat every token alone."""
