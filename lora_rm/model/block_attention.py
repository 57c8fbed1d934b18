"""Attention whose gradients are products over blocks of queries, for a CPU that multiplies in bfloat16.

torch's flash attention on a CPU runs at a fifth of such a machine's peak, and its backward pass takes three times the forward
one. Here the forward pass is torch's, piece by piece; the backward pass is five large products a block.

Shape letters as in tree_attention; R = H / G query heads share keys, and rows of a block are its queries, head by head.
"""

from typing import Any

import torch

from lora_rm.data.batches import TreePlan

BLOCK = 128
"""Queries a block. Of 64, 128, 256 and 512 the fastest or within 5 % of it for 150 to 1,500 tokens, nine heads of 64."""


def block_attention(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, plan: TreePlan, scale: float
) -> torch.Tensor:
    """Causal attention of every piece of a row to what it sees, (1, T, H, D).

    Dao et al. 2022 (arXiv 2205.14135), Algorithm 4: for a gradient dO of the output O, with the log-sum-exp L of each row of
    scores s Q K^T,

        P = exp(s Q K^T - L)        dS = P * (dO V^T - rowsum(dO * O))
        dQ = s dS K                 dK = s dS^T Q                 dV = P^T dO

    What is subtracted stands as further columns of the factors, and so is subtracted in the product's float32 sums, before they
    are rounded. P is then off by 2^-9 |log P| of itself, where scores rounded alone would make it off by 2^-9 |score|.
    """
    output: torch.Tensor = _BlockAttention.apply(query_1HTD, key_1GTD, value_1GTD, plan, scale)
    return output


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan, scale: float
    ) -> torch.Tensor:
        _, heads, length, _ = query.shape
        output = query.new_empty(1, length, heads, value.shape[-1])
        sums = query.new_empty(length, heads, dtype=torch.float32)
        for piece in plan.pieces:
            own, seen = slice(piece.start, piece.end), piece.num_keys
            found, found_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, own],
                piece.seen(key, dim=2),
                piece.seen(value, dim=2),
                is_causal=not piece.before,
                attn_mask=plan.mask(piece.length, seen, None, query) if piece.before else None,
                scale=scale,
            )
            output[:, own], sums[own] = found.transpose(1, 2), found_sums[0].T
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        _, heads, length, size = query.shape
        groups, dtype = key.shape[1], query.dtype
        shared = heads // groups
        ahead = (gradient[0] * output[0]).sum(-1, dtype=torch.float32)
        # (G, T R, D + 2)
        queries = _widened(query[0].transpose(0, 1), sums / -ctx.scale, groups)
        gradients = _widened(gradient[0], -ahead, groups)
        keys, values = (torch.cat((x[0], x.new_ones(*x.shape[1:3], 2)), dim=-1) for x in (key, value))
        of_query = query.new_empty(length, groups, shared, size)
        of_key, of_value = (x.new_zeros(x.shape[1:], dtype=torch.float32) for x in (key, value))
        for piece in ctx.plan.pieces:
            seen_keys, seen_values = piece.seen(keys, dim=1), piece.seen(values, dim=1)
            for start in range(piece.start, piece.end, BLOCK):
                end = min(start + BLOCK, piece.end)
                seen, own = piece.num_keys - (piece.end - end), end - start
                rows = slice(start * shared, end * shared)
                row, row_gradient = queries[:, rows], gradients[:, rows]
                weights = _product(row, seen_keys[:, :seen].mT, ctx.scale)
                # what comes after a query, among the block's own keys
                mask = ctx.plan.mask(own, own, None, weights)[:, None]
                weights.unflatten(1, (own, shared))[..., seen - own :].add_(mask)
                weights.exp_()
                of_scores = torch.bmm(row_gradient, seen_values[:, :seen].mT).mul_(weights)
                of_row = _product(of_scores, seen_keys[:, :seen, :size], ctx.scale)
                of_query[start:end] = of_row.unflatten(1, (own, shared)).transpose(0, 1)
                of_seen_keys = _product(of_scores.mT, row[..., :size], ctx.scale)
                of_seen_values = torch.bmm(weights.mT, row_gradient[..., :-2])
                ranges = (*piece.before, (piece.start, end))
                lengths = [stop - begin for begin, stop in ranges]
                for total, part in ((of_key, of_seen_keys), (of_value, of_seen_values)):
                    for (begin, stop), x in zip(ranges, part.split(lengths, dim=1), strict=True):
                        total[:, begin:stop].add_(x)
        of_query = of_query.flatten(1, 2).transpose(0, 1)
        return of_query[None], of_key.to(dtype)[None], of_value.to(dtype)[None], None, None


def _widened(x_THD: torch.Tensor, more_TH: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows of (G, T R, D + 2) that end with a float32 number, which two columns of 16 bits hold to 16."""
    length, heads, size = x_THD.shape
    wide = x_THD.new_empty(groups, length, heads // groups, size + 2)
    by_group = wide.transpose(0, 1)
    more = more_TH.unflatten(1, (groups, -1))
    by_group[..., :size] = x_THD.unflatten(1, (groups, -1))
    by_group[..., size] = more
    by_group[..., size + 1] = more - by_group[..., size]
    return wide.flatten(1, 2)


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)
