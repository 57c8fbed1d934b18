"""Rows, microbatches and the order of training."""

from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rm.data.batches import Tree, build_batch, microbatches, num_tokens, pad_rows, training_order
from lora_rm.data.tokens import TokenTree

EXAMPLE = [TokenTree([11, 12, 13], ([21, 22], [31])), TokenTree([11, 41], ([51, 52],), kind="rating")]
"""The two trees of the docstring of TreeBatch."""


def make_tree(prompt_length, answer_lengths, number=0, stem=0):
    """A tree of its own number; its prompt begins with so many tokens that trees of all numbers have."""
    prompt = [7] * stem + [1000 + number] * prompt_length
    return TokenTree(prompt, tuple([8 + n] * k for n, k in enumerate(answer_lengths)))


def make_trees(count, prompt_length, answer_lengths):
    return [make_tree(prompt_length, answer_lengths, number) for number in range(count)]


LENGTHS = st.tuples(st.integers(0, 12), st.lists(st.integers(1, 12), min_size=1, max_size=4))
TREES = st.builds(
    lambda lengths, stem: [make_tree(*one, number, stem) for number, one in enumerate(lengths)],
    st.lists(LENGTHS, min_size=1, max_size=30),
    st.integers(0, 10),
)
BATCHINGS = ["shared", "packed", "padded"]


def cost(row, batching):
    """Tokens that are computed for a row, padding included."""
    return build_batch(row, batching).input_ids.numel()


def test_shared_the_worked_example_of_the_docstring():
    batch = build_batch(EXAMPLE)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 41, 51, 52]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 1, 2, 3]]
    assert batch.score_index.tolist() == [4, 5, 8]
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.score_index.dtype == torch.int64
    assert batch.plan.trees == (Tree(0, 3, (2, 1)), Tree(6, 1, (2,), 1))
    assert [tree.end for tree in batch.plan.trees] == [6, 9]
    assert batch.plan.lengths == [5, 1, 3]
    assert batch.attention_mask is None
    assert batch.preferences == tuple(EXAMPLE)


@pytest.mark.parametrize(
    ("how", "ids", "mask"),
    [
        ({"pad": 0}, [[5, 0, 0], [6, 7, 8]], [[1, 0, 0], [1, 1, 1]]),
        ({"pad": 0, "left": 1.0}, [[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]]),
        ({"pad": None, "left": 0.5, "more": 2}, [[5, 5, 5, 5, 5], [6, 6, 7, 8, 6]], [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0]]),
    ],
)  # fmt: skip
def test_rows_are_padded_on_either_side_or_both(how, ids, mask):
    assert pad_rows([[5], [6, 7, 8]], **how) == (ids, mask)


def test_the_longest_answer_sees_what_all_conversations_begin_with():
    """Queries: 5 6 7 8 of the second tree; keys: those and the stem 1."""
    plan = build_batch([TokenTree([1, 2], ([3],)), TokenTree([1, 5, 6], ([7, 8], [9]))]).plan
    assert plan.trees[1] == Tree(3, 2, (2, 1), 1)
    assert plan.longest == (4, 5)


def test_packed_each_answer_has_its_own_prompt():
    batch = build_batch(EXAMPLE, "packed")
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 11, 12, 13, 31, 11, 41, 51, 52]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.score_index.tolist() == [4, 8, 12]
    assert batch.plan.trees == (Tree(0, 3, (2,)), Tree(5, 3, (1,)), Tree(9, 2, (2,)))


def test_padded_one_row_an_answer():
    batch = build_batch(EXAMPLE, "padded")
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [11, 41, 51, 52, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.score_index.tolist() == [4, 8, 13]
    assert batch.plan is None


@pytest.mark.parametrize("batching", BATCHINGS)
@settings(deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=6), stem=st.integers(0, 5))
def test_every_token_stands_where_it_stands_in_its_conversation(batching, lengths, stem):
    number = iter(range(1000, 9999))  # every id once, so that an id tells its place

    def draw(n):
        return [next(number) for _ in range(n)]

    first = draw(stem)
    trees = [TokenTree(first + draw(prompt), tuple(draw(n) for n in answers)) for prompt, answers in lengths]
    batch = build_batch(trees, batching)
    conversations = [row for tree in trees for row in tree.conversations()]
    place = {token: position for row in conversations for position, token in enumerate(row)}
    flat = batch.input_ids.flatten().tolist()
    for token, position in zip(flat, batch.position_ids.flatten().tolist(), strict=True):
        assert token == 0 or place[token] == position
    assert [flat[index] for index in batch.score_index.tolist()] == [row[-1] for row in conversations]
    expected = [t for row in conversations for t in row] if batching != "shared" else list(place)
    assert Counter(token for token in flat if token) == Counter(expected)
    if batching != "padded":
        assert len(flat) == num_tokens(trees, batching)


