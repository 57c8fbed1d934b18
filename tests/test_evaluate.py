"""What an evaluation counts, on rewards whose truth is known."""

import dataclasses
import json
import math
import random

import pytest
import torch
from conftest import assistant, make_model, user

from lora_rm.config import LossSettings
from lora_rm.data.preference import Preference
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import DataError, ModelError
from lora_rm.evaluate import (
    BestCount,
    PairCount,
    bag_of_words_baseline,
    calibration_error,
    clustered_interval,
    evaluate,
    ordered_pairs,
    summarize,
    wilson_interval,
)
from lora_rm.metrics import StepSums
from lora_rm.workflow import _show as show


def tree(*lengths, kind="pair", **more):
    return TokenTree([1], tuple([2] * length for length in lengths), kind, **more)


def summary(trees, rewards, **loss):
    return summarize(trees, rewards, LossSettings(**loss))


@pytest.fixture(scope="module")
def model(base):
    return make_model(base)


# Accuracy.

RIGHT, WRONG = [1.0, 0.0], [0.0, 1.0]
FIVE = [RIGHT, RIGHT, WRONG, WRONG, RIGHT]
"""Three of five are right; in batches of 4 and 1 the mean of the batches would be 0.75."""


def test_accuracy_is_a_count_over_pairs():
    found = summary([tree(1, 1)] * 5, FIVE)
    assert found.pairs == PairCount(num_pairs=5, num_correct=3)
    assert found.pairs.accuracy == 0.6
    parts = [summary([tree(1, 1)] * len(part), part).pairs for part in (FIVE[:4], FIVE[4:])]
    assert sum(part.accuracy for part in parts) / 2 == 0.75
    assert sum(parts, PairCount()) == found.pairs


def test_accuracy_of_a_step_is_a_count_over_its_microbatches():
    sums = StepSums()
    for part in (FIVE[:4], FIVE[4:]):
        flat = [reward for own in part for reward in own]
        sums.add([tree(1, 1)] * len(part), torch.arange(float(len(part))), flat, 10)
    found = sums.to_json()
    assert found["accuracy"] == 0.6
    assert found["loss"] == (0 + 1 + 2 + 3 + 0) / 5
    assert math.isclose(found["margin"], 0.2)
    assert (found["reward_mean"], found["reward_spread"]) == (0.5, 0.5)


def test_a_models_accuracy_does_not_depend_on_the_microbatches(model, held_out):
    some = held_out[:5]
    rewards = model.score(some)
    assert all(first != second for first, second in rewards)
    wanted = [True, True, False, False, True]
    turned = [
        t if (first > second) == right else dataclasses.replace(t, answer_ids=t.answer_ids[::-1])
        for t, (first, second), right in zip(some, rewards, wanted, strict=True)
    ]
    longest = max(sum(map(len, t.conversations())) for t in some)
    found = [evaluate(model, turned, tokens_per_microbatch=budget) for budget in (16, longest, 4 * longest)]
    for one in found:
        assert one.pairs == PairCount(num_pairs=5, num_correct=3)
        assert one.num_preferences == 5
        assert math.isclose(one.loss, found[0].loss, rel_tol=1e-5)
        assert math.isclose(one.reward_spread, found[0].reward_spread, rel_tol=1e-5)


def test_the_loss_of_an_evaluation_is_the_trainings(model, held_out):
    loss = LossSettings(label_smoothing=0.3)
    found, plain = evaluate(model, held_out[:3], loss), evaluate(model, held_out[:3])
    assert found.loss == pytest.approx(summarize(held_out[:3], model.score(held_out[:3]), loss).loss)
    assert found.loss != pytest.approx(plain.loss, rel=1e-3)


def test_an_evaluation_keeps_to_the_tokens_of_a_microbatch(model, held_out):
    rows = []
    handle = model.backbone.register_forward_hook(lambda *_: rows.append(1))
    for budget in (16, 65536):
        evaluate(model, held_out[:5], tokens_per_microbatch=budget)
    handle.remove()
    assert len(rows) == 5 + 1


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_a_fault_of_the_model(model, held_out, monkeypatch, number):
    monkeypatch.setattr(model, "score", lambda *_, **__: [[0.0, number]])
    with pytest.raises(ModelError, match="A reward is not finite"):
        evaluate(model, held_out[:1])


