"""How good a reward model is: counts over pairs, an interval, calibration, and what a shortcut would reach."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch

from lora_rm.config import LossSettings
from lora_rm.data.preference import Preference
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import DataError, ModelError
from lora_rm.losses import preference_losses
from lora_rm.model.reward_model import RewardModel


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCount:
    """Pairs and how many the rewards put in the right order."""

    num_pairs: int = 0
    num_correct: int = 0
    num_ties: int = 0
    """Pairs whose two rewards are equal."""

    @classmethod
    def of(cls, difference: float) -> "PairCount":
        """The count of one pair, of its better answer's reward minus the worse one's."""
        return cls(num_pairs=1, num_correct=int(difference > 0), num_ties=int(difference == 0))

    @property
    def accuracy(self) -> float:
        """Share in the right order, a tie counting half; NaN without pairs."""
        return (self.num_correct + self.num_ties / 2) / self.num_pairs if self.num_pairs else math.nan

    def __add__(self, other: "PairCount") -> "PairCount":
        return PairCount(
            num_pairs=self.num_pairs + other.num_pairs,
            num_correct=self.num_correct + other.num_correct,
            num_ties=self.num_ties + other.num_ties,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestCount:
    """Preferences with more than two answers, and in how many a best answer has the highest reward.

    As RewardBench 2 counts all but its ties (arXiv 2506.01937): chance reaches one in four with four answers, and a worse
    answer with the same reward as the best one is no win.
    """

    num_preferences: int = 0
    num_correct: int = 0

    @property
    def accuracy(self) -> float:
        """Share with a best answer on top; NaN without preferences."""
        return self.num_correct / self.num_preferences if self.num_preferences else math.nan

    def __add__(self, other: "BestCount") -> "BestCount":
        return BestCount(
            num_preferences=self.num_preferences + other.num_preferences,
            num_correct=self.num_correct + other.num_correct,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    num_preferences: int
    loss: float
    """Mean loss over the preferences, by the training's formula."""

    pairs: PairCount
    interval: tuple[float, float]
    """95 % interval of the accuracy; pairs of one prompt are not independent: see `clustered_interval`."""

    length_baseline: float
    """Accuracy of choosing the longer answer, in tokens; equal lengths count half."""

    calibration_error: float
    """Mean distance of sigmoid(reward difference) from the share that was right, over ten bins."""

    margin_mean: float
    """Mean of better minus worse reward."""

    rating_correlation: float
    """Pearson's correlation of rewards and ratings, over preferences that are ratings."""

    reward_mean: float
    reward_spread: float
    """Standard deviation of all rewards."""

    subsets: dict[str, PairCount] = field(default_factory=dict)
    best: BestCount = BestCount()
    best_subsets: dict[str, BestCount] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, NaN as None."""
        values = asdict(self)
        for count in [values["pairs"], *values["subsets"].values()]:
            count["accuracy"] = PairCount(**count).accuracy
        for count in [values["best"], *values["best_subsets"].values()]:
            count["accuracy"] = BestCount(**count).accuracy
        return without_nan(values)


def evaluate(
    model: RewardModel,
    trees: Sequence[TokenTree],
    loss: LossSettings | None = None,
    tokens_per_microbatch: int = 4096,
) -> Evaluation:
    """Scores preferences and counts.

    Rankings count with each of their ordered pairs, and once as `best`; ties in the data are left out of the accuracy.

    Raises:
        DataError: If there is nothing to evaluate.
        ModelError: If a reward is not finite.
    """
    if not trees:
        raise DataError("There are no preferences to evaluate on. Give data.eval, or raise data.eval_share.")
    rewards = model.score(list(trees), tokens_per_microbatch, together=True)
    check_finite(reward for own in rewards for reward in own)
    return summarize(trees, rewards, loss or LossSettings())


def check_finite(rewards: Iterable[float]) -> None:
    """Raises if a reward is not finite.

    Raises:
        ModelError: If so.
    """
    if not all(map(math.isfinite, rewards)):
        raise ModelError(
            "A reward is not finite. If its products are in float16, they overflowed: open the model with compute_dtype "
            "float32 or bfloat16. If not, look at it with `lora-rm doctor`."
        )


def summarize(
    trees: Sequence[TokenTree], rewards: Sequence[Sequence[float]], loss: LossSettings
) -> Evaluation:
    """The evaluation of rewards that are known already, one list a preference."""
    flat = torch.tensor([reward for own in rewards for reward in own], dtype=torch.float64)
    total, longer = PairCount(), 0.0
    prompts: dict[str | int, PairCount] = {}
    subsets: dict[str, PairCount] = {}
    best, best_subsets = BestCount(), dict[str, BestCount]()
    rated: list[tuple[float, float]] = []
    differences: list[float] = []
    probabilities: list[float] = []
    for number, (tree, own) in enumerate(zip(trees, rewards, strict=True)):
        if tree.kind == "rating":
            rated.append((tree.scores[0], own[0]))
        if len(tree.scores) > 2 and len(set(tree.scores)) > 1:
            won = BestCount(num_preferences=1, num_correct=int(is_best_on_top(tree.scores, own)))
            best = best + won
            if tree.subset:
                best_subsets[tree.subset] = best_subsets.get(tree.subset, BestCount()) + won
        for better, worse in ordered_pairs(tree):
            difference = own[better] - own[worse]
            one = PairCount.of(difference)
            total = total + one
            prompt = tree.group or number
            prompts[prompt] = prompts.get(prompt, PairCount()) + one
            if tree.subset:
                subsets[tree.subset] = subsets.get(tree.subset, PairCount()) + one
            lengths = len(tree.answer_ids[better]), len(tree.answer_ids[worse])
            longer += 0.5 if lengths[0] == lengths[1] else float(lengths[0] > lengths[1])
            differences.append(difference)
            probabilities.append(tree.probability if tree.kind == "pair" else 1.0)
    return Evaluation(
        num_preferences=len(trees),
        loss=float(preference_losses(flat, trees, loss).mean()),
        pairs=total,
        interval=clustered_interval(list(prompts.values())),
        length_baseline=longer / total.num_pairs if total.num_pairs else math.nan,
        calibration_error=calibration_error(differences, probabilities),
        margin_mean=sum(differences) / len(differences) if differences else math.nan,
        rating_correlation=correlation(rated),
        reward_mean=float(flat.mean()),
        reward_spread=float(flat.std(correction=0)),
        subsets=dict(sorted(subsets.items())),
        best=best,
        best_subsets=dict(sorted(best_subsets.items())),
    )


def is_best_on_top(scores: Sequence[float], rewards: Sequence[float]) -> bool:
    """Whether an answer with the highest score has a higher reward than every answer with a lower score."""
    both = list(zip(scores, rewards, strict=True))
    return max(r for s, r in both if s == max(scores)) > max(r for s, r in both if s < max(scores))


def ordered_pairs(tree: TokenTree | Preference) -> list[tuple[int, int]]:
    """Indices (better, worse) of answers whose order the data tells."""
    if tree.kind == "pair":
        return [(0, 1)] if tree.probability > 0.5 else []
    if tree.kind == "rating":
        return []
    numbers = range(len(tree.scores))
    return [(i, j) for i in numbers for j in numbers if tree.scores[i] > tree.scores[j]]


def clustered_interval(prompts: Sequence[PairCount]) -> tuple[float, float]:
    """95 % interval of the accuracy over prompts with several pairs each.

    Wilson's, for as many independent pairs as would vary as much as these prompts do: no more than there are, and no
    fewer than if all pairs of a prompt were right or wrong together. That few prompts tell little of how much they vary
    is allowed for as in a t interval: of 2 to 50 prompts with lists of 8 it held the truth in 93 to 97 % of simulated
    cases, in 73 to 95 % without; of 2 to 5 that are right or wrong nearly as a whole in 74 to 84 %.

    Source: the clustered standard error of Miller 2024 (arXiv 2411.00640).
    """
    total = sum(prompts, PairCount())
    if not total.num_pairs:
        return 0.0, 1.0
    share = total.accuracy
    variance = sum((one.num_correct + one.num_ties / 2 - share * one.num_pairs) ** 2 for one in prompts)
    size, num_prompts = float(total.num_pairs), len(prompts)
    if share in (0.0, 1.0) or num_prompts == 1:  # how much prompts vary is not known
        size = num_prompts
    elif variance and num_prompts < total.num_pairs:
        # prompts of as many pairs each that would tell as much, if all pairs of one are right or wrong together
        alike = size**2 / sum(one.num_pairs**2 for one in prompts)
        freedom = max(1, round(alike) - 1)
        variance *= (freedom + 1) / freedom * (_t_quantile(freedom) / Z) ** 2
        size = min(size, max(alike, share * (1 - share) * size**2 / variance))
    return wilson_interval(share * size, size)


Z = 1.96
"""Half of a 95 % interval, in standard errors."""


def _t_quantile(freedom: int) -> float:
    """The same of a t distribution: from 3 degrees of freedom on to 1 % (Abramowitz and Stegun 1964, eq. 26.7.5)."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def wilson_interval(num_correct: float, num_pairs: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) without pairs."""
    if not num_pairs:
        return 0.0, 1.0
    share, z = num_correct / num_pairs, Z
    center = share + z * z / (2 * num_pairs)
    half = z * math.sqrt(share * (1 - share) / num_pairs + z * z / (4 * num_pairs**2))
    scale = 1 + z * z / num_pairs
    return (center - half) / scale, (center + half) / scale


