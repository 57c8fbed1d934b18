"""Trees of token ids -> batches under a token budget -> the tensors of one packed row."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from lora_rm.data.tokens import TokenTree, common_length

Batching = Literal["shared", "packed", "padded"]
Core = Literal["answers", "blocks", "compiled", "gathered", "varlen"]


@dataclass(frozen=True, slots=True)
class Tree:
    """Where one preference lies in the row, in tokens."""

    start: int
    prompt_length: int
    answer_lengths: tuple[int, ...]

    stem_length: int = 0
    """Tokens at the row's start that come before the tree's own in its conversations; 0 where the tree is first."""

    @property
    def end(self) -> int:
        """The first token after the tree."""
        return self.start + self.prompt_length + sum(self.answer_lengths)


class Piece(NamedTuple):
    """Neighbours in the row that one attention call can take, and what else they see: a prompt with its first answer, or a further answer."""

    start: int
    end: int

    before: tuple[tuple[int, int], ...]
    """Start and end of the stem and of the prompt, where these are not in the piece itself."""

    @property
    def length(self) -> int:
        """Its queries."""
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        """All that its last token sees."""
        return self.length + sum(end - start for start, end in self.before)

    def seen(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What stands in the row, along a dimension, for the tokens that the piece sees."""
        own = x.narrow(dim, self.start, self.length)
        if not self.before:
            return own
        return torch.cat([*(x.narrow(dim, start, end - start) for start, end in self.before), own], dim)