def test_a_preference_may_stand_in_the_list_twice(model, held_out):
    twice = [held_out[0], held_out[1], held_out[0]]
    rewards = model.score(twice)
    assert [len(own) for own in rewards] == [2, 2, 2]
    assert rewards[0] == pytest.approx(rewards[2], rel=1e-5)


def test_evaluating_leaves_the_model_in_its_mode(model, held_out):
    for training in (True, False):
        model.train(training)
        evaluate(model, held_out[:2])
        assert model.training == training


def test_equal_rewards_are_ties_that_count_half():
    found = summary([tree(1, 1)] * 4, [RIGHT, RIGHT, [0.5, 0.5], WRONG])
    assert found.pairs == PairCount(num_pairs=4, num_correct=2, num_ties=1)
    assert found.pairs.accuracy == 0.625
    assert found.interval == wilson_interval(2.5, 4)
    assert found.to_json()["pairs"] == {"num_pairs": 4, "num_correct": 2, "num_ties": 1, "accuracy": 0.625}


def test_pairs_of_one_prompt_are_no_independent_witnesses():
    """All right or all wrong together, 8 prompts of 28 pairs say as much as 8 pairs."""
    trees = [tree(1, 1, group=f"prompt {n % 8}") for n in range(8 * 28)]
    found = summary(trees, [RIGHT if n % 8 < 6 else WRONG for n in range(8 * 28)])
    assert found.pairs.accuracy == 0.75
    assert found.interval == pytest.approx(wilson_interval(6, 8))
    mixed = summary(
        trees, [RIGHT if n // 8 % 4 else WRONG for n in range(8 * 28)]
    )  # in each prompt three of four
    assert mixed.pairs.accuracy == 0.75
    assert mixed.interval == pytest.approx(wilson_interval(0.75 * 224, 224))
    all_right = summary(trees, [RIGHT] * 224)
    assert all_right.interval == wilson_interval(8, 8)
    ranking = tree(1, 1, 1, kind="ranking", scores=(3.0, 2.0, 1.0))
    assert summary([ranking], [[3.0, 2.0, 1.0]]).interval == wilson_interval(1, 1)
    assert summary([ranking], [[2.0, 3.0, 1.0]]).interval == pytest.approx(wilson_interval(2 / 3, 1))


def test_calibration_takes_soft_labels_at_their_word():
    """Rewards that say 70 % where the labels say 70 % are calibrated."""
    difference = math.log(0.7 / 0.3)
    soft = tree(1, 1, probability=0.7)
    assert summary([soft] * 3, [[difference, 0.0]] * 3).calibration_error == pytest.approx(0.0, abs=1e-12)
    assert summary([soft], [[0.0, difference]]).calibration_error == pytest.approx(0.4)
    assert summary([tree(1, 1)], [[difference, 0.0]]).calibration_error == pytest.approx(0.3)


def test_answers_that_only_call_tools_have_words():
    def said(name):
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        return ({"role": "assistant", "content": "", "tool_calls": (call,)},)

    asked = ({"role": "user", "content": "What now?"},)
    pairs = [Preference(prompt=asked, answers=(said("look"), said("leap"))) for _ in range(4)]
    assert bag_of_words_baseline(pairs, pairs) == 1.0
    silent = ({"role": "assistant", "content": ""},)
    none = [Preference(prompt=asked, answers=(silent, silent))]
    assert math.isnan(bag_of_words_baseline(none, none))


def test_ties_of_the_data_and_ratings_are_no_pairs():
    trees = [tree(1, 1), tree(1, 1, probability=0.5), tree(1, kind="rating", scores=(2.0,))]
    found = summary(trees, [RIGHT, WRONG, [5.0]])
    assert found.pairs == PairCount(num_pairs=1, num_correct=1)
    assert found.num_preferences == 3
    expected = [math.log(1 + math.exp(-1)), (math.log(1 + math.e) + math.log(1 + math.exp(-1))) / 2, 9.0]
    assert math.isclose(found.loss, sum(expected) / 3)


def test_a_ranking_counts_with_each_of_its_ordered_pairs():
    ranking = tree(1, 1, 1, 1, kind="ranking", scores=(2.0, 3.0, 1.0, 2.0))
    pairs = [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)]
    assert sorted(ordered_pairs(ranking)) == pairs
    rewards = [0.5, 0.4, 0.1, 0.1]  # right: 0 over 2, 1 over 2, 1 over 3; a tie: 3 and 2; wrong: 1 over 0
    found = summary([ranking], [rewards])
    assert found.pairs == PairCount(num_pairs=5, num_correct=3, num_ties=1)
    assert math.isclose(found.margin_mean, sum(rewards[i] - rewards[j] for i, j in pairs) / 5)