@pytest.mark.parametrize("batching", BATCHINGS)
@settings(deadline=None)
@given(trees=TREES, budget=st.integers(16, 200))
def test_microbatches_hold_every_preference_once_within_the_budget(batching, trees, budget):
    rows = microbatches(trees, budget, batching)
    assert sorted(id(tree) for row in rows for tree in row) == sorted(map(id, trees))
    for row in rows:
        assert len(row) == 1 or 0 < cost(row, batching) <= budget


@pytest.mark.parametrize("batching", ["shared", "packed"])
@settings(deadline=None)
@given(trees=TREES, budget=st.integers(48, 200))
def test_rows_differ_by_less_than_one_preference(batching, trees, budget):
    loads = [cost(row, batching) for row in microbatches(trees, budget, batching)]
    assert max(loads) - min(loads) <= max(num_tokens([tree], batching) for tree in trees)


def test_a_system_prompt_stands_once_a_row_and_leaves_room_for_more():
    trees = [make_tree(6, (2, 2), number, stem=50) for number in range(20)]
    (row,) = microbatches(trees, 250)
    batch = build_batch(row)
    assert batch.input_ids.numel() == num_tokens(row, "shared") == 50 + 20 * 10
    assert [tree.stem_length for tree in batch.plan.trees] == [0, *[50] * 19]
    assert [len(row) for row in microbatches(trees, 249)] == [10, 10]
    assert num_tokens(trees, "packed") == 20 * 2 * 58