@dataclass(frozen=True)
class TreePlan:
    """All that the attention must know of a row; made once a batch, read by every layer."""

    trees: tuple[Tree, ...]

    ends: torch.Tensor
    """Index in the row of the last token of every answer, tree by tree, (A,) int64."""

    core: Core = "answers"
    """How the attention is computed; see lora_rm.model.tree_attention."""

    only_ends: bool = False
    """Whether only the ends' outputs are wanted, as in the last layer."""

    indices: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the cores `compiled`, `gathered` and `varlen` look up; see `with_core`."""

    calls: list[tuple[int, int | None]] = field(default_factory=list)
    """One entry for every layer that has attended by this plan: its number of queries, and its sliding window."""

    masks: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every prompt with its first answer, then each further answer."""
        pieces = []
        for tree in self.trees:
            before = ((0, tree.stem_length),) if tree.stem_length else ()
            start, prompt_end = tree.start, tree.start + tree.prompt_length
            end = prompt_end
            for number, length in enumerate(tree.answer_lengths):
                end += length
                pieces.append(Piece(start, end, before))
                if number == 0 and tree.prompt_length:
                    before = (*before, (start, prompt_end))
                start = end
        return pieces

    @cached_property
    def lengths(self) -> list[int]:
        """Of the pieces."""
        return [piece.length for piece in self.pieces]

    def mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "TreePlan":
        """The same plan with its indices moved, to another device for instance."""
        indices = {name: move(tensor) for name, tensor in self.indices.items()}
        # masks are made where they are used, and go with the plan that needed them
        return replace(self, ends=move(self.ends), indices=indices, masks={})

    def with_core(self, core: Core) -> "TreePlan":
        """The same plan for another core, with what that core looks up.

        For `compiled`, of N trees, the longest first, and A answers in the row's order, int32:
            trees          (N, 5) start, stem length, prompt length, index of the first answer, number of answers
            answer_lengths (A,)
        For `gathered`, of A answers of at most S tokens each with its prompt:
            conversations  (A, S) index in the row of every conversation's tokens, again from its start behind its end
            places         (T,) where the row's tokens stand in the flattened conversations
        For `varlen`, of A answers:
            keys           (K,) index in the row of the keys that each answer's queries see, one after another
            query_starts, key_starts   (A + 1,) int32 where each answer's queries and keys begin
        """
        if core in ("answers", "blocks"):
            return replace(self, core=core, indices={})
        if core == "compiled":
            return replace(self, core=core, indices=self._tables())
        own = self.lengths
        tokens = torch.arange(self.trees[-1].end)
        rows = [piece.seen(tokens, dim=0) for piece in self.pieces]
        sizes = torch.tensor([len(row) for row in rows])
        if core == "varlen":
            begin = torch.zeros(1, dtype=torch.int32)
            indices = {
                "keys": torch.cat(rows),
                "query_starts": torch.cat((begin, torch.tensor(own).cumsum(0).int())),
                "key_starts": torch.cat((begin, sizes.cumsum(0).int())),
            }
            return replace(self, core=core, indices=indices)
        longest = int(sizes.max())
        places = [
            torch.arange(number * longest + len(row) - queries, number * longest + len(row))
            for number, (row, queries) in enumerate(zip(rows, own, strict=True))
        ]
        # filled up with the conversation again: one token for all would get the gradients of all, one after the other
        conversations = torch.stack([row[torch.arange(longest) % len(row)] for row in rows])
        return replace(self, core=core, indices={"conversations": conversations, "places": torch.cat(places)})

    def _tables(self) -> dict[str, torch.Tensor]:
        """The trees as numbers. The longest first: what is left at the end, when some threads have no more to do, is short."""
        rows, lengths = [], list[int]()
        for tree in self.trees:
            rows.append(
                (tree.start, tree.stem_length, tree.prompt_length, len(lengths), len(tree.answer_lengths))
            )
            lengths += tree.answer_lengths
        order = sorted(range(len(rows)), key=lambda number: self.trees[number].start - self.trees[number].end)
        return {
            "trees": torch.tensor([rows[number] for number in order], dtype=torch.int32),
            "answer_lengths": torch.tensor(lengths, dtype=torch.int32),
        }

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of an answer."""
        return max(self.lengths), max(piece.num_keys for piece in self.pieces)

    def mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """What to add to the scores of the last `queries` positions: 0 where a key is seen, else -inf, (Q, K).

        Of the type and on the device of `like`; kept for the next layer, which booleans would be turned into each time.
        """
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self.masks:
            query_position = torch.arange(keys - queries, keys, device=like.device)[:, None]
            distance = query_position - torch.arange(keys, device=like.device)[None, :]
            hidden = (distance < 0) | (distance >= (window or keys))
            self.masks[key] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """N preferences with R answers in all, in one row of T tokens.

    Two trees, of two answers and of one, whose prompts s p p and s q begin with the same token:

        input_ids     s p p | a a | b | q | c c
        position_ids  0 1 2   3 4   3   1   2 3
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
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "TreeBatch":
        """The same batch in memory that a GPU copies from by itself."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "TreeBatch":
        mask, plan = self.attention_mask, self.plan
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            score_index=move(self.score_index),
            plan=None if plan is None else plan.mapped(move),
            attention_mask=None if mask is None else move(mask),
        )


def build_batch(
    preferences: Sequence[TokenTree], batching: Batching = "shared", core: Core = "answers"
) -> TreeBatch:
    """Puts preferences into one row.

    Args:
        preferences: Trees; rewards come in the order of their answers.
        batching: `shared`: a prompt stands once, before its answers, and preferences of one `group` are one
            tree, in which an answer that several of them name stands once too; what all prompts begin with, a system
            prompt most often, stands once at the row's start. `packed`: every answer has its own copy of the prompt.
            `padded`: one row an answer, padded on the right, for models without tree attention.
        core: How the attention will be computed.
    """
    if batching == "padded":
        return _padded(preferences)
    ids: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    ends: list[int] = []
    found: dict[tuple[int, int], int] = {}  # (preference, answer) -> index of its last token
    prompts_and_answers = list(_trees(preferences, batching))
    stem = _stem([prompt for prompt, _ in prompts_and_answers], batching)
    for prompt, answers in prompts_and_answers:
        before = stem if trees else 0
        trees.append(Tree(len(ids), len(prompt) - before, tuple(map(len, answers)), before))
        ids += prompt[before:]
        positions += range(before, len(prompt))
        for answer, named_by in answers.items():
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
            ends.append(len(ids) - 1)
            found |= dict.fromkeys(named_by, len(ids) - 1)
    return TreeBatch(
        tuple(preferences),
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([found[key] for key in sorted(found)]),
        TreePlan(tuple(trees), torch.tensor(ends)).with_core(core),
    )


Answers = dict[tuple[int, ...], list[tuple[int, int]]]
"""Of a tree: its different answers, and which (preference, answer) each of them is."""


def _trees(preferences: Sequence[TokenTree], batching: Batching) -> Iterator[tuple[list[int], Answers]]:
    """Every tree of a row: its prompt and its answers."""
    if batching == "packed":
        for number, preference in enumerate(preferences):
            for place, answer in enumerate(preference.answer_ids):
                yield preference.prompt_ids, {tuple(answer): [(number, place)]}
        return
    for family in families(p.group for p in preferences):
        members = [preferences[number] for number in family]
        prompt = members[0].prompt_ids
        if len(members) > 1:
            # each has its own longest common start; that of all is the shortest, or shorter where they part
            rows = [member.conversations()[0] for member in members]
            prompt = prompt[: min(common_length(rows), *(len(member.prompt_ids) for member in members))]
        answers: Answers = {}
        for number, member in zip(family, members, strict=True):
            rest = member.prompt_ids[len(prompt) :]
            for place, answer in enumerate(member.answer_ids):
                answers.setdefault((*rest, *answer), []).append((number, place))
        yield prompt, answers


def _stem(prompts: Sequence[list[int]], batching: Batching) -> int:
    """How many tokens all prompts begin with, which then stand once; 0 where nothing is shared."""
    return common_length(prompts) if batching == "shared" else 0


def families(groups: Iterable[str]) -> list[list[int]]:
    """Numbers of preferences, those of one group together, in the order of their first; "" is no group."""
    found: dict[str | int, list[int]] = {}
    for number, group in enumerate(groups):
        found.setdefault(group or number, []).append(number)
    return list(found.values())


def _padded(preferences: Sequence[TokenTree]) -> TreeBatch:
    rows = [row for preference in preferences for row in preference.conversations()]
    # 0 is as good as any padding id: no token sees what stands on its right, and rewards are read by index
    ids, mask = pad_rows(rows, 0)
    longest = len(ids[0])
    return TreeBatch(
        tuple(preferences),
        torch.tensor(ids),
        torch.arange(longest).repeat(len(rows), 1),  # expanded, it could not be pinned
        torch.arange(len(rows)) * longest + torch.tensor([len(row) for row in rows]) - 1,
        None,
        torch.tensor(mask),
    )


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int | None, *, left: float = 0.0, more: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one length, and their attention mask: 1 for tokens, 0 for padding.

    Args:
        rows: Token ids.
        pad: Id of the padding; None: each row's own first token.
        left: Share of a row's padding that stands before it.
        more: Padding of the longest row.
    """
    length = max(map(len, rows)) + more
    ids, mask = [], []
    for row in rows:
        filler = row[0] if pad is None else pad
        before = round((length - len(row)) * left)
        after = length - len(row) - before
        ids.append([filler] * before + list(row) + [filler] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
    return ids, mask


def num_tokens(preferences: Sequence[TokenTree], batching: Batching) -> int:
    """Tokens that preferences take in a row (in a padded batch: without padding)."""
    if batching == "padded":
        return sum(len(p.prompt_ids) * len(p.answer_ids) + sum(map(len, p.answer_ids)) for p in preferences)
    trees = list(_trees(preferences, batching))
    spared = (len(trees) - 1) * _stem([prompt for prompt, _ in trees], batching)
    return sum(len(prompt) + sum(map(len, answers)) for prompt, answers in trees) - spared


def microbatches(
    preferences: Sequence[TokenTree], budget: int, batching: Batching = "shared", at_least: int = 1
) -> list[list[TokenTree]]:
    """Cuts preferences into rows of at most `budget` tokens, never through a preference.

    Rows are filled evenly: with n rows needed, each gets about a n-th of the tokens, so that the last one is
    no crumb. Preferences of one group stay together where they fit; a preference larger than the budget gets
    a row of its own. In padded batches the cost counted is that of the padded row. With enough families
    there are `at_least` so many rows, as that many processes need (not in padded batches).
    """
    if batching == "padded":
        return _padded_rows(
            sorted(preferences, key=lambda p: num_tokens([p], batching), reverse=True), budget
        )
    together = (
        families(p.group for p in preferences)
        if batching == "shared"
        else [[n] for n in range(len(preferences))]
    )
    pieces = [
        piece
        for family in together
        for piece in _fitting([preferences[number] for number in family], budget, batching)
    ]
    stem = _stem([preference.prompt_ids for preference in preferences], batching)
    budget -= stem  # any row has at least these tokens in common, and they count once
    ordered = sorted(((num_tokens(piece, batching) - stem, piece) for piece in pieces), key=lambda x: -x[0])
    alone = [piece for cost, piece in ordered if cost > budget]
    ordered = ordered[len(alone) :]
    num_rows = max(
        -(-sum(cost for cost, _ in ordered) // max(1, budget)), min(at_least - len(alone), len(ordered)), 1
    )
    while ordered:
        rows: list[list[TokenTree]] = [[] for _ in range(num_rows)]
        loads = [0] * num_rows
        for cost, piece in ordered:  # longest first, each into the emptiest row (Graham 1969)
            emptiest = loads.index(min(loads))
            rows[emptiest] += piece
            loads[emptiest] += cost
        if max(loads) <= budget or num_rows >= len(ordered):
            return alone + [row for row in rows if row]
        num_rows += 1
    return alone


def shares_of_rows(
    rows: Sequence[list[TokenTree]], batching: Batching, count: int
) -> list[list[list[TokenTree]]]:
    """The rows that each of `count` processes computes: about the same number of tokens each."""
    if count == 1:
        return [list(rows)]
    costs = [num_tokens(row, batching) for row in rows]
    shares: list[list[list[TokenTree]]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(rows)), key=lambda n: -costs[n]):
        emptiest = loads.index(min(loads))
        loads[emptiest] += costs[number]
        shares[emptiest].append(rows[number])
    return shares


T = TypeVar("T")


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """Makes the next item in a thread of its own while the present one is worked on."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(next, iterator, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc] # not the end


def _fitting(family: list[TokenTree], budget: int, batching: Batching) -> Iterator[list[TokenTree]]:
    """A family, cut between preferences where it is larger than the budget."""
    piece: list[TokenTree] = []
    for preference in family:
        if piece and num_tokens([*piece, preference], batching) > budget:
            yield piece
            piece = []
        piece = [*piece, preference]
    yield piece


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


def training_order(
    num_preferences: int, num_steps: int, per_step: int, seed: int, groups: Sequence[str] = ()
) -> Iterator[list[int]]:
    """The preferences of each optimizer step, by index.

    Every epoch is a new shuffle that depends on seed and epoch alone, so step n is the same list however the
    run came to it. Preferences of one group follow each other, so that one step computes their prompt once
    and an epoch's later steps have not seen their answers before (Ouyang et al. 2022, arXiv 2203.02155, 3.5); those of a
    group larger than a step are shuffled and cut into pieces of a step's size.
    An epoch's last step may be smaller: no preference is lost and none is seen twice.

    Args:
        num_preferences: In the data.
        num_steps: To be taken.
        per_step: Preferences a step.
        seed: Of the shuffles.
        groups: The group of each preference, "" for none of them; empty: no groups.
    """
    together = families(groups or [""] * num_preferences)
    step = epoch = 0
    while step < num_steps:
        generator = random.Random(f"{seed} epoch {epoch}")
        pieces: list[list[int]] = []
        for members in together:
            if len(members) > per_step:
                members = generator.sample(members, len(members))
            pieces += [members[start : start + per_step] for start in range(0, len(members), per_step)]
        generator.shuffle(pieces)
        order = [number for piece in pieces for number in piece]
        for start in range(0, num_preferences, per_step):
            if step == num_steps:
                return
            yield order[start : start + per_step]
            step += 1
        epoch += 1