def test_the_best_answer_is_on_top_or_it_is_not(capsys):
    one_best = tree(1, 1, 1, 1, kind="ranking", scores=(1.0, 0.0, 0.0, 0.0), subset="one")
    two_best = tree(1, 1, 1, kind="ranking", scores=(2.0, 1.0, 2.0), subset="two")
    cases = [
        (one_best, [3.0, 1.0, 2.0, 0.0], True),
        (one_best, [3.0, 1.0, 4.0, 0.0], False),
        (one_best, [3.0, 1.0, 3.0, 0.0], False),  # a tie at the top
        (two_best, [0.0, 1.0, 2.0], True),  # one of the best is enough
        (two_best, [2.0, 1.0, 2.0], True),  # a tie of the best
        (two_best, [0.0, 1.0, 1.0], False),
    ]
    for ranking, rewards, is_on_top in cases:
        assert summary([ranking], [rewards]).best == BestCount(num_preferences=1, num_correct=int(is_on_top))
    trees = [
        tree(1, 1, subset="one"),
        tree(1, kind="rating", scores=(1.0,)),
        *(ranking for ranking, _, _ in cases),
    ]
    found = summary(trees, [RIGHT, [0.0], *(rewards for _, rewards, _ in cases)])
    assert found.best == BestCount(num_preferences=6, num_correct=3)
    assert found.best_subsets == {
        "one": BestCount(num_preferences=3, num_correct=1),
        "two": BestCount(num_preferences=3, num_correct=2),
    }
    values = found.to_json()
    assert values["best"] == {"num_preferences": 6, "num_correct": 3, "accuracy": 0.5}
    assert values["best_subsets"]["two"]["accuracy"] == 2 / 3
    show("evaluation", found)
    assert "best answer on top" in (page := capsys.readouterr().out)
    assert "50.0% of 6 rankings" in page
    show("evaluation", summary([tree(1, 1)], [RIGHT]))
    assert "best answer" not in capsys.readouterr().out


def test_soft_labels_count_as_the_way_round_they_lean():
    assert ordered_pairs(tree(1, 1, probability=0.51)) == [(0, 1)]
    assert ordered_pairs(tree(1, 1, probability=0.5)) == []


def test_subsets_are_counted_apart_and_add_up():
    trees = [tree(1, 1, subset=name) for name in ("sums", "words", "sums", "words", "sums")]
    found = summary(trees, FIVE)
    assert found.subsets == {
        "sums": PairCount(num_pairs=3, num_correct=2),
        "words": PairCount(num_pairs=2, num_correct=1),
    }
    assert sum(found.subsets.values(), PairCount()) == found.pairs
    assert summary([tree(1, 1)], [RIGHT]).subsets == {}


def test_mean_spread_and_margin_are_over_all_rewards():
    found = summary([tree(1, 1), tree(1, 1)], [[3.0, 1.0], [0.0, 4.0]])
    assert (found.reward_mean, found.margin_mean) == (2.0, -1.0)
    assert math.isclose(found.reward_spread, math.sqrt((1 + 1 + 4 + 4) / 4))


def test_nothing_to_evaluate_is_an_error(model):
    with pytest.raises(DataError, match=r"no preferences.*data\.eval"):
        evaluate(model, [])


# Interval, calibration, baselines.