@pytest.mark.parametrize("num_trees", [21, 41, 64, 99])
def test_the_last_row_is_no_crumb(num_trees):
    rows = microbatches(make_trees(num_trees, 6, (2, 2)), 200)
    assert len(rows) == -(-num_trees // 20)
    assert 2 * min(map(len, rows)) >= max(map(len, rows))


def test_one_preference_above_the_budget_leaves_the_others_together():
    rows = microbatches([make_tree(300, (100, 100)), *make_trees(20, 6, (2, 2))], 100)
    assert sorted(map(len, rows))[0] == 1
    assert len(rows) <= 4, f"{len(rows)} rows for one long preference and 20 that fill two rows"


def test_padded_rows_are_filled_to_the_budget_whatever_went_before():
    rows = microbatches([make_tree(30, (10, 10)), *[make_tree(6, (4, 4))] * 4], 80, "padded")
    assert [cost(row, "padded") for row in rows] == [80, 80]


@settings(deadline=None)
@given(
    num_preferences=st.integers(1, 40),
    per_step=st.integers(1, 12),
    num_epochs=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_epoch_has_every_preference_once(num_preferences, per_step, num_epochs, seed):
    steps_an_epoch = -(-num_preferences // per_step)
    steps = list(training_order(num_preferences, num_epochs * steps_an_epoch, per_step, seed))
    assert len(steps) == num_epochs * steps_an_epoch
    for epoch in range(num_epochs):
        own = steps[epoch * steps_an_epoch : (epoch + 1) * steps_an_epoch]
        assert sorted(number for step in own for number in step) == list(range(num_preferences))
        assert [len(step) for step in own[:-1]] == [per_step] * (steps_an_epoch - 1)
        assert len(own[-1]) == num_preferences - per_step * (steps_an_epoch - 1)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(num_steps, seed=3):
        return list(training_order(50, num_steps, 10, seed))

    assert order(10) == order(10)
    assert order(7) == order(10)[:7]  # a longer run begins like a shorter one
    assert order(5) != order(10)[5:]
    assert order(5) != order(5, seed=4)
    assert order(5) != [list(range(start, start + 10)) for start in range(0, 50, 10)]
    assert order(0) == []


# -- several preferences of one prompt --------------------------------------------------------------------

GROUP = [
    TokenTree([1, 2, 3, 4], ([5, 6], [7])),
    TokenTree([1, 2, 3], ([4, 5, 6], [8, 9])),
    TokenTree([1, 2], ([3, 4, 7], [6]), kind="pair"),
]
"""Three pairs of the prompt 1 2 with four different answers: 3 4 5 6, 3 4 7, 3 8 9 and 6."""


def grouped(trees, name="a"):
    return [replace(tree, group=name) for tree in trees]


def test_pairs_of_one_prompt_are_one_tree_with_every_answer_once():
    batch = build_batch([*grouped(GROUP), *EXAMPLE])
    first = batch.plan.trees[0]
    assert batch.input_ids.tolist()[0][: first.end] == [1, 2, 3, 4, 5, 6, 3, 4, 7, 3, 8, 9, 6]
    assert batch.position_ids.tolist()[0][: first.end] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 2]
    assert first.prompt_length == 2
    # rewards in the order of the preferences' answers; the shared answer of pairs 1 and 2 is read twice
    assert batch.score_index.tolist()[:6] == [5, 8, 5, 11, 8, 12]
    assert batch.plan.ends.tolist() == [5, 8, 11, 12, 17, 18, 22]
    assert num_tokens(grouped(GROUP), "shared") == first.end


def test_rewards_come_in_the_order_of_the_preferences_even_when_groups_are_mixed():
    mixed = [grouped(GROUP)[0], EXAMPLE[0], grouped(GROUP)[1]]
    batch = build_batch(mixed)
    flat = batch.input_ids.flatten().tolist()
    wanted = [row[-1] for tree in mixed for row in tree.conversations()]
    assert [flat[index] for index in batch.score_index.tolist()] == wanted


@settings(deadline=None)
@given(budget=st.integers(8, 60), num_groups=st.integers(1, 6))
def test_groups_stay_together_where_they_fit(budget, num_groups):
    trees = [
        TokenTree(
            [100 * n + i for i in tree.prompt_ids],
            tuple([100 * n + i for i in ids] for ids in tree.answer_ids),
            group=f"g{n}",
        )
        for n in range(num_groups)
        for tree in GROUP
    ]
    rows = microbatches(trees, budget)
    assert sorted(id(tree) for row in rows for tree in row) == sorted(map(id, trees))
    assert all(len(row) == 1 or num_tokens(row, "shared") <= budget for row in rows)
    if budget >= 13:
        assert sum(num_tokens(row, "shared") for row in rows) == 13 * num_groups


def test_the_order_keeps_groups_together_and_loses_nothing():
    groups = [f"g{n % 5}" for n in range(20)] + [""] * 3
    steps = list(training_order(23, 6, 4, 0, groups))
    order = [number for step in steps for number in step]
    assert sorted(order) == list(range(23))
    names = [groups[number] or number for number in order]
    changes = sum(one != other for one, other in pairwise(names))
    assert changes == 5 + 3 - 1
    assert list(training_order(23, 6, 4, 0)) == list(training_order(23, 6, 4, 0, [""] * 23))


def test_a_group_larger_than_a_step_is_shuffled_and_cut_into_steps():
    """In the order of the file, a step would have the answers of one time, and many steps in a row the same prompt."""
    groups = ["a"] * 40 + [f"b{n // 2}" for n in range(40)]
    steps = list(training_order(80, 20, 8, 0, groups))
    order = [number for step in steps for number in step]
    assert sorted(order[:80]) == sorted(order[80:]) == list(range(80))
    of_a = [number for number in order[:80] if number < 40]
    assert of_a != sorted(of_a)
    assert of_a != [number for number in order[80:] if number < 40]
    names = [name for name, _ in groupby(groups[number] for number in order[:80])]
    assert names.count("a") > 1


def test_padded_rows_can_be_pinned():
    """Rows that share memory, as `expand` makes them, cannot: on a GPU no padded batch would train."""
    batch = build_batch([TokenTree([1, 2], ([3], [4, 5]))], "padded")
    for tensor in (batch.input_ids, batch.position_ids, batch.attention_mask, batch.score_index):
        assert torch._debug_has_internal_overlap(tensor) == 0


def test_masks_go_with_the_row_that_needed_them():
    batch = build_batch([TokenTree([1, 2], ([3], [4, 5]))])
    moved = batch.to(torch.device("cpu")).plan
    moved.mask(2, 4, None, torch.zeros(1))
    assert (len(moved.masks), batch.plan.masks) == (1, {})


def test_members_of_a_group_larger_than_a_step_are_shuffled():
    first, _ = training_order(16, 2, 8, 0, ["a"] * 16)
    assert {number // 8 for number in first} == {0, 1}  # of both halves of the file
