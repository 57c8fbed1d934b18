"""Trees of token ids -> batches under a token budget -> the tensors of one packed row."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from lora_rm.data.tokens import TokenTree

Batching = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class Tree:
    """Where one preference lies in the row, in tokens."""

    start: int
    prompt_length: int
    answer_lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first token after the tree."""
        return self.start + self.prompt_length + sum(self.answer_lengths)


@dataclass
class TreePlan:
    """All that the attention must know of a row; made once a batch, read by every layer."""

    trees: tuple[Tree, ...]
    num_calls: int = 0
    masks: dict[tuple[int, int, int | None, torch.device], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the row's pieces: every prompt with its first answer, then each further answer."""
        return [
            length + (tree.prompt_length if number == 0 else 0)
            for tree in self.trees
            for number, length in enumerate(tree.answer_lengths)
        ]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Which of the keys the last `queries` positions may see, (Q, K) booleans, kept for the next layer."""
        key = (queries, keys, window, device)
        if key not in self.masks:
            query_position = torch.arange(keys - queries, keys, device=device)[:, None]
            distance = query_position - torch.arange(keys, device=device)[None, :]
            allowed = distance >= 0
            self.masks[key] = allowed & (distance < window) if window else allowed
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """N preferences with R answers in all, in one row of T tokens.

    Two trees, of two answers and of one:

        input_ids     p p p | a a | b | q | c c
        position_ids  0 1 2   3 4   3   0   1 2
        score_index           ^4    ^5       ^8      R = 3: the last token of every answer
    """

    preferences: tuple[TokenTree, ...]
    """The N preferences, in the order of their answers' rewards."""

    input_ids: torch.Tensor
    """Token ids, (1, T) int64; (R, S) in a padded batch."""

    position_ids: torch.Tensor
    """Position of each token in its own conversation, the shape of input_ids."""

    score_index: torch.Tensor
    """Index of each answer's last token in the flattened input_ids, (R,) int64."""

    plan: TreePlan | None
    """Where the trees lie; None in a padded batch."""

    attention_mask: torch.Tensor | None = None
    """Of a padded batch: 1 for tokens, 0 for padding, (R, S)."""

    def to(self, device: torch.device) -> "TreeBatch":
        """The same batch with its tensors on another device."""
        mask = self.attention_mask
        return TreeBatch(
            self.preferences,
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.score_index.to(device, non_blocking=True),
            self.plan,
            None if mask is None else mask.to(device, non_blocking=True),
        )


def build_batch(preferences: Sequence[TokenTree], batching: Batching = "shared") -> TreeBatch:
    """Puts preferences into one row.

    Args:
        preferences: Trees; answers keep their order.
        batching: `shared`: a prompt stands once, before its answers. `packed`: every answer has its own copy
            of the prompt. `padded`: one row an answer, padded on the right, for models without tree attention.
    """
    if batching == "padded":
        return _padded(preferences)
    ids: list[int] = []
    positions: list[int] = []
    score_index: list[int] = []
    trees: list[Tree] = []
    for preference in preferences:
        prompt = preference.prompt_ids
        groups = (
            [preference.answer_ids]
            if batching == "shared"
            else [(answer,) for answer in preference.answer_ids]
        )
        for answers in groups:
            trees.append(Tree(len(ids), len(prompt), tuple(len(answer) for answer in answers)))
            ids += prompt
            positions += range(len(prompt))
            for answer in answers:
                ids += answer
                positions += range(len(prompt), len(prompt) + len(answer))
                score_index.append(len(ids) - 1)
    return TreeBatch(
        tuple(preferences),
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(score_index),
        TreePlan(tuple(trees)),
    )


def _padded(preferences: Sequence[TokenTree]) -> TreeBatch:
    rows = [preference.prompt_ids + answer for preference in preferences for answer in preference.answer_ids]
    longest = max(map(len, rows))
    # 0 is as good as any padding id: no token sees what stands on its right, and rewards are read by index
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return TreeBatch(
        tuple(preferences),
        input_ids,
        torch.arange(longest).expand(len(rows), longest),
        torch.arange(len(rows)) * longest + lengths - 1,
        None,
        (torch.arange(longest)[None, :] < lengths[:, None]).long(),
    )


def num_tokens(preference: TokenTree, batching: Batching) -> int:
    """Tokens that a preference takes in a row (in a padded batch: without padding)."""
    answers = sum(map(len, preference.answer_ids))
    copies = 1 if batching == "shared" else len(preference.answer_ids)
    return copies * len(preference.prompt_ids) + answers


def microbatches(
    preferences: Sequence[TokenTree], budget: int, batching: Batching = "shared"
) -> list[list[TokenTree]]:
    """Cuts preferences into rows of at most `budget` tokens, never through a preference.

    Rows are filled evenly: with n rows needed, each gets about a n-th of the tokens, so that the last one is
    no crumb. A preference larger than the budget gets a row of its own. In padded batches the cost counted
    is that of the padded row.
    """
    ordered = sorted(preferences, key=lambda p: num_tokens(p, batching), reverse=True)
    if batching == "padded":
        return _padded_rows(ordered, budget)
    alone = [[preference] for preference in ordered if num_tokens(preference, batching) > budget]
    ordered = ordered[len(alone) :]
    total = sum(num_tokens(preference, batching) for preference in ordered)
    num_rows = -(-total // budget)
    while ordered:
        rows: list[list[TokenTree]] = [[] for _ in range(num_rows)]
        loads = [0] * num_rows
        for preference in ordered:  # longest first, each into the emptiest row (Graham 1969)
            emptiest = loads.index(min(loads))
            rows[emptiest].append(preference)
            loads[emptiest] += num_tokens(preference, batching)
        if max(loads) <= budget or num_rows >= len(ordered):
            return alone + [row for row in rows if row]
        num_rows += 1
    return alone


def _padded_rows(ordered: Sequence[TokenTree], budget: int) -> list[list[TokenTree]]:
    rows: list[list[TokenTree]] = []
    answers, longest = 0, 0
    for preference in ordered:
        length = len(preference.prompt_ids) + max(map(len, preference.answer_ids))
        width = max(longest, length)
        if not rows or (answers + len(preference.answer_ids)) * width > budget:
            rows.append([])
            answers, width = 0, length
        rows[-1].append(preference)
        answers, longest = answers + len(preference.answer_ids), width
    return rows


def training_order(num_preferences: int, num_steps: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """The preferences of each optimizer step, by index.

    Every epoch is a new shuffle that depends on seed and epoch alone, so step n is the same list however the
    run came to it. An epoch's last step may be smaller: no preference is lost and none is seen twice.
    """
    step = epoch = 0
    while step < num_steps:
        order = list(range(num_preferences))
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        for start in range(0, num_preferences, per_step):
            if step == num_steps:
                return
            yield order[start : start + per_step]
            step += 1
        epoch += 1