@pytest.mark.parametrize(
    ("num_correct", "num_pairs", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_the_wilson_interval_has_its_known_values(num_correct, num_pairs, low, high):
    found = wilson_interval(num_correct, num_pairs)
    assert found == pytest.approx((low, high), abs=6e-5)


def test_the_ends_of_the_interval_are_shares_that_just_fit():
    for bound in wilson_interval(300, 500):
        assert math.isclose(abs(0.6 - bound), 1.96 * math.sqrt(bound * (1 - bound) / 500), rel_tol=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)


LOG_ODDS = {share: math.log(share / (1 - share)) for share in (0.57, 0.73, 0.74, 0.99)}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([LOG_ODDS[0.73]], 0.27),
        ([-LOG_ODDS[0.73]], 0.73),
        ([0.0], 0.0),
        ([1000.0, 1000.0], 0.0),
        ([-1000.0], 1.0),
        # one bin: mean confidence 0.735, half of them right
        ([LOG_ODDS[0.73], -LOG_ODDS[0.74]], 0.235),
        # certain is in the last bin too: mean confidence 0.995, half of them right
        ([-1000.0, LOG_ODDS[0.99]], 0.495),
        # three bins, weighted by their numbers: |0.57 - 1|, |(0.73 + 0.74) / 2 - 1/2| twice, |0.99 - 1|
        ([LOG_ODDS[0.57], LOG_ODDS[0.73], -LOG_ODDS[0.74], LOG_ODDS[0.99]], (0.43 + 2 * 0.235 + 0.01) / 4),
    ],
)
def test_calibration_error_by_hand(differences, expected):
    assert math.isclose(calibration_error(differences), expected, abs_tol=1e-9)
    trees, rewards = [tree(1, 1)] * len(differences), [[difference, 0.0] for difference in differences]
    assert math.isclose(summary(trees, rewards).calibration_error, expected, abs_tol=1e-9)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large():
    generator = random.Random(0)
    differences = [generator.gauss(0, 1.5) for _ in range(20000)]
    drawn = [d if generator.random() < 1 / (1 + math.exp(-d)) else -d for d in differences]
    assert calibration_error(drawn) < 0.015
    assert calibration_error([5 * d for d in drawn]) > 0.1


def test_the_length_baseline_takes_the_longer_answer():
    trees = [tree(3, 2), tree(5, 1), tree(2, 2), tree(1, 4), tree(9, 1, probability=0.5)]
    assert summary(trees, [RIGHT] * 5).length_baseline == 2.5 / 4


def words(*answers, **more):
    return Preference(
        prompt=({"role": "user", "content": "?"},),
        answers=tuple(({"role": "assistant", "content": text},) for text in answers),
        **more,
    )


def random_pairs(number, seed, planted=""):
    generator = random.Random(seed)
    texts = [" ".join(f"w{generator.randrange(200)}" for _ in range(8)) for _ in range(2 * number)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [words(f"{first} {planted}", second) for first, second in pairs]


def test_the_bag_of_words_finds_a_planted_word_and_nothing_in_noise():
    planted = random_pairs(300, 1, "surely"), random_pairs(200, 2, "surely")
    assert bag_of_words_baseline(*planted) > 0.95
    assert 0.4 < bag_of_words_baseline(random_pairs(300, 3), random_pairs(400, 4)) < 0.6
    turned = [words(*("".join(m["content"] for m in a) for a in p.answers[::-1])) for p in planted[1]]
    assert bag_of_words_baseline(planted[0], turned) < 0.05


def test_the_bag_of_words_has_no_opinion_on_words_it_has_not_seen():
    train = [words("good", "bad")] * 4
    assert bag_of_words_baseline(train, [words("red", "blue")] * 3) == 0.5
    assert bag_of_words_baseline(train, [words("a good one", "a bad one")]) == 1.0


def test_the_bag_of_words_trusts_no_word_that_it_saw_once():
    train = [words("rare", "x"), *[words("often", "y")] * 30, *[words("y", "often")] * 10]
    assert bag_of_words_baseline(train, [words("often", "rare")]) == 1.0  # without the penalty: 0


def test_the_bag_of_words_knows_the_most_frequent_words_alone():
    train, held_out = [words("good good", "bad")] * 4, [words("new", "bad")]
    assert bag_of_words_baseline(train, held_out) == 1.0
    assert bag_of_words_baseline(train, held_out, num_words=1) == 0.5


def test_the_bag_of_words_counts_decided_pairs_alone():
    pair, tie = words("good", "bad"), words("bad", "good", probability=0.5)
    rating = words("good", kind="rating", scores=(1.0,))
    assert bag_of_words_baseline([pair] * 3 + [tie] * 9, [pair, tie, rating]) == 1.0
    assert math.isnan(bag_of_words_baseline([rating], [pair]))
    assert math.isnan(bag_of_words_baseline([pair], [tie]))


# Ratings.


@pytest.mark.parametrize(
    ("ratings", "rewards", "expected"),
    [([1, 2, 3], [0.1, 0.3, 0.5], 1.0), ([1, 2, 3], [5, 3, 1], -1.0), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8)],
)
def test_rewards_of_ratings_are_correlated_with_them(ratings, rewards, expected):
    trees = [tree(1, kind="rating", scores=(float(rating),)) for rating in ratings] + [tree(1, 1)]
    found = summary(trees, [[reward] for reward in rewards] + [RIGHT])
    assert found.rating_correlation == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_what_does_not_vary_is_correlated_with_nothing():
    rating, other = (tree(1, kind="rating", scores=(score,)) for score in (0.1, 0.2))
    for trees, rewards in (
        ([rating], [[1.0]]),
        ([rating] * 3, [[1.0], [2.0], [3.0]]),  # three times 0.1 have a variance, by rounding
        ([rating, other, rating], [[0.1]] * 3),
        ([rating, other], [[1.0], [math.inf]]),
        ([tree(1, 1)], [RIGHT]),
    ):
        assert math.isnan(summary(trees, rewards).rating_correlation)