def correlation(points: Sequence[tuple[float, float]]) -> float:
    """Pearson's, of both coordinates; NaN where one does not vary."""
    both = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    if not len(both) or (both == both[0]).all(dim=0).any():
        return math.nan
    return float(torch.corrcoef(both.T)[0, 1])


NUM_BINS = 10
"""Of confidence, of equal width."""


def calibration_error(differences: Sequence[float], probabilities: Sequence[float] = ()) -> float:
    """Expected calibration error of sigmoid(difference) as the probability of being right.

    Each pair is taken the way round that the model prefers, so confidences lie between 0.5 and 1.

    Args:
        differences: Of the better answer's reward to the worse one's.
        probabilities: That the better answer is the better one; empty: 1.

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), eq. 3.
    """
    if not differences:
        return math.nan
    bins: dict[int, list[tuple[float, float]]] = {}
    for difference, sure in zip(differences, probabilities or [1.0] * len(differences), strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(difference), 700.0)))
        right = 0.5 if difference == 0 else sure if difference > 0 else 1 - sure
        number = min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        bins.setdefault(number, []).append((confidence, right))
    distances = (abs(sum(c for c, _ in group) - sum(r for _, r in group)) for group in bins.values())
    return sum(distances) / len(differences)


MOST_FOR_WORDS = 20_000
"""Pairs that the bag of words is fitted to, and judged on, taken at random: 0.3 GB of counts, and seconds."""


