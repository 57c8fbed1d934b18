"""Attention over a packed row of trees: each prompt is computed once and seen by all of its answers.

A row holds trees one after another; a tree is a prompt followed by its K answers. A token sees the prompt of
its tree and its own answer up to itself, at the positions it has in its own conversation, so every hidden
state equals that of the separate conversation and autograd adds the answers' gradients in the prompt.

    row        [ p p p p | a a a | b b ][ q q | c c c | d ]
    position     0 1 2 3   4 5 6   4 5    0 1   2 3 4   2

The plan travels as the model kwarg `tree_plan` down to the attention function, so it is still there when
checkpointing recomputes a layer. Published for DPO by Wang and Hegde 2024 (arXiv 2410.20305).

Shape letters: T tokens of the row, H query heads, G key-value heads, D head size, Q queries, K keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from lora_rm.data.batches import TreePlan

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
    tree_plan.num_calls += 1
    # split, not slices: the backward pass of a slice fills a tensor as long as the row, for every answer
    parts = [x.split(tree_plan.lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD)]
    pieces = zip(*parts, strict=True)
    outputs = []
    for tree in tree_plan.trees:
        prompt = tree.prompt_length
        for number, (query, key, value) in zip(range(len(tree.answer_lengths)), pieces, strict=False):
            if number == 0:  # prompt and first answer in one piece: the prompt's outputs come with it
                shared_key, shared_value = key[:, :, :prompt], value[:, :, :prompt]
            else:
                key = torch.cat((shared_key, key), dim=2)
                value = torch.cat((shared_value, value), dim=2)
            outputs.append(_attend(query, key, value, tree_plan, scaling, dropout, sliding_window, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(
    query_1HQD: torch.Tensor,
    key_1GKD: torch.Tensor,
    value_1GKD: torch.Tensor,
    plan: TreePlan,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The last Q of K positions attend to the K, causally, (1, H, Q, D)."""
    queries, keys = query_1HQD.shape[2], key_1GKD.shape[2]
    if window is not None and window >= keys:
        window = None
    if softcap is not None:  # scaled_dot_product_attention cannot express it
        return _softcapped(query_1HQD, key_1GKD, value_1GKD, plan, scaling, dropout, window, softcap)
    is_causal = queries == keys and window is None
    mask = None if is_causal else plan.mask(queries, keys, window, query_1HQD.device)
    return F.scaled_dot_product_attention(
        query_1HQD,
        key_1GKD,
        value_1GKD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query_1HQD.shape[1] != key_1GKD.shape[1],
    )


def _softcapped(
    query_1HQD: torch.Tensor,
    key_1GKD: torch.Tensor,
    value_1GKD: torch.Tensor,
    plan: TreePlan,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are bent to softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, 2.2)."""
    groups = query_1HQD.shape[1] // key_1GKD.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key_1GKD, value_1GKD))
    scale = query_1HQD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_1HQK = softcap * torch.tanh(query_1HQD @ key.transpose(2, 3) * scale / softcap)
    mask = plan.mask(scores_1HQK.shape[2], scores_1HQK.shape[3], window, scores_1HQK.device)
    weights = torch.softmax(scores_1HQK.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(value.dtype), p=dropout) @ value


AttentionInterface.register(NAME, tree_attention)
