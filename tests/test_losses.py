"""Losses against their formulas, written out in plain floating point numbers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rm.config import LossSettings
from lora_rm.data.tokens import TokenTree
from lora_rm.losses import (
    bradley_terry,
    centering,
    davidson,
    pair_losses,
    plackett_luce,
    preference_losses,
    rao_kupper,
    regression,
)

DIFFERENCES = [-30.0, -2.5, -0.3, 0.0, 0.7, 4.0, 30.0]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tree(kind="pair", num_answers=2, **target):
    return TokenTree([1], tuple([number] for number in range(2, 2 + num_answers)), kind, **target)


def losses(rewards, trees, **settings):
    return preference_losses(double(*rewards), trees, LossSettings(**settings))


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, double(*expected).reshape(found.shape), rtol=tolerance, atol=tolerance)


# Pairs.


@pytest.mark.parametrize("probability", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_bradley_terry_is_the_cross_entropy_of_a_sigmoid(difference, probability):
    expected = -probability * math.log(sigmoid(difference)) - (1 - probability) * math.log(
        sigmoid(-difference)
    )
    assert_close(bradley_terry(double(difference), double(probability)), [expected], 1e-10)


def test_the_preferred_answer_comes_first():
    assert_close(losses([1.2, -0.5], [tree()]), [-math.log(sigmoid(1.7))])
    assert_close(losses([-0.5, 1.2], [tree()]), [-math.log(sigmoid(-1.7))])


def test_a_tie_is_best_at_equal_rewards():
    for pair in ("bradley_terry", "rao_kupper", "davidson"):
        low, middle, high = losses(
            [0.0, 0.4, 0.2, 0.2, 0.4, 0.0], [tree(probability=0.5)] * 3, pair=pair
        ).tolist()
        assert math.isclose(low, high)
        assert middle < low


@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_models_with_ties_have_the_probabilities_of_their_papers(difference, strength):
    first, second = math.exp(difference / 2), math.exp(-difference / 2)
    eta = 1 + strength
    expected = {
        rao_kupper: (
            first / (first + eta * second),
            second / (second + eta * first),
            (eta**2 - 1) * first * second / ((first + eta * second) * (second + eta * first)),
        ),
        davidson: tuple(
            part / (first + second + strength * math.sqrt(first * second))
            for part in (first, second, strength * math.sqrt(first * second))
        ),
    }
    for model, probabilities in expected.items():
        found = torch.stack(model(double(difference), strength)).exp()
        assert_close(found.sum(), [1.0])
        assert_close(found.flatten(), probabilities, 1e-10)


@pytest.mark.parametrize("model", [rao_kupper, davidson])
def test_the_pair_loss_takes_the_outcome_that_happened(model):
    win, loss, tie = (float(part) for part in model(double(0.9), 0.7))
    settings = LossSettings(pair=model.__name__, tie_strength=0.7)
    found = pair_losses(double(0.9, 0.9, 0.9), double(1.0, 0.5, 0.8), settings)
    assert_close(found, [-win, -tie, -(0.8 * win + 0.2 * loss)])


def test_rao_kupper_without_ties_is_bradley_terry():
    found = pair_losses(
        double(*DIFFERENCES),
        torch.ones(len(DIFFERENCES)).double(),
        LossSettings(pair="rao_kupper", tie_strength=1e-9),
    )
    assert_close(found, [-math.log(sigmoid(difference)) for difference in DIFFERENCES], 1e-7)


def test_the_margin_is_asked_for_only_when_it_is_used():
    trees = [tree(margin=0.5), tree(margin=3.0)]
    rewards = [1.0, 0.0, 0.0, 1.0]
    assert_close(losses(rewards, trees), [-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.0))])
    assert_close(losses(rewards, trees, use_margin=True), [-math.log(sigmoid(0.5)), -math.log(sigmoid(-4.0))])


@pytest.mark.parametrize(("probability", "label"), [(1.0, 0.9), (0.8, 0.74), (0.5, 0.5)])
def test_label_smoothing_mixes_in_the_other_label(probability, label):
    found = losses([0.4, -0.7], [tree(probability=probability)], label_smoothing=0.1)
    assert_close(found, [-label * math.log(sigmoid(1.1)) - (1 - label) * math.log(sigmoid(-1.1))])


@pytest.mark.parametrize(
    ("pair", "strength", "difference", "win", "loss", "tie"),
    [
        # 4 / (4 + 2), 1 / (1 + 2 * 4), and (2^2 - 1) times their product
        ("rao_kupper", 1.0, math.log(4), 2 / 3, 1 / 9, 2 / 9),
        # of 2, 1 / 2 and 3 / 2, which are 4 together
        ("davidson", 1.5, math.log(4), 1 / 2, 1 / 8, 3 / 8),
    ],
)
@pytest.mark.parametrize(("probability", "label"), [(1.0, 0.9), (0.8, 0.74)])
def test_label_smoothing_of_models_with_ties_leaves_ties_alone(
    pair, strength, difference, win, loss, tie, probability, label
):
    found = losses(
        [difference, 0.0] * 2,
        [tree(probability=probability), tree(probability=0.5)],
        pair=pair,
        tie_strength=strength,
        label_smoothing=0.1,
    )
    assert_close(found, [-label * math.log(win) - (1 - label) * math.log(loss), -math.log(tie)])


# Rankings and ratings.


@pytest.mark.parametrize(
    ("rewards", "best_first"),
    [
        ((0.3, -1.0), (1, 0)),
        ((0.3, -1.0, 2.0), (1, 0, 2)),
        ((0.3, -1.0, 2.0, 0.9), (2, 1, 3, 0)),
    ],
)
def test_plackett_luce_is_the_product_of_the_choices(rewards, best_first):
    probability, left = 1.0, list(best_first)
    while len(left) > 1:
        probability *= math.exp(rewards[left[0]]) / sum(math.exp(rewards[number]) for number in left)
        left.pop(0)
    scores = [0.0] * len(rewards)
    for place, number in enumerate(best_first):
        scores[number] = 10.0 - 3 * place
    found = plackett_luce(double(*rewards), double(*scores))
    assert_close(found, [-math.log(probability) / (len(rewards) - 1)])


def test_plackett_luce_of_two_answers_is_bradley_terry():
    for difference in DIFFERENCES:
        found = plackett_luce(double(difference, 0.0), double(2.0, 1.0))
        assert_close(found, [-math.log(sigmoid(difference))], 1e-10)


def test_tied_answers_compete_with_all_that_are_not_better():
    a, b, c, d = (math.exp(reward) for reward in (0.3, -1.0, 2.0, 0.9))
    # the first two share the top, the last two the bottom
    expected = -math.log(a / (a + b + c + d)) - math.log(b / (a + b + c + d))
    found = plackett_luce(double(0.3, -1.0, 2.0, 0.9), double(5.0, 5.0, 1.0, 1.0))
    assert_close(found, [expected / 2])
    expected = -math.log(c / (a + b + c + d)) - math.log(a / (a + b + d)) - math.log(d / (a + b + d))
    found = plackett_luce(double(0.3, -1.0, 2.0, 0.9), double(2.0, 1.0, 3.0, 2.0))
    assert_close(found, [expected / 3])


def test_a_rating_is_regressed_on_and_a_mean_over_its_answers():
    assert_close(regression(double(1.0, -2.0), double(0.5, 1.0)), [0.25, 9.0])
    assert_close(losses([1.5], [tree("rating", 1, scores=(4.0,))]), [6.25])
    assert_close(losses([1.0, -2.0], [tree("rating", 2, scores=(0.5, 1.0))]), [4.625])


def test_centering_is_the_squared_sum_of_a_pair_and_spares_ratings():
    assert_close(centering(double(1.5, -0.2)), [1.3**2])
    assert_close(centering(double(1.0, 2.0, 6.0)), [36.0])
    pair, ranking, rating = (
        tree(),
        tree("ranking", 3, scores=(3.0, 2.0, 1.0)),
        tree("rating", 1, scores=(0.0,)),
    )
    rewards = [1.5, -0.2, 1.0, 2.0, 6.0, 3.0]
    added = losses(rewards, [pair, ranking, rating], centering=0.1) - losses(rewards, [pair, ranking, rating])
    assert_close(added, [0.169, 3.6, 0.0])


# Mixtures.

MIXED = [
    tree("ranking", 4, scores=(1.0, 4.0, 2.0, 2.0)),
    tree(probability=0.7),
    tree("rating", 1, scores=(0.25,)),
    tree(margin=0.4),
    tree("ranking", 3, scores=(0.0, 1.0, 2.0)),
    tree(probability=0.5),
]
REWARDS = [0.1, 0.9, -0.4, 0.3, 1.1, 0.2, -0.6, 0.8, 0.5, 0.0, -1.3, 0.6, 0.7, -0.2]
SETTINGS = [
    LossSettings(),
    LossSettings(pair="rao_kupper", tie_strength=0.5, use_margin=True),
    LossSettings(pair="davidson", label_smoothing=0.1, centering=0.01),
]


def test_mixed_kinds_and_numbers_of_answers_keep_their_order():
    expected = [
        float(plackett_luce(double(0.1, 0.9, -0.4, 0.3), double(1.0, 4.0, 2.0, 2.0))),
        -0.7 * math.log(sigmoid(0.9)) - 0.3 * math.log(sigmoid(-0.9)),
        0.85**2,
        -math.log(sigmoid(0.3)),
        float(plackett_luce(double(0.0, -1.3, 0.6), double(0.0, 1.0, 2.0))),
        -0.5 * math.log(sigmoid(0.9)) - 0.5 * math.log(sigmoid(-0.9)),
    ]
    assert_close(losses(REWARDS, MIXED), expected)


@pytest.mark.parametrize("settings", SETTINGS)
@settings(deadline=None)
@given(cuts=st.sets(st.integers(1, len(MIXED) - 1)), order=st.permutations(range(len(MIXED))))
def test_any_cut_into_microbatches_gives_the_same_sum(settings, cuts, order):
    starts = [0]
    for preference in MIXED:
        starts.append(starts[-1] + len(preference.answer_ids))
    whole = preference_losses(double(*REWARDS), MIXED, settings)
    total = 0.0
    for start, end in pairwise([0, *sorted(cuts), len(MIXED)]):
        numbers = order[start:end]
        own = [reward for number in numbers for reward in REWARDS[starts[number] : starts[number + 1]]]
        part = preference_losses(double(*own), [MIXED[number] for number in numbers], settings)
        assert_close(part, [float(whole[number]) for number in numbers])
        total += float(part.sum())
    assert math.isclose(total, float(whole.sum()), rel_tol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_equal_finite_differences(settings):
    rewards = double(*REWARDS).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: preference_losses(r, MIXED, settings), rewards)


def test_the_gradient_of_a_pair_is_the_probability_of_being_wrong():
    rewards = double(0.8, 0.1).requires_grad_()
    preference_losses(rewards, [tree()], LossSettings()).sum().backward()
    assert_close(rewards.grad, [-sigmoid(-0.7), sigmoid(-0.7)])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_rewards_give_finite_float32_losses_and_gradients(settings, size):
    rewards = torch.tensor([size * reward for reward in REWARDS], requires_grad=True)
    found = preference_losses(rewards, MIXED, settings)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(rewards.grad).all())


def test_a_list_of_ties_alone_has_no_loss_and_no_gradient():
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = plackett_luce(rewards, torch.tensor([1.0, 1.0, 1.0]))
    loss.backward()
    assert float(loss) == 0.0
    assert rewards.grad.tolist() == [0.0] * 3
