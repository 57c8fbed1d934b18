"""Attention whose gradients are products over blocks of queries, for a CPU that multiplies in bfloat16.

torch's flash attention on a CPU runs at a fifth to a third of such a machine's peak, and its backward pass takes three times the forward
one. Here the forward pass is torch's, piece by piece; the backward pass is three batches of products a block.

Shape letters as in tree_attention; R = H / G query heads share keys. A block's rows are its queries, each with its R heads.
"""

import math
from typing import Any

import torch

from lora_rm.data.batches import TreePlan

BLOCK = 128
"""Queries a block. A step in HH's lengths took least with 128 of 96, 128, 192 and 256, by less than a machine's drift."""


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
        groups = key.shape[1]
        shared = heads // groups
        # s is split into a power of two, by which Q is multiplied without rounding, and a factor of the products
        power = 2.0 ** math.floor(math.log2(ctx.scale))
        rest = ctx.scale / power
        # dO, Q and dO again, by groups: the first two meet V and K, the last two dS and P
        left = query.new_empty(3, groups, length, shared, size + 2)
        _put(left[0], gradient[0] / rest, (gradient[0] * output[0]).sum(-1, dtype=torch.float32) / -rest)
        _put(left[1], query[0].transpose(0, 1) * power, sums / -rest)
        left[2] = left[0]
        left = left.view(3 * groups, length * shared, size + 2)
        right = key.new_ones(2 * groups, length, size + 2)
        right[:groups, :, :size], right[groups:, :, :size] = value[0], key[0]
        of_query = query.new_empty(length, groups, shared, size)
        of_right = right.new_zeros(2 * groups, length, size, dtype=torch.float32)  # dK and dV
        for piece in ctx.plan.pieces:
            seen = piece.seen(right, dim=1)
            for start in range(piece.start, piece.end, BLOCK):
                end = min(start + BLOCK, piece.end)
                own, keys = end - start, piece.num_keys - (piece.end - end)
                rows = left[:, start * shared : end * shared]
                both = _product(rows[: 2 * groups], seen[:, :keys].mT, rest)
                of_scores, weights = both[:groups], both[groups:]
                mask = ctx.plan.mask(own, own, None, both)[:, None]  # of the block's own keys
                weights.unflatten(1, (own, shared))[..., keys - own :].add_(mask)
                of_scores.mul_(weights.exp_())
                of_rows = _product(of_scores, seen[groups:, :keys, :size], rest)
                of_query[start:end] = of_rows.unflatten(1, (own, shared)).transpose(0, 1)
                # without the two further columns: of 64 a product takes 0.83 of the time of 66
                of_seen = torch.bmm(both.mT, rows[groups:, :, :size])
                done = 0
                for first, stop in (*piece.before, (piece.start, end)):
                    of_right[:, first:stop].add_(of_seen[:, done : done + stop - first])
                    done += stop - first
        of_key, of_value = of_right.mul_(rest).to(query.dtype).split(groups)
        return (
            of_query.mul_(power).flatten(1, 2).transpose(0, 1)[None],
            of_key[None],
            of_value[None],
            None,
            None,
        )


def _put(wide_GTRD: torch.Tensor, x_THD: torch.Tensor, more_TH: torch.Tensor) -> None:
    """Writes rows that end with a float32 number, which two columns of 16 bits hold to 16."""
    wide, size = wide_GTRD.transpose(0, 1), x_THD.shape[-1]
    x, more = (y.unflatten(1, wide.shape[1:3]) for y in (x_THD, more_TH))
    wide[..., :size], wide[..., size] = x, more
    wide[..., size + 1] = more - wide[..., size]


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The products of a batch times the scale, which in the same operation costs 5 to 10 %."""
    if scale == 1.0:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)