# JSON.


def test_json_has_no_nan_and_no_infinity():
    rating = tree(1, kind="rating", scores=(0.0,))
    found = summary([rating], [[2.0]]).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "num_preferences": 1,
        "loss": 4.0,
        "pairs": {"num_pairs": 0, "num_correct": 0, "num_ties": 0, "accuracy": None},
        "length_baseline": None,
        "calibration_error": None,
        "margin_mean": None,
        "rating_correlation": None,
        "reward_mean": 2.0,
        "reward_spread": 0.0,
        "subsets": {},
        "best": {"num_preferences": 0, "num_correct": 0, "accuracy": None},
        "best_subsets": {},
        "interval": [0.0, 1.0],
    }
    broken = summary([tree(1, 1, subset="a"), rating], [[math.inf, 0.0], [math.nan]]).to_json()
    json.dumps(broken, allow_nan=False)
    assert broken["reward_mean"] is None
    assert broken["subsets"]["a"]["accuracy"] == 1.0


def test_steps_without_pairs_write_null():
    sums = StepSums()
    sums.add([tree(1, kind="rating", scores=(0.0,))], torch.tensor([math.nan]), [1.0], 3)
    found = sums.to_json()
    assert (found["accuracy"], found["margin"], found["loss"]) == (None, None, None)
    json.dumps(found, allow_nan=False)


def test_answers_of_one_prompt_that_agree_less_than_chance_do_not_narrow_the_interval():
    prompts = [PairCount(num_pairs=2, num_correct=1)] * 9 + [PairCount(num_pairs=2, num_correct=2)]
    assert clustered_interval(prompts) == wilson_interval(11, 20)


@pytest.mark.parametrize("lists", [{8: 2}, {8: 5}, {8: 20}, {2: 90, 16: 10}, {2: 200, 8: 50}])
def test_the_interval_of_few_prompts_with_long_lists_holds_the_truth(lists):
    """So many lists of so many answers, by rewards that tell them apart well for some prompts and not at all for others."""
    generator = random.Random(0)

    def count(length):
        skill = max(0.0, generator.gauss(3, 3))
        rewards = [skill * place / length + generator.gauss(0, 1) for place in range(length)]
        pairs = [rewards[b] > rewards[a] for a in range(length) for b in range(a + 1, length)]
        return PairCount(num_pairs=len(pairs), num_correct=sum(pairs))

    def some(times=1):
        return [count(length) for length, number in lists.items() for _ in range(number * times)]

    truth = sum(some(2000 // sum(lists.values())), PairCount()).accuracy
    intervals = [clustered_interval(some()) for _ in range(400)]
    assert sum(low <= truth <= high for low, high in intervals) >= 0.91 * len(intervals)


def test_a_bag_of_words_learns_from_pairs_of_the_whole_file(monkeypatch):
    """Files are often sorted by source."""
    monkeypatch.setattr("lora_rm.evaluate.MOST_FOR_WORDS", 50)
    pairs = [
        Preference(prompt=(user(f"{number}?"),), answers=((assistant(f"a {word}"),), (assistant("a"),)))
        for word in ("x", "y")
        for number in range(50)
    ]
    assert bag_of_words_baseline(pairs, pairs[50:]) == 1.0
    assert 0.0 < bag_of_words_baseline(pairs[50:], pairs) < 1.0  # which knows nothing of x