def bag_of_words_baseline(
    train: Sequence[Preference], held_out: Sequence[Preference], num_words: int = 4000
) -> float:
    """Accuracy on held-out pairs of a logistic regression on the answers' word counts alone.

    What it reaches needs no understanding of the prompt: a reward model must be well above. Only decided
    pairs count. The weights have an L2 penalty of 1 / number of training pairs.
    """
    train = [p for p in train if p.kind == "pair" and not p.is_tie]
    if len(train) > MOST_FOR_WORDS:
        train = Random(0).sample(train, MOST_FOR_WORDS)
    held_out = [p for p in held_out if p.kind == "pair" and not p.is_tie]
    if len(held_out) > MOST_FOR_WORDS:
        held_out = Random(0).sample(held_out, MOST_FOR_WORDS)
    if not train or not held_out:
        return math.nan
    words = Counter(word for p in train for answer in p.answers for word in _words(answer))
    if not words:
        return math.nan
    index = {word: number for number, (word, _) in enumerate(words.most_common(num_words))}

    def features(preferences: Sequence[Preference]) -> torch.Tensor:
        rows = np.zeros((len(preferences), len(index)), dtype=np.float32)
        for row, preference in zip(rows, preferences, strict=True):
            for answer, sign in zip(preference.answers, (1.0, -1.0), strict=True):
                for word in _words(answer):
                    if word in index:
                        row[index[word]] += sign
        return torch.from_numpy(rows)

    x = features(train)
    weight = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-(x @ weight)).mean() + weight.square().sum() / len(train)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        margins = features(held_out) @ weight
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def _words(answer: Sequence[Any]) -> list[str]:
    """What an answer says, tool calls with it."""
    texts = [text for m in answer for text in (m["content"], *map(json.dumps, m.get("tool_calls", ())))]
    return " ".join(texts).split()


def without_nan(value: Any) -> Any:
    """Values as JSON can hold them: None for a number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
