"""The embedded set: the same everywhere, right where a program can tell, and without shortcuts."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from lora_rm.data.checkable import HARD, KINDS, SYSTEM, checkable_preferences, draft_pairs
from lora_rm.data.preference import Preference
from lora_rm.errors import DataError

SHA256 = "558089cde1f450542777d5dc585781003187de909da3069e9e85f182ca9488be"


def content_hash(train: list[Preference], held_out: list[Preference]) -> str:
    rows = [
        [split, row.prompt, row.answers, row.kind, row.subset, row.source]
        for split, rows in (("train", train), ("eval", held_out))
        for row in rows
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits() -> tuple[list[Preference], list[Preference]]:
    return checkable_preferences()


def text(preference: Preference, place: int) -> str:
    return preference.answers[place][0]["content"]


def test_the_set_is_the_same_to_the_byte(splits):
    assert content_hash(*splits) == SHA256


def test_the_set_is_the_same_in_another_process():
    # String hashes differ between processes: a set or hash() in the generator would show here.
    program = "from lora_rm.data.checkable import draft_pairs; print(ascii([draft[:3] for draft in draft_pairs(1840)]))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == ascii([draft[:3] for draft in draft_pairs(1840)])


def test_another_seed_gives_other_pairs(splits):
    prompts = {row.prompt[-1]["content"] for row in splits[0]}
    others = {row.prompt[-1]["content"] for row in checkable_preferences(seed=1)[0]}
    assert len(prompts & others) < 0.4 * len(prompts)


def test_no_prompt_comes_twice(splits):
    keys = [row.prompt_key for rows in splits for row in rows]
    assert len(set(keys)) == len(keys) == 1840


def test_each_kind_has_its_share_of_both_splits(splits):
    """Ten kinds take a turn each, the five hard ones one together: 1/11 and 1/55 of a split."""
    for rows in splits:
        counts = Counter(row.subset for row in rows)
        assert counts.keys() == {kind.__name__ for kind in (*KINDS, *HARD)}
        for kinds, share in ((KINDS, 1 / 11), (HARD, 1 / 55)):
            for kind in kinds:
                assert abs(counts[kind.__name__] - share * len(rows)) <= 1, kind.__name__


def test_each_row_is_a_pair_of_one_turn_each(splits):
    for row in splits[0] + splits[1]:
        assert (row.kind, row.probability, len(row.answers)) == ("pair", 1.0, 2)
        assert row.prompt[0] == {"role": "system", "content": SYSTEM}
        assert [row.prompt[1]["role"], *(answer[0]["role"] for answer in row.answers)] == [
            "user", "assistant", "assistant",
        ]  # fmt: skip
        assert text(row, 0) != text(row, 1)
        assert len(row.prompt[1]["content"].split()) <= 25
        assert max(len(text(row, 0).split()), len(text(row, 1).split())) <= 15
    assert splits[1][0].source == f"checkable {splits[1][0].subset} 1600"


def test_the_right_answer_passes_its_check_and_the_wrong_one_fails(splits):
    drafts = draft_pairs(1840)
    for draft, row in zip(drafts, splits[0] + splits[1], strict=True):
        assert (draft.prompt, draft.right, draft.wrong) == (
            row.prompt[1]["content"],
            text(row, 0),
            text(row, 1),
        )
        assert draft.is_right(draft.right), draft
        assert not draft.is_right(draft.wrong), draft


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("split", [0, 1])
def test_length_does_not_tell_the_right_answer(split, seed):
    rows = checkable_preferences(seed=seed)[split]
    # 'Shorter wins' is one minus this, since equal lengths count half.
    for size in (len, lambda answer: len(re.findall(r"\w+|[^\w\s]", answer))):
        right, wrong = ([size(text(row, place)) for row in rows] for place in (0, 1))
        longer_wins = sum((a > b) + (a == b) / 2 for a, b in zip(right, wrong, strict=True)) / len(rows)
        assert 0.48 <= longer_wins <= 0.52


@pytest.mark.parametrize("pattern", [r"\S+", r"\w+|[^\w]"], ids=["words", "words and marks"])
def test_the_words_of_the_answer_alone_do_not_tell_it(splits, pattern):
    # Logistic regression on the word counts of the right answer minus those of the wrong one.
    train, held_out = splits
    counts = [
        [Counter(re.findall(pattern, text(row, place))) for place in (0, 1)] for row in train + held_out
    ]
    places = {word: place for place, word in enumerate({w: 0 for pair in counts for c in pair for w in c})}
    features = torch.zeros(len(counts), len(places))
    for index, (right, wrong) in enumerate(counts):
        for word in right | wrong:
            features[index, places[word]] = right[word] - wrong[word]
    weight = torch.zeros(len(places), requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        margin = features[: len(train)] @ weight
        (torch.nn.functional.softplus(-margin).mean() + 1e-3 * weight.square().sum()).backward()
        optimizer.step()
    margin = (features[len(train) :] @ weight).detach()
    assert ((margin > 0).float() + (margin == 0).float() / 2).mean() <= 0.60


def test_a_short_set_has_the_first_rows_of_a_long_one(splits):
    train, held_out = checkable_preferences(num_train=20, num_eval=10)
    assert train + held_out == splits[0][:30]
    assert checkable_preferences(num_train=0, num_eval=0) == ([], [])


def test_a_negative_number_is_an_error():
    with pytest.raises(DataError, match="num_eval is -1; allowed is 0 or more"):
        checkable_preferences(num_eval=-1)


def test_a_set_too_large_is_an_error():
    with pytest.raises(DataError, match=r"has no new prompt left .*Ask for at most \d+ pairs"):
        checkable_preferences(num_train=100_000)
